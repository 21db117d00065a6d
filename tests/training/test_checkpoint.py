"""Checkpoints: whole or skipped, the newest good one found, the best kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import damaged_files
from yelp_hpc.rundir.paths import step_of
from yelp_hpc.training.checkpoint import (
    CheckpointStore,
    Snapshot,
    load_adapter,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
)


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.lora_A.weight": torch.randn(4, 8, generator=generator)}
    return Snapshot(step, weights, {"r": 4}, {"a/step": torch.tensor(float(step))}, {"step": step})


def newest(store: CheckpointStore) -> tuple[Path, list[str]]:
    folder, warnings = store.newest()
    assert folder is not None
    return folder, warnings


def steps(store: CheckpointStore) -> list[int | None]:
    return [step_of(path) for path in store.steps()]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_what_is_read_is_what_was_written(store: CheckpointStore) -> None:
    store.save(snapshot(7))
    folder, warnings = newest(store)
    read = read_checkpoint(folder)
    assert (folder.name, warnings, read.step) == ("step-000007", [], 7)
    assert torch.equal(read.adapter["a.lora_A.weight"], snapshot(7).adapter["a.lora_A.weight"])
    assert read.optimizer["a/step"].item() == 7
    assert (read.state, read.adapter_config) == ({"step": 7}, {"r": 4})


def test_the_last_ones_and_the_best_are_kept(store: CheckpointStore) -> None:
    store.best_step = 10
    for step in (10, 20, 30, 40):
        store.save(snapshot(step), background=True)
    store.wait()
    assert steps(store) == [10, 30, 40]
    assert not list(store.folder.glob(".*"))


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "complete.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_one_is_skipped_and_the_next_older_used(
    store: CheckpointStore, name: str, damage: str
) -> None:
    for step in (1, 2):
        store.save(snapshot(step))
    path = store.folder / "step-000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    folder, warnings = newest(store)
    assert folder.name == "step-000001"
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    # The damaged one does not count among those kept, and is replaced by a good one.
    store.save(snapshot(2))
    assert steps(store) == [1, 2]
    assert not damaged_files(store.folder / "step-000002")


def test_a_torn_write_leaves_nothing_to_find(store: CheckpointStore) -> None:
    store.save(snapshot(1))
    torn = store.folder / ".step-000002.99.tmp"
    shutil.copytree(store.folder / "step-000001", torn)
    assert newest(store)[0].name == "step-000001"
    store.sweep()
    assert not torn.exists()


def test_nothing_is_found_in_nothing(store: CheckpointStore) -> None:
    assert store.newest() == (None, [])


def test_a_failed_write_in_the_background_is_raised(store: CheckpointStore) -> None:
    store.folder.parent.mkdir(exist_ok=True)
    store.folder.write_text("a file where the folder should be")
    store.save(snapshot(1), background=True)
    with pytest.raises(StageError, match="cannot write"):
        store.wait()


def test_the_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def parameters() -> Any:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]

    def step(optimizer: Any, tensors: Any, number: Any) -> None:
        for i, parameter in enumerate(tensors):
            generator = torch.Generator().manual_seed(10 * number + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    straight, names = parameters(), ["a", "b"]
    optimizer = torch.optim.AdamW(straight, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    for number in range(3):
        step(optimizer, straight, number)
    tensors, groups = optimizer_tensors(optimizer, names)
    groups = json.loads(json.dumps(groups))  # as state.json holds them
    resumed = parameters()
    other = torch.optim.AdamW(resumed, lr=9.0)
    load_adapter(dict(zip(names, resumed, strict=True)), dict(zip(names, straight, strict=True)))
    load_optimizer(other, names, tensors, groups)
    for number in range(3, 6):
        step(optimizer, straight, number)
        step(other, resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize(
    "adapter", [{}, {"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(1)}]
)
def test_another_adapter_is_refused(adapter: Any) -> None:
    with pytest.raises(StageError, match="another adapter's"):
        load_adapter({"a": torch.nn.Parameter(torch.ones(2))}, adapter)
