"""What was submitted: one record a job, kept in RUN/submissions.jsonl."""

from __future__ import annotations

import os
import re
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import command, stage_argv
from yelp_hpc.jobs.job import Job
from yelp_hpc.rundir.attempts import task_text
from yelp_hpc.rundir.files import append_jsonl, read_jsonl
from yelp_hpc.rundir.paths import RunPaths, Task

_JOB = re.compile(r"(local-)?[0-9]{1,18}")


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, or with `dry_run` would be."""

    name: str
    stage: str
    job: str
    """Slurm's job id, `local-PID`, or "" for a dry run."""
    tasks: tuple[Task, ...]
    command: str
    """What the first task runs, as a person would type it."""
    script: str = ""
    """Dry run: the sbatch script."""


def new_submission(job: Job, job_id: str, paths: RunPaths, cluster: ClusterConfig) -> Submission:
    """What was queued or started as `job_id`, with the command of its first task."""
    first = next(iter(job.tasks[0]), None)
    argv = command(cluster, paths.root, stage_argv(job.stage, paths.root, job.model, first), {})
    return Submission(job.name, job.stage, job_id, job.tasks, shlex.join(argv))


def record(
    paths: RunPaths, submission: Submission, executor: str, frozen: Path, code: Path
) -> None:
    """Append one line to the run's `submissions.jsonl`."""
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
        "user": os.environ.get("USER") or str(os.getuid()),
    }
    append_jsonl(paths.submissions, line)


def records(paths: RunPaths) -> list[dict[str, Any]]:
    """Every record of a job that was submitted, oldest first; a damaged one is left out."""
    return [
        line
        for line in read_jsonl(paths.submissions)
        if all(isinstance(line.get(key), str) for key in ("name", "job", "executor"))
        and _JOB.fullmatch(line["job"])
    ]
