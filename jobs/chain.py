"""Submit a stage, or all of them as a chain that runs alone; cancel a run.

prepare → (train, infer base) → infer tuned → collect → publish. Reads what is done from the run
directory and what is live from Slurm; writes RUN/submissions.jsonl, RUN/code and RUN/logs.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import attempts, slurm
from jobs.cluster import ClusterConfig
from jobs.container import command, stage_argv
from jobs.job import Job
from jobs.progress import stage_done
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, SavedForRequeue, StageError
from yelp_hpc.files import append_jsonl, read_jsonl, write_failure
from yelp_hpc.paths import STAGES, RunPaths

FOLLOW_SECONDS = 0.3
WAIT_SECONDS = 3.0


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, or with ``dry_run`` would be."""

    name: str
    stage: str
    job: str
    """Slurm's job id, ``local-PID``, or "" for a dry run."""
    tasks: tuple[str, ...]
    command: str
    """What the first task runs, as a person would type it."""
    script: str = ""
    """Dry run: the sbatch script."""


def plan(stage: str, config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The jobs that are still to be done for ``stage`` or ``all``, in the order of the chain."""
    from jobs import collect, infer, prepare, publish, train

    launchers = {
        "prepare": prepare.jobs,
        "train": train.jobs,
        "infer": infer.jobs,
        "collect": collect.jobs,
        "publish": publish.jobs,
    }
    if stage == "all":
        skip = {"publish"} if config.publish.where == "login" else set()
        stages = [name for name in STAGES if name not in skip]
        if "tuned" not in config.infer.models:
            stages.remove("train")
    else:
        stages = [stage]
    planned = [job for name in stages for job in launchers[name](config, paths, cluster)]
    if stage == "all" and {"train", "infer"} & {job.stage for job in planned}:
        names = {job.name for job in planned}
        if "collect" not in names:  # it was up to date, but what it reads is made again
            after = tuple(("afterany", f"infer-{model}") for model in config.infer.models)
            place = next((i for i, job in enumerate(planned) if job.stage == "publish"), None)
            planned.insert(len(planned) if place is None else place, Job("collect", after=after))
    return planned


def submit(
    stage: str,
    run_dir: str | Path,
    config: Config,
    cluster: ClusterConfig,
    executor: str = "slurm",
    dry_run: bool = False,
    wait: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Submission]:
    """Submit what is still to be done of ``stage`` (or ``all``); [] when there is nothing.

    On Slurm this returns at once, unless ``wait``. Locally there is no queue to hand the chain to:
    it runs here, one supervisor after the other, to its end. Either every job is submitted or none.

    Raises:
        RequestError: the run's name cannot be used, a stage is running already, an earlier stage
            is missing, Slurm refuses the request.
        StageError: the controller does not answer; locally or with ``wait``: a stage failed.
        SavedForRequeue: locally: stopped by a signal after saving.
    """
    paths = RunPaths(checked_run(run_dir))
    planned = plan(stage, config, paths, cluster)
    if dry_run:
        return list(_dry(planned, paths, cluster, executor))
    if not planned:
        say(f"{stage}: nothing to do, everything is there")
        return []
    with _lock(paths):
        live = _live(paths, with_slurm=executor == "slurm")
        _refuse_running(planned, live)
        _refuse_missing(planned, config, paths, live)
        if executor == "slurm":
            submissions = _submit_slurm(planned, paths, cluster, live, say)
    if executor == "local":
        return _run_local(planned, paths, cluster, say)
    if wait:
        follow(paths, submissions, say)
    return submissions


def checked_run(run_dir: str | Path) -> Path:
    """The absolute run directory, if its name can be used in job names and Slurm's patterns.

    Raises:
        RequestError: it holds ``%`` (Slurm fills it in), a control character, or ``:`` or ``,``
            (which separate container binds).
    """
    run = Path(run_dir).expanduser().absolute()
    bad = sorted({c for c in str(run) if c in "%:,\"'\\`$" or ord(c) < 32 or ord(c) == 127})
    if bad:
        shown = " ".join(repr(c) for c in bad)
        raise RequestError(f"--run {str(run)!r} holds {shown}; use letters, digits and . _ - /")
    return run


def _submit_slurm(
    planned: Sequence[Job],
    paths: RunPaths,
    cluster: ClusterConfig,
    live: dict[str, str],
    say: Callable[[str], None],
) -> list[Submission]:
    from jobs.executor import freeze_cluster, parameters, submit_slurm
    from jobs.snapshot import freeze

    frozen, code = freeze_cluster(paths, cluster), freeze(paths)
    ids = {name: job for name, job in live.items() if not job.startswith("local-")}
    submissions: list[Submission] = []
    try:
        for job in planned:
            params = parameters(job, cluster, paths.root, code, ids)
            ids[job.name] = submit_slurm(job, params, paths, cluster, frozen)
            submission = _submission(job, ids[job.name], paths, cluster)
            submissions.append(submission)
            _record(paths, submission, "slurm", frozen, code)
            many = f", an array of {len(job.tasks)}" if len(job.tasks) > 1 else ""
            say(f"{job.name}: job {ids[job.name]}{many}")
    except (RequestError, StageError):
        with suppress(StageError):  # all or nothing: the chain would end where this one is missing
            slurm.cancel([submission.job for submission in submissions])
        raise
    return submissions


def _run_local(
    planned: Sequence[Job], paths: RunPaths, cluster: ClusterConfig, say: Callable[[str], None]
) -> list[Submission]:
    from jobs.executor import freeze_cluster
    from jobs.snapshot import freeze

    frozen, code = freeze_cluster(paths, cluster), freeze(paths)
    submissions: list[Submission] = []
    failed: dict[str, str] = {}
    for job in planned:
        blocked = [name for kind, name in job.after if kind == "afterok" and name in failed]
        if blocked:
            failed[job.name] = f"not started, {blocked[0]} failed"
            continue
        for task in job.tasks:
            submission, attempt = _run_task(job, task, paths, cluster, frozen, code, say)
            submissions.append(submission)
            if attempt is None or attempt.verdict == "failed":
                reason = attempt.reason if attempt else "its supervisor died"
                failed[job.name] = reason
                say(f"{job.name} failed: {reason.partition(chr(10))[0]}")
            elif attempt.verdict == "stopped":
                raise SavedForRequeue(f"{job.name}: {attempt.reason}. Run the same command again.")
    if failed:
        first, reason = next(iter(failed.items()))
        raise StageError(
            f"{first} failed: {reason}\nWhen the cause is gone, run the same command again: what "
            "is finished is kept."
        )
    return submissions


def _run_task(
    job: Job,
    task: str,
    paths: RunPaths,
    cluster: ClusterConfig,
    frozen: Path,
    code: Path,
    say: Callable[[str], None],
) -> tuple[Submission, attempts.Attempt | None]:
    from jobs.executor import start_local
    from jobs.supervisor import log_name

    log = paths.stage_log(log_name(job.name, task))
    offset = log.stat().st_size if log.exists() else 0
    local_id, process = start_local(job, task, paths, code, frozen)
    submission = _submission(Job(job.stage, job.model, (task,)), local_id, paths, cluster)
    _record(paths, submission, "local", frozen, code)
    say(f"{job.name}{f' shard {task}' if task else ''}: started, log {log}")
    while True:
        try:
            ended = process.poll() is not None
            offset = _copy_new(log, offset)
            if ended:
                break
            time.sleep(FOLLOW_SECONDS)
        except KeyboardInterrupt:
            say(f"{job.name}: told to save and stop")
    tried = attempts.read(paths, job.name, local_id)
    return submission, tried[-1] if tried and tried[-1].verdict else None


def _copy_new(log: Path, offset: int) -> int:
    with suppress(OSError), log.open("rb") as file:
        file.seek(offset)
        new = file.read()
        sys.stderr.write(new.decode(errors="replace"))
        sys.stderr.flush()
        return offset + len(new)
    return offset


def _submission(job: Job, job_id: str, paths: RunPaths, cluster: ClusterConfig) -> Submission:
    first = job.tasks[0].split(",")[0]
    argv = command(cluster, paths.root, stage_argv(job.stage, paths.root, job.model, first), {})
    return Submission(job.name, job.stage, job_id, job.tasks, shlex.join(argv))


def _dry(
    planned: Sequence[Job], paths: RunPaths, cluster: ClusterConfig, executor: str
) -> Iterator[Submission]:
    from jobs.executor import parameters, sbatch_text

    ids = {job.name: f"JOB_ID_OF_{job.name}" for job in planned}
    for job in planned:
        script = ""
        if executor == "slurm":
            params = parameters(job, cluster, paths.root, paths.code / "DIGEST", ids)
            script = sbatch_text(job, params, paths, cluster)
        submission = _submission(job, "", paths, cluster)
        yield Submission(job.name, job.stage, "", job.tasks, submission.command, script)


def _record(
    paths: RunPaths, submission: Submission, executor: str, frozen: Path, code: Path
) -> None:
    record: dict[str, Any] = {
        "time": time.time(),
        "name": submission.name,
        "stage": submission.stage,
        "job": submission.job,
        "executor": executor,
        "tasks": list(submission.tasks),
        "command": submission.command,
        "cluster": frozen.name,
        "code": code.name,
        "host": socket.gethostname(),
        "user": os.environ.get("USER") or str(os.getuid()),
    }
    append_jsonl(paths.submissions, record)


def _live(paths: RunPaths, with_slurm: bool) -> dict[str, str]:
    """Job name → id of what was submitted and has not ended."""
    records = read_jsonl(paths.submissions)
    ids = [record["job"] for record in records if record.get("executor") == "slurm"]
    alive = {row.parent for row in slurm.queue(ids)} if ids and with_slurm else set()
    live = {}
    for record in records:
        if record["job"] in alive or local_alive(record):
            live[record["name"]] = record["job"]
    return live


def local_alive(record: dict[str, Any]) -> bool:
    """Whether a local submission's supervisor still runs; only its own machine can tell."""
    if record.get("executor") != "local" or record.get("host") != socket.gethostname():
        return False
    try:
        text = Path(f"/proc/{record['job'].removeprefix('local-')}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in text


def _refuse_running(planned: Sequence[Job], live: dict[str, str]) -> None:
    running = [f"{job.name} is job {live[job.name]}" for job in planned if job.name in live]
    if running:
        raise RequestError(
            f"already submitted and not finished: {'; '.join(running)}. See "
            "`python -m yelp_hpc status`, or `cancel` it first."
        )


def _refuse_missing(
    planned: Sequence[Job], config: Config, paths: RunPaths, live: dict[str, str]
) -> None:
    names = {job.name for job in planned}
    for job in planned:
        for kind, need in job.after:
            stage, _, model = need.partition("-")
            if kind != "afterok" or need in names or need in live:
                continue
            if not stage_done(paths, stage, model, config.infer.shards):
                raise RequestError(
                    f"{job.name} needs {need}, which is neither done nor submitted: "
                    f"`python -m yelp_hpc submit {stage}` or `submit all`"
                )


@contextmanager
def _lock(paths: RunPaths) -> Iterator[None]:
    """One submission to a run directory at a time."""
    path = paths.logs / ".submit.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RequestError(write_failure(path, error)) from None
    try:
        with suppress(OSError):  # a file system without locks: squeue still tells
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def follow(paths: RunPaths, submissions: Sequence[Submission], say: Callable[[str], None]) -> None:
    """Wait until every job has ended, saying each change of state.

    Raises:
        StageError: a job failed, was cancelled or never started.
    """
    names = {submission.job: submission.name for submission in submissions}
    shown: dict[str, str] = {}
    down = False
    while True:
        try:
            rows, down = slurm.queue(list(names)), False
        except StageError as error:
            if not down:
                say(f"{str(error).splitlines()[0]}; still waiting")
            down = True
            time.sleep(WAIT_SECONDS)
            continue
        for job, name in names.items():
            states = sorted(row.state.lower() for row in rows if row.parent == job)
            text = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "ended"
            if shown.get(job) != text:
                shown[job] = text
                say(f"{name} (job {job}): {text}")
        if not rows:
            break
        time.sleep(WAIT_SECONDS)
    problems = []
    for submission in submissions:
        last: dict[str, attempts.Attempt] = {}
        for attempt in attempts.read(paths, submission.name):
            if attempt.job.partition("_")[0] == submission.job:
                last[attempt.job] = attempt
        bad = [a for a in last.values() if a.verdict != "done"]
        problems += [f"{submission.name} ({a.job}): {a.verdict or 'lost'}: {a.reason}" for a in bad]
        if len(last) < len(submission.tasks):
            missing = len(submission.tasks) - len(last)
            problems.append(f"{submission.name}: {missing} of its jobs never started")
    if problems:
        raise StageError("\n".join(problems[:5]))


def cancel(run_dir: str | Path) -> list[str]:
    """Cancel every live job of a run and nothing else; returns their ids.

    Raises:
        StageError: the Slurm controller does not answer.
    """
    paths = RunPaths(Path(run_dir).absolute())
    records = read_jsonl(paths.submissions)
    ids = [record["job"] for record in records if record.get("executor") == "slurm"]
    alive = sorted({row.parent for row in slurm.queue(ids)}) if ids else []
    slurm.cancel(alive)
    local = [record["job"] for record in records if local_alive(record)]
    for job in local:
        with suppress(ProcessLookupError):
            os.kill(int(job.removeprefix("local-")), 15)
    return alive + local
