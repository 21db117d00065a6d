"""Training checkpoints: whole or absent, found again at the start, the newest good one used.

Writes and reads `train/checkpoints/step-NNNNNN/`: `adapter_model.safetensors` and
`adapter_config.json` (PEFT loads the folder as it is), `optimizer.safetensors` and `state.json`
(everything that is no tensor), and the marker with the files' hashes. No pickle anywhere.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import (
    atomic_folder,
    damaged_files,
    read_json,
    write_bytes,
    write_json,
    write_marker,
    write_synced,
)
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, ADAPTER_FILES, WEIGHTS, step_of

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
FILES = (*ADAPTER_FILES, OPTIMIZER, STATE)


@dataclass(frozen=True)
class Snapshot:
    """A training state after `step` steps, as CPU copies that nothing changes any more."""

    step: int
    adapter: dict[str, Tensor]
    adapter_config: dict[str, Any]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors of `tensors`; equal tensors give equal bytes."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return save(whole, metadata={"format": "pt"})


def write_adapter(
    folder: Path, adapter: Mapping[str, Tensor], config: dict[str, Any], **extra: Any
) -> None:
    """Write a PEFT adapter into `folder` with its marker; `extra` goes into the marker."""
    write_json(folder / ADAPTER_CONFIG, config)
    write_bytes(folder / WEIGHTS, tensor_bytes(adapter))
    write_marker(folder, list(ADAPTER_FILES), **extra)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimizer's state as named tensors `NAME/KEY` and its parameter groups without them.

    `names`: the parameters' names in the order in which the optimizer was given them.
    """
    state = optimizer.state_dict()
    tensors = {
        f"{names[index]}/{key}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    return tensors, state["param_groups"]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: list[str],
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Undo `optimizer_tensors`."""
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(index[name], {})[entry] = tensor
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_adapter(parameters: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
    """Copy `adapter` into the model's `parameters` and check that each now equals what was read.

    Raises:
        StageError: a tensor is missing, is not the model's or has another shape or value.
    """
    if set(parameters) != set(adapter):
        odd = sorted(set(parameters) ^ set(adapter))
        raise StageError(f"the checkpoint is another adapter's: {', '.join(odd[:5])} do not match")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != adapter[name].shape:
                raise StageError(
                    f"the checkpoint is another adapter's: {name} is {tuple(adapter[name].shape)}, "
                    f"the model's is {tuple(parameter.shape)}"
                )
            parameter.copy_(adapter[name])
            if not torch.equal(parameter.cpu(), adapter[name].to(parameter.dtype)):
                raise StageError(f"{name} was not restored from the checkpoint")


def read_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint that `CheckpointStore.newest` found whole."""
    return Snapshot(
        step=int(step_of(folder) or 0),
        adapter=load((folder / WEIGHTS).read_bytes()),
        adapter_config=read_json(folder / ADAPTER_CONFIG),
        optimizer=load((folder / OPTIMIZER).read_bytes()),
        state=read_json(folder / STATE),
    )


@dataclass
class CheckpointStore:
    """The checkpoints of one run; one process (rank 0) writes."""

    folder: Path
    keep: int
    best_step: int | None = None
    damaged: set[Path] = field(default_factory=set)
    seconds: float = 0.0
    """Wall time of the last write."""
    _writer: threading.Thread | None = None
    _failure: BaseException | None = None

    def steps(self) -> list[Path]:
        """Every checkpoint folder, oldest first, whole or not."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if step_of(path) is not None]
        return sorted(found, key=lambda path: step_of(path) or 0)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint and a warning for each newer one that is damaged."""
        warnings: list[str] = []
        for folder in reversed(self.steps()):
            problems = damaged_files(folder)
            if not problems:
                return folder, warnings
            self.damaged.add(folder)
            warnings.append(f"checkpoint {folder} is damaged and skipped: {problems[0]}")
        return None, warnings

    def sweep(self) -> None:
        """Remove what a killed write left behind."""
        if self.folder.is_dir():
            for path in self.folder.glob(".*step-*.tmp"):
                shutil.rmtree(path, ignore_errors=True)

    def save(self, snapshot: Snapshot, *, background: bool = False) -> None:
        """Write a checkpoint, then remove those no longer kept.

        In the background the caller goes on at once; a failed write is raised by the next call.

        Raises:
            StageError: this or the previous background write failed.
        """
        self.wait()
        if not background:
            self._write(snapshot)
            return

        def work() -> None:
            try:
                self._write(snapshot)
            except BaseException as error:
                self._failure = error

        self._writer = threading.Thread(target=work, name="checkpoint-writer")
        self._writer.start()

    def wait(self) -> None:
        """Wait for a write in the background.

        Raises:
            StageError: it failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        target = self.folder / f"step-{snapshot.step:06d}"
        # what stands there is damaged, or of the same step: either way this one is as good
        with atomic_folder(target) as temporary:
            write_synced(temporary / ADAPTER_CONFIG, _json_bytes(snapshot.adapter_config))
            write_synced(temporary / WEIGHTS, tensor_bytes(snapshot.adapter))
            write_synced(temporary / OPTIMIZER, tensor_bytes(snapshot.optimizer))
            write_synced(temporary / STATE, _json_bytes(snapshot.state))
            write_marker(temporary, list(FILES), step=snapshot.step)
        self.sweep()
        self.damaged.discard(target)
        self._prune()
        self.seconds = time.monotonic() - started

    def _prune(self) -> None:
        """Keep the newest `keep` and the best; damaged ones are not worth keeping."""
        good = [path for path in self.steps() if path not in self.damaged]
        for path in [*self.damaged, *good[: -self.keep]]:
            if path in self.damaged or step_of(path) != self.best_step:
                doomed = path.with_name(f".{path.name}.tmp")  # never a half one under its name
                with suppress(OSError):
                    path.rename(doomed)
                    shutil.rmtree(doomed)
        self.damaged.clear()


def _json_bytes(value: Any) -> bytes:
    # in the order in which it was made: what is read back is written as it would have been
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
