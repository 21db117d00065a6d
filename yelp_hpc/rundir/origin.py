"""Was the adapter of a run directory trained by this run: its settings, its data?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from yelp_hpc.config import FREE_TRAIN_SETTINGS, Config, TrainConfig
from yelp_hpc.errors import StageError, all_problems, in_shell
from yelp_hpc.rundir.changes import differences
from yelp_hpc.rundir.files import MARKER, read_json, read_marker, sha256_file
from yelp_hpc.rundir.manifest import chosen_precision, in_precision
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, ADAPTER_FILES, WEIGHTS, RunPaths

_FREE = {*FREE_TRAIN_SETTINGS, "adapter"}
"""What a training does not depend on."""


def foreign_adapter(run: RunPaths, config: Config) -> Iterator[str]:
    """What speaks against it, a line each, opening with the file; nothing without an adapter.

    The marker's hashes are `files.damaged_files`'s to check.
    """
    marker = read_marker(run.adapter)
    if marker is None:
        return
    for name in ADAPTER_FILES:
        if name not in marker["files"]:
            yield f"{run.adapter / MARKER}: does not cover {name}"
    if config.train.adapter is not None or "taken" in marker:
        yield from _another(run, config, marker)
        return
    trained = marker.get("fingerprint")
    if not isinstance(trained, dict):
        yield f"{run.adapter / MARKER}: holds no fingerprint of the training"
        return
    config = in_precision(config, chosen_precision(run))
    defaults = TrainConfig().model_dump(mode="json")
    wanted = {
        "seed": config.seed,
        "model": _recorded_model(run) or config.model.model_dump(mode="json"),
        "lora": config.lora.model_dump(mode="json"),
        "train": {
            key: value
            for key, value in config.train.model_dump(mode="json").items()
            # a key of a later version than the training's has its default
            if key in (trained.get("train") or {}) or (key not in _FREE and value != defaults[key])
        },
    }
    for key, old, new in differences({k: trained.get(k) for k in wanted}, wanted):
        yield f"{run.run_json}: {key} is {new!r}, the adapter was trained with {old!r}"
    begun = (read_marker(run.start) or {}).get("taken")
    if config.train.start is not None and (begun is None or begun != trained.get("from")):
        yield f"{run.start}: is not what the adapter's training began with"
    hashes = trained.get("data") or {}
    for name, path in (
        ("train", run.split("train")),
        ("validation", run.split("validation")),
        ("tokens", run.tokens),
    ):
        if path.is_file() and hashes.get(name) != sha256_file(path):
            yield f"{path}: is not what the adapter was trained on (SHA-256 differs)"
    shape_path = run.adapter / ADAPTER_CONFIG
    if shape_path.is_file():
        shape = read_json(shape_path)
        for key, mine in (("r", config.lora.rank), ("lora_alpha", config.lora.alpha)):
            if shape.get(key) != mine:
                yield f"{shape_path}: {key} is {shape.get(key)!r}, run.json says {mine!r}"


def _another(run: RunPaths, config: Config, marker: dict[str, Any]) -> Iterator[str]:
    """What speaks against an adapter that was not trained here but taken as `train.adapter`."""
    taken, place = marker.get("taken"), run.adapter / MARKER
    if not isinstance(taken, dict):
        yield f"{run.run_json}: train.adapter is {config.train.adapter!r}, it was trained here"
        return
    for what, mine, old in (
        ("train.adapter", config.train.adapter, taken.get("from")),
        ("model", _recorded_model(run) or config.model.model_dump(mode="json"), taken.get("model")),
    ):
        if mine != old:
            yield f"{run.run_json}: {what} is {mine!r}, the adapter was taken for {old!r}"
    for name, key in ((WEIGHTS, "sha256"), (ADAPTER_CONFIG, "config_sha256")):
        if marker["files"].get(name) != taken.get(key):
            yield f"{place}: {name} is not the one that was taken (SHA-256 differs)"


def _recorded_model(run: RunPaths) -> dict[str, Any] | None:
    """The section `model` of run.json: a stage may be given the same weights by another path."""
    try:
        return dict(read_json(run.run_json)["config"]["resolved"]["model"])
    except (StageError, KeyError, TypeError):
        return None


def require_own_adapter(run: RunPaths, config: Config) -> None:
    """Raises StageError when the adapter there says of itself that it is another training's."""
    marker = read_marker(run.adapter) or {}
    known = "fingerprint" in marker or "taken" in marker
    problems = list(foreign_adapter(run, config)) if known else []
    if problems:
        headline = f"{run.adapter} was not trained by this run:"
        raise StageError(
            all_problems(headline, problems) + "\nMove it away and train again: "
            f"python -m yelp_hpc run train --run {in_shell(run.root)}"
        )
