"""What is done, and whether anything has moved, read from the run directory alone.

Markers decide, never a pickle and never Slurm. The cheap forms look at names and markers (status),
the careful forms check hashes as well (before something is skipped).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.errors import YelpHpcError
from yelp_hpc.inference.provenance import wanted
from yelp_hpc.inference.shards import missing_shards
from yelp_hpc.rundir import earlier
from yelp_hpc.rundir.changes import settings_of
from yelp_hpc.rundir.collected import collected
from yelp_hpc.rundir.files import is_complete, read_marker, read_object
from yelp_hpc.rundir.modes import patiently
from yelp_hpc.rundir.paths import RunPaths, Task, shard_of
from yelp_hpc.rundir.request import answered

Fingerprint = tuple[tuple[str, int, int], ...]
_SHARD = re.compile(r"shard-(\d{4,6})")
_NO_PROGRESS = (".jsonl", ".log", ".png", ".tmp")


def prepared(paths: RunPaths, careful: bool = True) -> bool:
    """Whether `prepare` is done; `careful` compares what its marker covers with the hashes."""
    return _marked(paths.prepare, careful)


def trained(paths: RunPaths, careful: bool = True) -> bool:
    """Whether `train` is done; `careful` as in `prepared`."""
    return _marked(paths.adapter, careful)


def _marked(folder: Path, careful: bool) -> bool:
    return is_complete(folder) if careful else read_marker(folder) is not None


def shards_done(paths: RunPaths, model: str, shards: int, identity: str | None = None) -> list[int]:
    """The finished shards of `model`; a shard's file is whole or absent.

    Args:
        identity: what they must have been made with (`Provenance.identity`), as far as they say;
            None: whatever it was.
    """
    try:
        found = [shard_of(path) for path in paths.predictions(model).iterdir()]
    except OSError:
        return []
    done = sorted(item[0] for item in found if item and item[1] == shards)
    if identity is None:
        return done
    said = shards_progress(paths, model, shards)
    return [k for k in done if said.get(k, {}).get("identity") in (identity, None)]


def shards_missing(paths: RunPaths, config: Config, model: str) -> list[int]:
    """The shards of `model` that are not done with these settings."""
    shards, identity = config.infer.shards, wanted(paths, config, model).identity
    return missing_shards(shards_done(paths, model, shards, identity), shards)


def shards_progress(paths: RunPaths, model: str, shards: int) -> dict[int, dict[str, Any]]:
    """What each shard that ever began says of itself, by shard.

    `state`, `rows`, `done`, `rows_per_second`, `updated` (seconds since the epoch), `identity`.
    """
    found = {}
    for shard in range(shards):
        with suppress(YelpHpcError, KeyError, TypeError, ValueError):
            line = read_object(earlier.shard_progress(paths, model, shard, shards))
            numbers = [float(line[key] or 0) for key in ("rows", "done", "rows_per_second")]
            if isinstance(line["state"], str) and all(0 <= n < 1e15 for n in numbers):
                found[shard] = line
    return found


def stage_done(paths: RunPaths, config: Config, stage: str, model: str = "") -> bool:
    """Whether a stage has nothing left to do with these settings, cheaply."""
    if stage == "prepare":
        return prepared(paths, careful=False)
    if stage == "train":
        return trained(paths, careful=False)
    if stage == "infer":
        return not shards_missing(paths, config, model)
    return made_with(paths, config, stage)


def made_with(paths: RunPaths, config: Config, stage: str) -> bool:
    """Whether `collect` or `publish` is done, as far as its record says with these settings."""
    if stage == "collect" and paths.request.is_file():
        return answered(paths)
    record = paths.metrics if stage == "collect" else paths.published
    if not (collected(paths) if stage == "collect" else record.exists()):
        return False
    try:
        found = read_object(record)
        made = (found.get("method") or {} if stage == "collect" else found).get("settings")
    except (YelpHpcError, AttributeError):
        return True
    return made in (None, settings_of(config, stage))


@patiently
def fingerprint(paths: RunPaths, stage: str, model: str, task: Task) -> Fingerprint:
    """Name, size and time of every file that counts as progress of a task; () is all shards.

    Logs do not: a stage that only ever starts and dies writes them too.
    """
    return tuple(sorted(_progress_files(paths, stage, model, task)))


def digest(state: Fingerprint) -> str:
    """A fingerprint in a few characters."""
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def newest(state: Fingerprint) -> float | None:
    """Time of the newest file of a fingerprint, seconds since the epoch."""
    return max((item[2] for item in state), default=0) / 1e9 or None


def _progress_files(
    paths: RunPaths, stage: str, model: str, task: Task
) -> Iterator[tuple[str, int, int]]:
    if stage in ("collect", "publish"):
        places = [paths.metrics, paths.report, paths.published, paths.answered]
    elif stage == "infer":
        folders = (paths.predictions(model), paths.partials(model))
        places = [
            path
            for folder in folders
            for path in folder.glob("*")
            if not task or ((found := _SHARD.search(path.name)) and int(found[1]) in task)
        ]
    else:
        places = [paths.prepare if stage == "prepare" else paths.train]
    for place in places:
        for path in place.rglob("*") if place.is_dir() else (place,):
            try:
                status = path.stat()
            except OSError:
                continue  # renamed or removed while we look
            if not path.is_dir() and not path.name.endswith(_NO_PROGRESS):
                yield str(path.relative_to(paths.root)), status.st_size, status.st_mtime_ns
