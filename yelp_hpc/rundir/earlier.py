"""Run directories of 0.1: `infer/MODEL/` held `partial/` and `progress/` beside the shards."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from yelp_hpc.rundir.paths import MODELS, RunPaths


def shard_progress(paths: RunPaths, model: str, shard: int, shards: int) -> Path:
    """Where a shard's progress stands, now or since then."""
    path = paths.shard_progress(model, shard, shards)
    before = paths.predictions(model) / "progress" / path.name
    return before if before.is_file() and not path.is_file() else path


def move_in(paths: RunPaths) -> None:
    """Put parts and progress where they belong now; several tasks may do so at once."""
    for model in MODELS:
        places = {"partial": paths.partials(model), "progress": paths.progress(model)}
        for name, folder in places.items():
            before = paths.predictions(model) / name
            if not before.is_dir():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another task is faster
                for path in before.iterdir():
                    if not (folder / path.name).exists():
                        path.rename(folder / path.name)
                shutil.rmtree(before)
