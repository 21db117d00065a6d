"""The chain on this machine: one supervisor after the other, through submitit's local executor.

There is no queue to hand the chain to, so it runs in the foreground to its end. Follows each
stage's log to standard error; Ctrl-C or SIGTERM has the running stage save and stop.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from yelp_hpc.errors import RequestError, SavedForRequeue, StageError
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.logs import without_tail
from yelp_hpc.jobs.submission import (
    Submission,
    boot_id,
    cancellations,
    new_submission,
    process_start,
    record,
)
from yelp_hpc.jobs.verdict import AGAIN, REFUSED
from yelp_hpc.progress import plain, write
from yelp_hpc.ranks.rank import Flag
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.paths import RunPaths, Task
from yelp_hpc.runtime import open_log

FOLLOW_SECONDS = 0.3


def run_chain(
    planned: Sequence[Job],
    paths: RunPaths,
    cluster: ClusterConfig,
    frozen: Path,
    code: Path,
    say: Callable[[str], None],
) -> list[Submission]:
    """Run the jobs here in order, a supervisor each, and skip what depends on a failed one.

    Args:
        frozen: the cluster settings that supervisors read.
        code: the snapshot that they run.

    Raises:
        RequestError: the first stage that failed refused its input.
        StageError: a stage failed.
        SavedForRequeue: stopped by a signal after saving.
    """
    submissions: list[Submission] = []
    told = Flag()
    before_us = cancellations(paths)

    def stopped() -> str:
        if told.is_set():
            return "stopped"
        now = cancellations(paths)
        return "cancelled" if None not in (now, before_us) and now != before_us else ""

    failed: dict[str, str] = {}
    refused = False
    skipped: set[str] = set()
    for job in planned:
        blocked = [name for kind, name in job.after if kind == "afterok" and name in failed]
        before = {name for _, name in job.after}
        if blocked or (before and before <= skipped):  # nothing new to collect
            first = blocked[0] if blocked else min(before)
            failed[job.name] = f"not started, because {first} did not end well"
            skipped.add(job.name)
            continue
        for task in job.tasks:
            if why := stopped():  # between two stages there is nobody to signal
                raise SavedForRequeue(f"{why} before {job.name}. Run the same command again.")
            with _hearing(told):
                submission, attempt = _run_task(
                    job, task, paths, cluster, frozen, code, say, stopped
                )
            submissions.append(submission)
            if attempt is None and (why := stopped()):
                raise SavedForRequeue(f"{why} as {job.name} began. Run the same command again.")
            if attempt is None or attempt.verdict == "failed":
                reason = without_tail(attempt.reason) if attempt else "its supervisor died"
                refused |= not failed and attempt is not None and attempt.reason.startswith(REFUSED)
                failed[job.name] = reason
            elif attempt.verdict == "stopped":
                raise SavedForRequeue(f"{job.name}: {attempt.reason}. Run the same command again.")
    if failed:
        first, reason = next(iter(failed.items()))
        how = RequestError if refused else StageError
        raise how(f"{first} failed: {reason}\n{AGAIN}")
    return submissions


def _run_task(
    job: Job,
    task: Task,
    paths: RunPaths,
    cluster: ClusterConfig,
    frozen: Path,
    code: Path,
    say: Callable[[str], None],
    stopped: Callable[[], str],
) -> tuple[Submission, attempts.Attempt | None]:
    from yelp_hpc.jobs.executor import start_local

    log = paths.stage_log(job.name, task)
    offset = log.stat().st_size if log.exists() else 0
    known = {attempt.path(paths) for attempt in attempts.read(paths, job.name)}
    local_id, process = start_local(job, task, paths, code, frozen)
    submission = new_submission(Job(job.stage, job.model, (task,)), local_id, paths, cluster)
    identity = {"began": process_start(process.pid), "boot_id": boot_id()}
    record(paths, submission, "local", frozen, code, **identity)
    say(f"{job.name}{f' shard {attempts.task_text(task)}' if task else ''}: started, log {log}")
    said = ended = False
    while not ended:
        ended = process.poll() is not None
        offset = _copy_new(log, offset)
        if stopped():
            if not said:
                say(f"{job.name}: told to save and stop")
            said = True
            process.send_signal(signal.SIGTERM)  # again: a supervisor that starts hears nothing yet
        if not ended:
            time.sleep(FOLLOW_SECONDS)
    tried = [a for a in attempts.read(paths, job.name, local_id) if a.path(paths) not in known]
    return submission, tried[-1] if tried and tried[-1].verdict else None


@contextmanager
def _hearing(told: Flag) -> Iterator[None]:
    """Inside the block Ctrl-C and SIGTERM set `told`, and nothing else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: told.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _copy_new(log: Path, offset: int) -> int:
    with suppress(OSError), open_log(log) as file:
        file.seek(offset)
        new = file.read()
        write(plain(new.decode(errors="replace")))
        return offset + len(new)
    return offset
