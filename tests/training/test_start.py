"""train.from: a training goes on from an adapter that exists, and says from which and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_model
from tests.training.test_existing import peft_folder, run_of
from yelp_hpc.config import Config, config_from_dict
from yelp_hpc.errors import RequestError
from yelp_hpc.explain import dotted_keys
from yelp_hpc.rundir.files import read_json, read_jsonl, read_marker, sha256_file, write_json
from yelp_hpc.rundir.origin import foreign_adapter
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, WEIGHTS, RunPaths
from yelp_hpc.stages import train

PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
CONSTANT = {"adapter": None, "schedule": "constant", "warmup_steps": 2, "global_batch": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base")


def trained(root: Path, model: Path, start: object = None, **settings: Any) -> RunPaths:
    run, config = asked(root, model, start, **settings)
    train.run(run, config)
    assert list(foreign_adapter(run, config)) == []
    return run


def asked(
    root: Path, model: Path, start: object = None, **settings: Any
) -> tuple[RunPaths, Config]:
    begin = {} if start is None else {"from": str(start)}
    return run_of(root, model, None, train={**CONSTANT, **begin, **settings})


def test_an_epoch_more_is_two_at_once(tmp_path: Path, model: Path) -> None:
    first = trained(tmp_path / "first", model, epochs=1)
    steps = (read_marker(first.adapter) or {})["step"]
    more = trained(tmp_path / "more", model, first.root, epochs=2)
    once = trained(tmp_path / "once", model, epochs=2)
    assert sha256_file(more.adapter / WEIGHTS) == sha256_file(once.adapter / WEIGHTS)
    assert sha256_file(more.adapter / WEIGHTS) != sha256_file(first.adapter / WEIGHTS)
    assert next(line["step"] for line in read_jsonl(more.train_log)) == steps + 1
    marker = read_marker(more.adapter) or {}
    assert marker["step"] == 2 * steps and marker["fingerprint"]["from"]["continued"] == steps
    theirs = (read_marker(first.adapter) or {})["fingerprint"]
    assert marker["fingerprint"]["from"]["trained"] == theirs
    with pytest.raises(RequestError, match=r"warmed up for 2 steps, and .* auto is 1"):
        trained(tmp_path / "warm", model, first.root, epochs=2, warmup_steps="auto")
    with pytest.raises(RequestError, match="epochs count from its beginning"):
        trained(tmp_path / "again", model, first.root, epochs=1)


def test_another_training_begins_with_the_weights(tmp_path: Path, model: Path) -> None:
    folder = peft_folder(tmp_path / "adapter", model, **PLAIN)
    settings = read_json(folder / ADAPTER_CONFIG)
    # how the base keeps its weights: peft sets it for GPT-2 and its like
    write_json(folder / ADAPTER_CONFIG, {**settings, "fan_in_fan_out": True})
    run = trained(tmp_path / "run", model, folder, max_steps=2)
    fingerprint = (read_marker(run.adapter) or {})["fingerprint"]
    assert fingerprint["from"]["continued"] is None
    assert fingerprint["from"]["sha256"] == sha256_file(folder / WEIGHTS)
    plain = trained(tmp_path / "plain", model, max_steps=2)
    losses = [read_jsonl(one.train_log)[0]["loss"] for one in (run, plain)]
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)  # it does not begin with nothing
    first = trained(tmp_path / "first", model, run.root, schedule="linear", max_steps=2)
    assert (read_marker(first.adapter) or {})["fingerprint"]["from"]["continued"] is None
    (run.start / WEIGHTS).write_bytes(b"altered")
    (run.start / "complete.json").unlink()
    config = asked(tmp_path / "run", model, folder, max_steps=2)[1]
    assert any("training began with" in line for line in foreign_adapter(run, config))


def test_another_form_is_refused(tmp_path: Path, model: Path) -> None:
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True}
    folder = peft_folder(tmp_path / "adapter", model, **settings)
    with pytest.raises(RequestError) as error:
        trained(tmp_path / "run", model, folder)
    assert "set lora.rank=2" in str(error.value) and "use_rslora" in str(error.value)
    other = peft_folder(tmp_path / "b", model, **PLAIN, init_lora_weights="pissa")
    with pytest.raises(RequestError, match="its init_lora_weights is 'pissa'"):
        trained(tmp_path / "run", model, other)  # on a base that it changes
    assert not (tmp_path / "run" / "train" / "checkpoints").exists()


def test_from_is_a_key_like_any_other() -> None:
    values = {"model": {"path": "m"}, "data": {"source": "demo"}, "train": {"from": "runs/a"}}
    config = config_from_dict(values)
    assert config.train.start == "runs/a"
    assert config.model_dump(mode="json")["train"]["from"] == "runs/a"
    assert "train.from" in dotted_keys(Config) and "train.start" not in dotted_keys(Config)
    assert config_from_dict(config.model_dump(mode="json")) == config
    both = {**values, "train": {"from": "a", "adapter": "b"}}
    with pytest.raises(ValueError, match="name one of them"):
        config_from_dict(both)
