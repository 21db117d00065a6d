"""One job of a run as plain data: what the launchers compute and the executors carry out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yelp_hpc.rundir.paths import Task


@dataclass(frozen=True)
class Job:
    """A stage's job or job array, before anything is submitted."""

    stage: str
    model: str = ""
    tasks: tuple[Task, ...] = ((),)
    """One entry an array task: its shards; () for a stage without shards."""
    after: tuple[tuple[str, str], ...] = ()
    """(Slurm's dependency type, name of the job that it waits for)."""

    @property
    def name(self) -> str:
        """What Slurm shows and `after` refers to."""
        return f"{self.stage}-{self.model}" if self.model else self.stage


def job_name(job: Job, run: Path) -> str:
    """The name that squeue shows: `yelp-train:RUN`."""
    return f"yelp-{job.name}:{run.name}"


def pack(missing: Sequence[int], limit: int) -> tuple[Task, ...]:
    """Deal shards to at most `limit` array tasks, as evenly as can be, neighbours together.

    >>> pack([0, 1, 2, 5, 6], 2)
    ((0, 1, 2), (5, 6))
    """
    tasks = min(len(missing), limit)
    if tasks == 0:
        return ()
    size, longer = divmod(len(missing), tasks)
    packed, start = [], 0
    for task in range(tasks):
        stop = start + size + (task < longer)
        packed.append(tuple(missing[start:stop]))
        start = stop
    return tuple(packed)
