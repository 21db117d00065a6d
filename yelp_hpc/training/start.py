"""A training that goes on from an adapter that exists (`train.from`).

Copies the adapter into `train/from/`, whose marker holds where it came from and what it was trained
on; the new training's fingerprint holds the same. Where it is the first part of this very training,
its last checkpoint is taken, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from yelp_hpc.config import Config, TrainConfig
from yelp_hpc.data.packing import DataPlan
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.models.adapter_source import AdapterSource, find_adapter
from yelp_hpc.rundir.files import damaged_files, read_marker, write_bytes, write_marker
from yelp_hpc.rundir.paths import ADAPTER_FILES, WEIGHTS, RunPaths
from yelp_hpc.training.existing import check_base, check_shapes, described

LENGTH = ("epochs", "max_steps", "from", "warmup_steps")
"""Keys of `train` in which a training and its first part may differ; of the last one in words."""
_SAME_FORM = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern"),
    *("base_model_name_or_path", "revision", "inference_mode", "peft_type", "task_type"),
    *("auto_mapping", "peft_version", "runtime_config", "eva_config", "fan_in_fan_out"),
}
"""Keys of adapter_config.json that leave the adapter plain LoRA, whatever they hold."""
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Of `init_lora_weights`: those that leave the base model as it is."""


def begin(
    paths: RunPaths, config: Config, model_path: Path, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """Take the adapter that `train.from` names, unless that was done; returns the fingerprint.

    Args:
        fingerprint: of this training, without where it begins.

    Raises:
        RequestError: the adapter is not there, of another base or another form than `lora`, or it
            was trained so far already.
    """
    record = (read_marker(paths.start) or {}).get("taken")
    if record is None or damaged_files(paths.start):
        found = find_adapter(str(config.train.start))
        assert found is not None
        check_base(found, paths, config, model_path)
        if problems := list(_unlike(found, config)):
            raise RequestError(all_problems(f"training cannot go on from {found.name}:", problems))
        check_shapes(found, model_path)
        record = {**found.record(), "continued": _step(found, paths, config, fingerprint)}
        for name in ADAPTER_FILES:
            write_bytes(paths.start / name, (found.folder / name).read_bytes())
        whole = {**fingerprint, "from": record}
        if record["continued"] is not None:
            _take_checkpoint(found, paths, config, whole)
        write_marker(paths.start, list(ADAPTER_FILES), taken=record)
        how = (
            f"from its step {record['continued']}, with its optimizer"
            if record["continued"] is not None
            else "from its weights, step 0"
        )
        print(f"train: goes on from {described(found)}: {how}", file=sys.stderr, flush=True)
    return {**fingerprint, "from": record}


def start_weights(paths: RunPaths) -> dict[str, Tensor]:
    """The tensors of the adapter that this training begins with."""
    from safetensors.torch import load

    return load((paths.start / WEIGHTS).read_bytes())


def _unlike(found: AdapterSource, config: Config) -> Iterator[str]:
    """In what the adapter has another form than the configured one, a line each."""
    settings, lora = found.settings, config.lora
    for key, mine, theirs in (
        ("rank", lora.rank, settings.get("r")),
        ("alpha", lora.alpha, settings.get("lora_alpha")),
    ):
        if mine != theirs:
            yield f"its {key} is {theirs}, lora.{key} is {mine}: set lora.{key}={theirs}"
    modules = settings.get("target_modules")
    names = sorted(modules) if isinstance(modules, list) else modules
    if lora.target is not None and sorted(lora.target) != names:
        yield f"it adapts {names}, lora.target is {sorted(lora.target)}"
    from peft import LoraConfig

    plain = LoraConfig()
    for key, value in settings.items():
        usual = _PLAIN_STARTS if key == "init_lora_weights" else (getattr(plain, key, None),)
        if key not in _SAME_FORM and value and value not in usual:
            yield f"its {key} is {value!r}, and only plain LoRA is trained here"


def _step(
    found: AdapterSource, paths: RunPaths, config: Config, fingerprint: Mapping[str, Any]
) -> int | None:
    """The step up to which the adapter is this very training; None where it is another.

    Raises:
        RequestError: it is but for its warm-up, which `auto` makes longer where training is longer.
    """
    marker = read_marker(found.folder) or {}
    theirs = marker.get("fingerprint")
    if found.run is None or not isinstance(theirs, dict) or config.train.schedule != "constant":
        return None
    if _without_length(theirs) != _without_length(fingerprint):
        return None
    first = type(config.train)(**theirs["train"])
    before = first.warmup(_plan(paths, config, first).steps)
    warm = config.train.warmup(_plan(paths, config, config.train).steps)
    if warm != before and config.train.warmup_steps == "auto":
        raise RequestError(
            f"{found.name} was warmed up for {before} steps, and train.warmup_steps auto is {warm} "
            f"for this longer training: set train.warmup_steps={before} to go on from its step, "
            f"or {warm} to begin with its weights"
        )
    if warm != before:
        return None
    step = int(marker.get("step") or 0)
    return step if not damaged_files(found.run.checkpoint(step)) else None


def _plan(paths: RunPaths, config: Config, train: TrainConfig) -> DataPlan:
    """The steps of a training of this run's rows that is as long as `train` says."""
    import pyarrow.parquet as pq

    rows = pq.read_metadata(paths.split("train")).num_rows
    return DataPlan(rows, config.train.global_batch, train.epochs, config.seed, train.max_steps)


def _without_length(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two trainings one but for their length; the card is none of it."""
    train = fingerprint.get("train") or {}
    same = {key: fingerprint.get(key) for key in ("seed", "model", "lora", "data")}
    return {**same, "train": {k: v for k, v in train.items() if k not in LENGTH}}


def _take_checkpoint(
    found: AdapterSource, paths: RunPaths, config: Config, fingerprint: dict[str, Any]
) -> None:
    from yelp_hpc.training.checkpoint import CheckpointStore, read_checkpoint

    assert found.run is not None
    step = int(fingerprint["from"]["continued"])
    train, plan = config.train, _plan(paths, config, config.train)
    if plan.steps <= step:
        raise RequestError(
            f"{found.name} was trained for {step} steps in this way already, and train.epochs="
            f"{train.epochs} ends at step {plan.steps}: epochs count from its beginning, raise them"
        )
    snapshot = read_checkpoint(found.run.checkpoint(step))
    state = {**snapshot.state, "fingerprint": fingerprint}
    store = CheckpointStore(paths.checkpoints, train.keep_checkpoints)
    store.save(replace(snapshot, state=state))
