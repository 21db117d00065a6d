"""What a run took: reads train/log.jsonl, the record of its attempts and its files' sizes."""

from __future__ import annotations

from yelp_hpc.config import Config
from yelp_hpc.forecast.page import Happened
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.record import training_log


def what_happened(run: RunPaths, config: Config) -> Happened:
    """The figures of a run directory; None for what its files do not tell.

    Times are those of the jobs, from start to end. A stage that was run by hand has none: then the
    training's is the sum of its steps.
    """
    log = training_log(run)
    training = attempts.read(run, "train")
    scoring = [a for m in config.infer.models for a in attempts.read(run, f"infer-{m}")]
    steps = [line for line in log if line.get("seconds") and line.get("tokens_per_second")]
    tokens = sum(line["seconds"] * line["tokens_per_second"] for line in steps)
    if steps and config.train.log_every > 1:
        tokens *= steps[-1]["step"] / len(steps)
    seconds = sum(map(attempts.lasted, training))
    if not training and steps:
        seconds = sum(line["seconds"] for line in steps)
    used, _ = attempts.gpu_hours([*training, *scoring])
    return Happened(
        steps=log[-1].get("step") if log else None,
        train_tokens=round(tokens) if steps else None,
        train_seconds=seconds or None,
        train_memory=max((line.get("memory_bytes", 0) for line in log), default=0) or None,
        infer_seconds=sum(map(attempts.lasted, scoring)) or None,
        gpu_hours=used or None,
        disk=_disk(run),
        restarts=max((a.restart for a in training), default=0),
    )


def _disk(run: RunPaths) -> int | None:
    folders = (run.prepare, run.checkpoints, run.adapter, run.predictions("base").parent)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) or None
