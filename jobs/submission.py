"""What was submitted, one record a job in RUN/submissions.jsonl, and which of it lives.

A job id alone is nobody's: cluster, user, job name, script and time of submission have to agree
with what Slurm shows, a process's start and its machine's boot with what the kernel shows.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import time
import uuid
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.errors import RequestError, StageError, YelpHpcError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import command, stage_argv
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.site.client import user_name
from yelp_hpc.jobs.snapshot import read_settings
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import task_text
from yelp_hpc.rundir.files import (
    append_jsonl,
    read_json,
    read_jsonl,
    remove,
    sweep,
    write_bytes,
)
from yelp_hpc.rundir.paths import RunPaths, Task
from yelp_hpc.runtime import use_programs

_JOB = re.compile(r"(local-)?[0-9]{1,18}(_[0-9]{1,9})?")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, or with `dry_run` would be."""

    name: str
    stage: str
    job: str
    """Slurm's job id (`12_3`: a task of a study's array), `local-PID`, or "" for a dry run."""
    tasks: tuple[Task, ...]
    command: str
    """What the first task runs, as a person would type it."""
    script: str = ""
    """Dry run: the sbatch script."""


def new_submission(job: Job, job_id: str, paths: RunPaths, cluster: ClusterConfig) -> Submission:
    """What was queued or started as `job_id`, with the command of its first task."""
    arguments = stage_argv(job.stage, paths.root, job.model, job.tasks[0])
    argv = command(cluster, paths.root, arguments, {})
    return Submission(job.name, job.stage, job_id, job.tasks, shlex.join(argv))


YOUNG_SECONDS = 60.0
"""For so long Slurm's clients may not show a job yet: a site may answer them from a cache."""


def record(
    paths: RunPaths,
    submission: Submission,
    executor: str,
    frozen: Path,
    code: Path,
    **identity: Any,
) -> None:
    """Append a record; `identity` is what tells this job from another with the same id."""
    line: dict[str, Any] = {
        "time": time.time(),
        "name": submission.name,
        "stage": submission.stage,
        "job": submission.job,
        "executor": executor,
        "tasks": [task_text(task) for task in submission.tasks],
        "command": submission.command,
        "cluster": frozen.name,
        "code": code.name,
        "host": socket.gethostname(),
        "user": user_name(),
        **identity,
    }
    append_jsonl(paths.submissions, line)


def records(paths: RunPaths) -> list[dict[str, Any]]:
    """Every record of a job that was submitted, oldest first; a damaged one is left out.

    One that was cancelled says so in `cancelled`.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(read_jsonl(paths.submissions)):
        if all(isinstance(line.get(key), str) for key in ("name", "job", "executor")):
            if not _JOB.fullmatch(line["job"]) or not _NAME.fullmatch(line["name"]):
                continue
            if not isinstance(line.get("tasks", []), list) or not _is_time(line.get("time", 0)):
                continue
            key = (line["name"], line["job"], str(line.get("time", number)))
            found[key] = line
    return list(found.values())


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e11


def taken_back(paths: RunPaths, jobs: Container[str]) -> None:
    """Record that these, just submitted, are not to be counted any more."""
    for line in records(paths):
        if line["job"] in jobs:
            append_jsonl(paths.submissions, {**line, "cancelled": time.time()})


def cancelled(paths: RunPaths, what: Sequence[Live]) -> None:
    """Record that these are not to be counted any more, and that a `cancel` was made."""
    sweep(paths.logs)
    for live in what:
        if live.record is not None:
            append_jsonl(paths.submissions, {**live.record, "cancelled": time.time()})
    write_bytes(paths.logs / "cancelled", uuid.uuid4().hex.encode())


def cancellations(paths: RunPaths) -> str | None:
    """Changes with each `cancel` of the run; None where that cannot be told now."""
    try:
        return (paths.logs / "cancelled").read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError:
        return None


def sweep_pickles(paths: RunPaths) -> None:
    """Remove the calls of killed submissions; for who holds the lock of submissions."""
    for path in (paths.logs / "slurm").glob("*.pkl"):
        if re.fullmatch(r"[0-9a-f]{12}-\d+\.pkl", path.name):
            remove(path)


def submitted_with(paths: RunPaths) -> ClusterConfig | None:
    """The cluster settings of the newest submission to Slurm, or of any; None without one."""
    lines = records(paths)
    for line in [*lines, *(line for line in lines if line["executor"] == "slurm")][::-1]:
        with suppress(YelpHpcError, ValueError, KeyError, TypeError):
            settings = read_settings(paths.logs / str(line["cluster"]))
            return ClusterConfig.model_validate(settings["cluster"])
    return None


def take_up_programs(paths: RunPaths) -> None:
    """Call the clients by the names that the newest submission was made with."""
    for line in reversed(records(paths)):
        try:
            frozen = read_json(paths.logs / str(line.get("cluster")))
            use_programs(frozen["cluster"].get("programs", {}))
        except (YelpHpcError, KeyError, TypeError, AttributeError):
            continue
        return


@dataclass(frozen=True)
class Live:
    """A submission that has not ended, as far as this machine can tell."""

    name: str
    job: str
    cluster: str = ""
    """The one that holds it, where that is another than this machine's."""
    record: Mapping[str, Any] | None = None
    """None: sbatch was killed before it could be recorded."""

    @property
    def local(self) -> bool:
        """Whether it is a process of a machine, and no job of Slurm."""
        return self.job.startswith("local-")

    @property
    def home(self) -> str:
        """The cluster that it was submitted to, as far as that was recorded."""
        return str((self.record or {}).get("slurm_cluster") or "")

    def __str__(self) -> str:
        where = f" of cluster {self.cluster}, which is not this machine's" if self.cluster else ""
        return f"{self.name} is job {self.job}{where}"


def living(paths: RunPaths, patience: float = 0.0) -> list[Live]:
    """What was submitted and has not ended, the newest of each name last.

    Raises:
        StageError: Slurm does not answer.
    """
    lines = [line for line in records(paths) if not line.get("cancelled")]
    on_slurm = [line for line in lines if line["executor"] == "slurm"]
    found = [Live(line["name"], line["job"], "", line) for line in lines if local_runs(paths, line)]
    if not on_slurm and not (paths.logs / "slurm").is_dir():
        return found
    mine, elsewhere = by_cluster(on_slurm)
    try:
        rows = slurm.everything([line["job"] for line in mine], patience)
        rows += slurm.of_script(paths.logs / "slurm", patience)
    except RequestError:  # no squeue here: scontrol tells, or the run's own files
        rows = []
    for line, cluster in elsewhere:
        if not attempts.over(paths, line["name"], line["job"], len(line.get("tasks", [""]))):
            found.append(Live(line["name"], line["job"], cluster, line))
    newest = {line["name"]: line for line in mine}
    for line in mine:
        last = line is newest[line["name"]]
        own = [row for row in rows if attempts.within(row.job, line["job"])]
        shown = [row for row in own if slurm.is_of(row, line)]
        if any(row.live for row in shown) or (not own and unseen(paths, line, last)):
            found.append(Live(line["name"], line["job"], "", line))
    known = {line["job"].partition("_")[0] for line in mine}
    lost = {row.parent: row for row in rows if row.live and row.parent not in known}
    for job, row in lost.items():
        name = Path(row.what.rpartition("|")[2]).stem.rpartition("-")[0]
        found.append(Live(name, job))
    return found


def beyond_reach(paths: RunPaths, live: Live) -> str:
    """Why this machine cannot end what runs, or ""; what only waits elsewhere is let go."""
    host = str((live.record or {}).get("host") or "")
    if live.local and host != socket.gethostname():
        pid = live.job.removeprefix("local-")
        return f"{live.name} runs on {host}: end it there (kill {pid}); nothing follows it"
    if live.cluster and attempts.beating(paths, live.name, live.job):
        return f"{live.name} runs on cluster {live.cluster}: end it there (scancel {live.job})"
    return ""


def end(what: Sequence[Live]) -> None:
    """Cancel jobs of this machine's cluster, and tell processes of this machine to save and stop.

    Raises:
        StageError: Slurm does not answer.
    """
    queued = [live for live in what if not live.local and not live.cluster]
    for home in sorted({live.home for live in queued}):
        slurm.cancel(sorted(live.job for live in queued if live.home == home), home)
    for live in what:
        if live.local:
            with suppress(ProcessLookupError):
                os.kill(int(live.job.removeprefix("local-")), signal.SIGTERM)


def by_cluster(
    lines: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], str]]]:
    """Slurm's submissions: what this machine's cluster can tell of, and the rest with its own."""
    mine = [line for line in lines if line["executor"] == "slurm"]
    here = slurm.cluster_name() if any(line.get("slurm_cluster") for line in mine) else ""
    there = [line.get("slurm_cluster") or here or "" for line in mine]

    def asked(name: str) -> bool:  # SLURM_CLUSTERS may name several
        return here == "all" or name in here.split(",")

    return (
        [line for line, name in zip(mine, there, strict=True) if not here or asked(name)],
        [(line, name) for line, name in zip(mine, there, strict=True) if here and not asked(name)],
    )


def unseen(paths: RunPaths, line: Mapping[str, Any], ask: bool = True) -> bool:
    """Whether a submission that squeue does not show may live nevertheless.

    One that has not ended by its own account: scontrol tells, which has no cache; where it cannot
    be asked (or shall not, for an old one), one whose supervisor shows life, or that is too new.
    """
    tasks = len(line.get("tasks", [""]))
    if line.get("cancelled") or attempts.over(paths, line["name"], line["job"], tasks):
        return False
    age = abs(time.time() - float(line.get("time", 0.0)))
    if line.get("host") == socket.gethostname():
        new = age < YOUNG_SECONDS
    else:  # whose clock may be minutes off
        new = age < 3600 and attempts.age(paths.submissions) < YOUNG_SECONDS
    told: Mapping[str, str] | None = None
    if new or ask:
        with suppress(StageError, RequestError):
            told = slurm.facts_of(line["job"])
    if told is None:
        return new or attempts.beating(paths, line["name"], line["job"])
    if not told:  # another cluster of the same name may have it
        return attempts.beating(paths, line["name"], line["job"])
    if told["JobState"] in slurm.FINISHED:
        return False
    return told.get("Command", "") == str(line.get("script") or "")


def boot_id() -> str:
    """What tells this start of the machine from every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process began, in ticks since the boot; "" when there is none, or a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def local_alive(line: Mapping[str, Any]) -> bool:
    """Whether a local submission's supervisor still runs; only its own machine can tell."""
    if line.get("executor") != "local" or line.get("host") != socket.gethostname():
        return False
    pid = line["job"].removeprefix("local-")
    began = process_start(int(pid)) if pid.isdigit() else ""
    same = line.get("boot_id") in (None, boot_id()) and line.get("began") in (None, began)
    if not began or not same:
        return False
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def local_runs(paths: RunPaths, line: Mapping[str, Any]) -> bool:
    """Whether a local submission runs, here or on another machine that shares the directory."""
    if line["executor"] != "local":
        return False
    if line.get("host") == socket.gethostname():
        return local_alive(line)
    return attempts.beating(paths, line["name"], line["job"])
