"""One job of a run as plain data: what the launchers compute and the executors carry out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A stage's job or job array, before anything is submitted."""

    stage: str
    model: str = ""
    tasks: tuple[str, ...] = ("",)
    """One entry an array task: its shards, comma-separated; "" for a stage without shards."""
    after: tuple[tuple[str, str], ...] = ()
    """(Slurm's dependency type, name of the job that it waits for)."""

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.model}" if self.model else self.stage

    def only_after(self, names: set[str]) -> Job:
        """The same job without dependencies on jobs that are not in `names`."""
        return replace(self, after=tuple(item for item in self.after if item[1] in names))


def job_name(job: Job, run: Path) -> str:
    """The name that squeue shows: `yelp-train:RUN`."""
    return f"yelp-{job.name}:{run.name}"


def pack(shards: list[int], limit: int) -> tuple[str, ...]:
    """Deal shards to at most `limit` array tasks, as evenly as can be, neighbours together.

    >>> pack([0, 1, 2, 5, 6], 2)
    ('0,1,2', '5,6')
    """
    tasks = min(len(shards), limit)
    if tasks == 0:
        return ()
    size, longer = divmod(len(shards), tasks)
    packed, start = [], 0
    for task in range(tasks):
        stop = start + size + (task < longer)
        packed.append(",".join(map(str, shards[start:stop])))
        start = stop
    return tuple(packed)
