"""The logs of a run: which one to read first, and its end.

A stage's own log first; what Slurm and the job script wrote (RUN/logs/slurm/*.out) where a job
ended before its supervisor could begin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from yelp_hpc.errors import RequestError
from yelp_hpc.jobs.submission import records
from yelp_hpc.progress import plain
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.modes import patiently
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.runtime import open_log

TAIL_LINES = 25
START = "=== job "
"""Opens the line that the supervisor writes before each start of a stage."""


@patiently
def find_logs(run_dir: str | Path, stage: str | None = None) -> list[Path]:
    """Logs of a run, the one to read first: the last failure's, then the newest.

    Raises:
        RequestError: there is no log yet.
    """
    paths = RunPaths(Path(run_dir).absolute())
    known = {path for path in paths.logs.glob("*.log") if path.is_file() and not path.is_symlink()}
    newest = {line["name"]: line["job"] for line in records(paths)}
    before: dict[Path, float] = {}
    for name, job in newest.items():
        if stage in (None, name.partition("-")[0]):
            before |= {path: path.stat().st_mtime for path in outputs(paths, name, job)}
    if stage:
        known = {path for path in known if path.stem.partition("-")[0] == stage}
    known |= before.keys()
    if not known:
        what = f"{stage} has" if stage else "the run has"
        raise RequestError(f"{what} no log yet in {paths.logs}")
    names = sorted(paths.attempts.iterdir()) if paths.attempts.is_dir() else []
    last: dict[Path, attempts.Attempt] = {}
    for folder in names:
        for attempt in attempts.read(paths, folder.name):
            last[paths.stage_log(folder.name, attempt.task)] = attempt
    failed = {path: a.ended or 0.0 for path, a in last.items() if a.verdict == "failed"} | before

    def place(path: Path) -> tuple[float, float, str]:
        own = path.with_name(f"{path.stem.partition('-rank-')[0]}.log")
        shown = own if own in known else path  # a rank's log stands behind its stage's
        return failed.get(path, 0.0), shown.stat().st_mtime, path.name

    return sorted(known, key=place, reverse=True)


def outputs(paths: RunPaths, name: str, job: str) -> Iterator[Path]:
    """What the tasks of a job wrote that no supervisor tells of, the newest last."""
    if job.startswith("local-"):
        places = (paths.logs / "local").glob(f"{job.removeprefix('local-')}_*_log.out")
    else:
        places = (paths.logs / "slurm").glob(f"{job}_*_log.out")
    told = {attempt.job for attempt in attempts.read(paths, name)}
    for path in sorted(places, key=lambda path: path.lstat().st_mtime):
        # JOB_0_log.out, of an array JOB_TASK_0_log.out
        task = path.name.removesuffix("_log.out").rpartition("_")[0]
        if path.is_symlink() or {task, f"local-{task}"} & told:  # a link could lead anywhere
            continue
        if path.stat().st_size:
            yield path


_NOISE = re.compile(
    r"^submitit (INFO|WARNING)|^srun: (error: .*Exited with exit code|Terminating|launch/|Job step)"
    r"|^slurmstepd: error: (Detected|Exceeded) .*oom_kill|^$"
)


_TELLS = re.compile(
    r"error|no such|not found|denied|cannot|can't|failed|fatal|unable to|killed|exceeded|CANCELLED",
    re.IGNORECASE,
)


def last_output(paths: RunPaths, name: str, job: str) -> str:
    """The last thing of weight that a job said before its supervisor began, on one line."""
    for path in reversed(list(outputs(paths, name, job))):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        heavy = [line.strip() for line in lines if not _NOISE.search(line.strip())]
        # a site's epilog may go on after the error
        errors = [line for line in heavy if _TELLS.search(line)]
        if shown := errors or heavy or lines:
            return shown[-1][:300]
    return ""


def show_logs(run_dir: str | Path, stage: str | None = None, lines: int = 40) -> None:
    """Print the end of the log to read first and name the others."""
    first, *others = find_logs(run_dir, stage)
    print(f"==> {first} <==")
    print("\n".join(plain(first.read_text(errors="replace")).splitlines()[-lines:]))
    if others:
        print(f"also: {', '.join(path.name for path in others[:8])}")


def tail(log: Path) -> str:
    """The last lines of a log, with where to find the rest."""
    try:
        with open_log(log) as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return f"(no log at {log})"
    return "\n".join([f"last lines of {log}:", *(f"  {line}" for line in lines)])


def last_words(log: Path) -> str:
    """What the last start of a stage said, without the line that the supervisor put before it."""
    try:
        with open_log(log) as file:
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"{log}: {error.strerror}"
    return text.rpartition(START)[2].partition("\n")[2].rstrip()


def without_tail(reason: str) -> str:
    """A verdict's reason where the log was shown already: its place instead of its last lines."""
    why, mark, rest = reason.partition("\nlast lines of ")
    if not mark:
        return reason
    return f"{why}; its log, shown above, is {rest.splitlines()[0].removesuffix(':')}"
