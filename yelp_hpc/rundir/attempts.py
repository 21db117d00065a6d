"""The record of every start of a job: RUN/logs/attempts/NAME/JOB-RESTART.json.

One small file an attempt, written when it starts and again when it ends; its modification time is
the supervisor's heartbeat in between. So an attempt that was killed outright still tells how long
it ran, and nothing is appended to by two nodes at once.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import read_jsonl, read_object, sweep, temporary_name, write_json
from yelp_hpc.rundir.modes import is_full, patiently, room_again
from yelp_hpc.rundir.paths import RunPaths, Task

SILENT = 120.0
"""Seconds without a heartbeat after which a start is taken to be dead."""
_NUMBERS = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_LATEST = 1e11  # seconds since 1970 that a date can still be made of


@dataclass
class Attempt:
    """One start of a job on a node."""

    name: str
    """`train`, `infer-tuned` …"""
    job: str
    restart: int
    task: Task = ()
    """Its shards; `shards` in the file, as text."""
    node: str = ""
    pid: int = 0
    gpus: int = 0
    started: float = field(default_factory=time.time)
    ended: float | None = None
    verdict: str = ""
    """"" while it runs, then done, requeued, again, stopped or failed."""
    reason: str = ""
    stalled: int = 0
    """Attempts of this job in a row, this one included, that began without new progress."""
    before: str = ""
    """Digest of the work's files when it started."""
    lost: float = 0.0
    """Seconds of work that this attempt did after the last thing that was kept."""

    def path(self, paths: RunPaths) -> Path:
        """The file of this attempt alone."""
        return paths.attempts / self.name / f"{self.job}-{self.restart}.json"


def task_text(task: Task) -> str:
    """Shard numbers, ascending, as the edges spell them: (0, 1, 2, 5) → "0-2,5"."""
    runs: list[list[int]] = []
    for number in task:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def task_of(text: str) -> Task:
    """The shard numbers of `task_text`, ascending, each once.

    Raises:
        ValueError: the text is another.
    """
    numbers: set[int] = set()
    for part in text.split(",") if text else ():
        found = _NUMBERS.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(f"{part!r} is no shard's number, nor a range as 0-3")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def write(paths: RunPaths, attempt: Attempt) -> None:
    """Write the attempt, in place of what stood there of it; on a full disk once there is room.

    Raises:
        StageError: it cannot be written.
    """
    values = asdict(attempt)
    values["shards"] = task_text(values.pop("task"))
    sweep(attempt.path(paths).parent)
    try:
        write_json(attempt.path(paths), values)
    except StageError as error:
        if not (is_full(paths.root, str(error)) and room_again(paths.root, lambda: False)):
            raise
        write_json(attempt.path(paths), values)


def beat(paths: RunPaths, attempt: Attempt) -> None:
    """Say that the attempt is alive."""
    with suppress(OSError):
        os.utime(attempt.path(paths))


@patiently
def read(paths: RunPaths, name: str, job: str = "") -> list[Attempt]:
    """Attempts of a job name, oldest first; of one job id when given."""
    folder = paths.attempts / name
    found = []
    for path in folder.glob(f"{job}-*.json" if job else "*.json") if folder.is_dir() else ():
        with suppress(OSError, ValueError, TypeError, AttributeError, StageError):
            values = read_object(path)
            attempt = Attempt(task=task_of(values.pop("shards", "")), **values)
            if not _plausible(attempt):
                continue
            if attempt.ended is None:
                attempt.__dict__["seen"] = path.stat().st_mtime
            found.append(attempt)
    # the clocks of nodes may differ by minutes: jobs as they were submitted, starts by number
    place = order(paths)
    return sorted(found, key=lambda attempt: (place(attempt.job), attempt.job, attempt.restart))


def newer(paths: RunPaths, attempt: Attempt) -> Attempt | None:
    """A start at the same work that came later, which only one may do.

    Later by its number, or by the order of submissions: clocks of nodes differ by minutes. Nobody
    while the records cannot be read: that is no reason to end what computes.
    """
    try:
        place, all_of_it = order(paths), read(paths, attempt.name)
    except (OSError, StageError):
        return None
    later = [
        other
        for other in all_of_it
        if (
            other.restart > attempt.restart
            if other.job == attempt.job
            else place(other.job) > place(attempt.job)
        )
    ]
    return later[-1] if later else None


def order(paths: RunPaths) -> Callable[[str], float]:
    """Of a job or array task: its place among all submissions, the last where none tells of it."""
    first: dict[tuple[str, str], int] = {}
    for number, line in enumerate(read_jsonl(paths.submissions)):  # a cancelled one stands twice
        first.setdefault((str(line.get("job")), str(line.get("time"))), number)
    places = {job: number for (job, _), number in first.items()}
    return lambda job: places.get(job, places.get(job.partition("_")[0], math.inf))


def age(path: Path) -> float:
    """Seconds since a file changed, by the clock of the file server; infinite where it is not.

    Where nothing can be written (a full disk, another's run) by this machine's clock.
    """
    # a name of one's own: who looks at the same time would remove it
    mark = temporary_name(path.with_name(f"now-{threading.get_ident()}"))
    try:
        mark.touch()
        now = mark.stat().st_mtime
    except OSError:
        now = time.time()
    finally:
        with suppress(OSError):
            mark.unlink()
    try:
        return now - path.stat().st_mtime
    except OSError:
        return math.inf


def within(one: str, job: str) -> bool:
    """Whether the job `one` is `job`, or a task of the array `job`: 12_3 is within 12."""
    return job in (one, one.partition("_")[0])


def beating(paths: RunPaths, name: str, job: str) -> bool:
    """Whether an attempt of a job, or of a task of its array, has shown life within a minute."""
    mine = (a for a in read(paths, name) if within(a.job, job))
    return any(a.ended is None and age(a.path(paths)) < 60 for a in mine)


def over(paths: RunPaths, name: str, job: str, tasks: int, gone: bool = False) -> bool:
    """Whether every task of a job has come to an end of its own.

    `gone`: Slurm holds it no longer, so that nothing that was saved goes on by itself.
    """
    last = {a.job: a for a in read(paths, name) if within(a.job, job)}.values()
    ended = (a.ended is not None if gone else a.verdict in ("done", "failed") for a in last)
    return len(last) >= tasks and all(ended)


def of_run(paths: RunPaths) -> list[Attempt]:
    """Every start of every job of a run, oldest first."""
    names = sorted(paths.attempts.iterdir()) if paths.attempts.is_dir() else []
    found = [attempt for folder in names for attempt in read(paths, folder.name)]
    return sorted(found, key=lambda attempt: (attempt.started, attempt.name))


def killed(paths: RunPaths, name: str, job: str, task: Task) -> list[Attempt]:
    """Starts that nobody ended, of which one more start of `job` at `task` is the proof.

    Earlier ones of the same job, and of other jobs at the same work that have long been silent.
    """
    dead = []
    for attempt in read(paths, name):
        if attempt.ended is not None:
            continue
        same = set(attempt.task) & set(task) or attempt.task == task
        if attempt.job == job or (same and age(attempt.path(paths)) > SILENT):
            dead.append(attempt)
    return dead


def _plausible(attempt: Attempt) -> bool:
    """Whether the numbers are numbers: a damaged record must not take the table away."""
    whole = (attempt.restart, attempt.gpus, attempt.pid, attempt.stalled)
    times = (attempt.started, attempt.lost, 0.0 if attempt.ended is None else attempt.ended)
    texts = (attempt.name, attempt.job, attempt.node, attempt.verdict, attempt.reason)
    return (
        all(isinstance(n, int) for n in whole)
        and all(isinstance(n, int | float) and 0 <= n < _LATEST for n in (*whole, *times))
        and all(isinstance(text, str) for text in (*texts, attempt.before))
    )


def last_seen(attempt: Attempt) -> float:
    """When the attempt ended, or its last heartbeat."""
    if attempt.ended is not None:
        return attempt.ended
    return float(attempt.__dict__.get("seen", attempt.started))


def lasted(attempt: Attempt) -> float:
    """Seconds from its start to when it was last seen.

    Never below 0: a heartbeat is by the file server's clock, which may be behind the node's, and a
    node's own may be set back.
    """
    return max(0.0, last_seen(attempt) - attempt.started)


class GpuHours(NamedTuple):
    """GPU-hours; `lost` of those `used` were computed and thrown away by interruptions."""

    used: float
    lost: float

    def __str__(self) -> str:
        return f"GPU-hours: {self.used:.2f} used, {self.lost:.2f} of them lost to interruptions"


def gpu_hours(attempts: Iterable[Attempt]) -> GpuHours:
    """What the starts took: the one count that the status, the report and the card show."""
    used = lost = 0.0
    for attempt in attempts:
        used += attempt.gpus * lasted(attempt)
        lost += attempt.gpus * attempt.lost
    return GpuHours(used / 3600, lost / 3600)
