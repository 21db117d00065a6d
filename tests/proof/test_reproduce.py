"""A run of the real stages, reproduced from its run.json, gives the same adapter and answers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.tiny import HEAD, TAIL, make_model, reviews
from yelp_hpc.config import LoadedConfig, config_from_dict
from yelp_hpc.proof.reproduce import compare, reproduce
from yelp_hpc.proof.verify import verify
from yelp_hpc.rundir.manifest import load_run, record_run
from yelp_hpc.rundir.paths import RunPaths


def go_through(run_dir: Path) -> RunPaths:
    from yelp_hpc.stages import collect, infer, prepare, train

    run, config = load_run(run_dir)
    prepare.run(run, config)
    train.run(run, config)
    for model in config.infer.models:
        infer.run(run, config, model=model)
    collect.run(run, config)
    return run


@pytest.mark.timeout(300)
def test_a_reproduction_is_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = make_model(tmp_path / "model")
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(reviews(100))
    values = {
        "model": {"path": str(model)},
        "data": {
            "source": "file",
            "train": str(tmp_path / "reviews.csv"),
            "test_rows": 20,
            "validation_share": 0.1,
        },
        "prompt": {"template": HEAD + "{review}" + TAIL + "{label}"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"learning_rate": 5e-3, "warmup_steps": 2, "global_batch": 8, "max_steps": 4},
        "infer": {"shards": 2},
    }
    record_run(tmp_path / "first", LoadedConfig(config_from_dict(values), values, {}), "x.yaml", [])
    first = go_through(tmp_path / "first")
    assert verify(first) == []
    made = reproduce(first.run_json, tmp_path / "second")
    second = go_through(made.run.root)
    found = compare(first, second)
    assert found.differences == []
    assert found.missing == []
    assert found.identical
    assert any("adapter_model.safetensors" in line for line in found.same)
    assert "predictions of the tuned model: all 20 rows" in found.same
