"""What is known about each job of a run, before any judgement.

Reads the run directory and asks Slurm once; what cannot be told only takes columns away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.data.packing import DataPlan
from yelp_hpc.errors import YelpHpcError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.logs import last_output
from yelp_hpc.jobs.progress import shards_missing, shards_progress, stage_done
from yelp_hpc.jobs.slurm import Row
from yelp_hpc.jobs.submission import by_cluster, local_runs, records, take_up_programs, unseen
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt
from yelp_hpc.rundir.files import read_object
from yelp_hpc.rundir.modes import patiently
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.record import training_log


@dataclass(frozen=True)
class Facts:
    """What is known about one job of the chain, before any judgement."""

    name: str
    stage: str
    done: bool
    submission: dict[str, Any] | None = None
    """The newest one."""
    alive: bool = False
    """A supervisor runs that is not this cluster's: a local one, or another cluster's."""
    rows: tuple[Row, ...] = ()
    accounting: tuple[Row, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    shards: int = 0
    shards_done: frozenset[int] = frozenset()
    shards_progress: dict[int, dict[str, Any]] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    """Last line of train/log.jsonl."""
    steps: int | None = None
    said: str = ""
    """The last words of a job whose supervisor never began."""
    unseen: bool = False
    """Squeue does not show it, and it lives nevertheless."""


@patiently
def gather(run_dir: str | Path, config: Config) -> tuple[list[Facts], str]:
    """Everything that `summarise` needs, and why Slurm did not answer, if it did not."""
    paths = RunPaths(Path(run_dir).absolute())
    take_up_programs(paths)
    newest = {record["name"]: record for record in records(paths)}
    mine, elsewhere = by_cluster(list(newest.values()))
    shown: list[Row] | None = None
    seen, problems = [], [f"{line['name']} is with cluster {c}" for line, c in elsewhere]
    try:
        shown = slurm.everything([line["job"] for line in mine])
        seen = [row for row in shown if any(_belongs(row, line) for line in mine)]
    except YelpHpcError as error:
        problems.append(str(error))
    done_by_marker = {}
    trained = [] if paths.request.is_file() else ["train"]
    names = ["prepare", *trained, *(f"infer-{m}" for m in config.infer.models), "collect"]
    if config.publish.repo_id:
        names.append("publish")
    for name in names:
        stage, _, model = name.partition("-")
        done_by_marker[name] = stage_done(paths, config, stage, model)
    queued = [row for row in seen if row.live]
    accounted = [row for row in seen if not row.live]
    gone = [ln for ln in mine if not any(attempts.within(row.job, ln["job"]) for row in queued)]
    gone = [line for line in gone if not done_by_marker.get(line["name"])]
    if gone and not problems:
        try:
            told = slurm.accounting([line["job"] for line in gone])
            known = {row.job for row in accounted}
            accounted += [
                row
                for row in told
                if row.job not in known and any(_belongs(row, line) for line in gone)
            ]
        except YelpHpcError as error:
            problems.append(f"no accounts: {error}")
    absent = [ln for ln in gone if not any(attempts.within(r.job, ln["job"]) for r in shown or ())]
    log = training_log(paths)
    facts = []
    for name in names:
        stage, _, model = name.partition("-")
        record = newest.get(name)
        job = record["job"] if record else ""
        tried = tuple(attempts.read(paths, name))
        shards, progress = frozenset[int](), dict[int, dict[str, Any]]()
        if stage == "infer":
            shards = _shards_done(paths, config, model)
            if not done_by_marker[name]:
                progress = _told(paths, config, model, shards, tried)
        facts.append(
            Facts(
                name=name,
                stage=stage,
                done=done_by_marker[name],
                submission=record,
                alive=bool(record and _alive(paths, record, elsewhere)),
                unseen=bool(record in absent and unseen(paths, record, shown is not None)),
                said=last_output(paths, name, job) if record in gone or _local(record) else "",
                rows=tuple(row for row in queued if attempts.within(row.job, job)),
                accounting=tuple(row for row in accounted if attempts.within(row.job, job)),
                attempts=tried,
                shards=config.infer.shards if stage == "infer" else 0,
                shards_done=shards,
                shards_progress=progress,
                training=log[-1] if stage == "train" and log else None,
                steps=total_steps(paths, config) if stage == "train" and log else None,
            )
        )
    return facts, "; ".join(problems)


def _shards_done(paths: RunPaths, config: Config, model: str) -> frozenset[int]:
    """Those that need not be made again: of these settings, of this adapter."""
    missing = shards_missing(paths, config, model)
    return frozenset(range(config.infer.shards)).difference(missing)


def _told(
    paths: RunPaths,
    config: Config,
    model: str,
    done: frozenset[int],
    tried: Sequence[Attempt],
) -> dict[int, dict[str, Any]]:
    """What the shards say of themselves; those that nobody works at any more are `silent`.

    One that was killed still says that it runs, and at which rate; one that is whole, of other
    settings, that it is complete.
    """
    count = config.infer.shards
    alive = {
        shard
        for attempt in tried
        if attempt.ended is None and attempts.age(attempt.path(paths)) < attempts.SILENT
        for shard in attempt.task or range(count)
    }
    told = {}
    for shard, line in shards_progress(paths, model, count).items():
        if line["state"] == "complete" and shard not in done:
            continue
        silent = line["state"] == "running" and shard not in alive
        told[shard] = {**line, "state": "silent"} if silent else line
    return told


def _belongs(row: Row, line: Mapping[str, Any]) -> bool:
    return attempts.within(row.job, line["job"]) and slurm.is_of(row, line)


def _alive(
    paths: RunPaths, line: Mapping[str, Any], elsewhere: Sequence[tuple[Mapping[str, Any], str]]
) -> bool:
    if line["executor"] == "local":
        return local_runs(paths, line)
    far = any(line is other for other, _ in elsewhere)
    return far and attempts.beating(paths, line["name"], line["job"])


def _local(line: Mapping[str, Any] | None) -> bool:
    return line is not None and line["executor"] == "local"


def total_steps(paths: RunPaths, config: Config) -> int | None:
    """Steps of the whole training, of the rows that run.json counts; None where it does not."""
    rows = ((read_object(paths.run_json).get("data") or {}).get("rows") or {}).get("train")
    train = config.train
    if not rows:
        return train.max_steps
    return DataPlan(rows, train.global_batch, train.epochs, config.seed, train.max_steps).steps
