"""May a run directory be given another configuration? A key locks only what has read it.

`prepare` and `train` lock the keys that they read once they are done (`train` once it has begun);
`infer`, `collect` and `publish` are done again with the new value, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from yelp_hpc.config import FREE_TRAIN_SETTINGS, Config
from yelp_hpc.rundir.files import read_marker
from yelp_hpc.rundir.paths import RunPaths, step_of

_READ_BY: dict[str, tuple[str, ...]] = {
    "name": ("collect", "publish"),
    "seed": ("prepare", "train", "collect"),
    "model": ("prepare", "train", "infer", "publish"),
    "model.precision": ("train",),
    "data": ("prepare",),
    "task": ("prepare", "infer", "collect"),
    "task.noun": ("collect",),
    "prompt": ("prepare",),
    "lora": ("train",),
    "train": ("train",),
    **{f"train.{key}": () for key in FREE_TRAIN_SETTINGS},
    "infer": ("infer",),
    "infer.max_tokens": (),
    "infer.models": ("infer", "collect"),
    "collect": ("collect",),
    "publish": ("publish",),
}
"""Key, or the beginning of keys → the stages whose result depends on it; the longest match holds.
What changes speed, saving or what is shown alone is read by none."""
_LOCKING = ("prepare", "train")


def readers(key: str) -> tuple[str, ...]:
    """The stages whose result depends on a dotted key of the configuration."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        found = _READ_BY.get(".".join(parts[:length]))
        if found is not None:
            return found
    return _LOCKING  # an unknown key, of another version: as if everything depended on it


def settings_of(config: Config, stage: str) -> dict[str, Any]:
    """Dotted key → value, as JSON holds it, of what `stage` reads and no earlier stage locks."""
    return {
        key: value
        for key, value in dotted(config.model_dump(mode="json"))
        if stage in readers(key) and not set(readers(key)) & set(_LOCKING)
    }


def refused_changes(
    run: RunPaths, changed: list[tuple[str, Any, Any]], live: Mapping[str, str] | None = None
) -> list[str]:
    """Why keys cannot be changed now, one line a key that cannot; [] when all can.

    Args:
        changed: dotted key, old and new value.
        live: stage → its job, of what is submitted and has not ended.
    """
    held = dict(_held(run))
    for stage, job in (live or {}).items():
        held[stage] = f"{stage} is submitted, job {job}: cancel it first"
    lines = []
    for key, old, new in changed:
        stages = [stage for stage in readers(key) if stage in held]
        if stages:
            why = held[stages[0]]
            lines.append(f"{key}: {old!r} in the run directory, {new!r} now ({why})")
    return lines


def _held(run: RunPaths) -> Iterator[tuple[str, str]]:
    """Stage → why the keys that it read are locked."""
    if read_marker(run.prepare) is not None:
        yield "prepare", "prepare is done with it"
    if read_marker(run.adapter) is not None:
        yield "train", "train is done with it"
    elif run.checkpoints.is_dir() and any(
        step_of(path) is not None for path in run.checkpoints.iterdir()
    ):
        yield "train", "train has begun with it"


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf that differs between two nested dicts: dotted key, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.removesuffix("."), old, new


def dotted(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts: dotted key and value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from dotted(item, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), value
