"""load_run and submit: results as objects, and the command's refusals as exceptions."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas
import pytest

from tests.fabricated import make_run
from tests.tiny import make_model, reviews, tiny_config
from yelp_hpc import load_run, submit
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.stages.collect import collect


def test_a_run_gives_config_metrics_and_predictions(tmp_path: Path) -> None:
    paths, config = make_run(tmp_path / "run", rows=120)
    run = load_run(tmp_path / "run")
    assert run.config == config and run.record["config"]["file"] == "c.yaml"
    assert "no metrics yet" in repr(run)
    with pytest.raises(StageError, match=r"metrics.json is not there yet.*status --run"):
        _ = run.metrics
    metrics = collect(paths, config)
    assert run.metrics["models"] == metrics["models"]
    assert f"tuned {metrics['models']['tuned']['f1']['macro']:.3f}" in repr(run)
    table = run.predictions
    assert table.num_rows == 120
    frame: pandas.DataFrame = table.to_pandas()
    right = (frame["truth"] == frame["tuned_answer"]).mean()
    assert right == pytest.approx(metrics["models"]["tuned"]["accuracy"])
    paths.shard("base", 0, 3).unlink()
    assert run.predictions is table  # read once
    with pytest.raises(StageError, match="shard 0 of 3 missing"):
        _ = load_run(paths.root).predictions
    with pytest.raises(RequestError, match="not a run directory"):
        load_run(tmp_path)


def test_submit_says_what_is_wrong_and_writes_nothing(tmp_path: Path) -> None:
    for wrong in ({"model": {"path": "x"}}, {"nonsense": 1}):
        with pytest.raises(RequestError, match="config cannot be used"):
            submit(wrong, tmp_path / "run", executor="local")
    config = tiny_config(tmp_path / "gone")
    with pytest.raises(RequestError, match=r"gone"):
        submit(config, tmp_path / "run", executor="local")
    with pytest.raises(RequestError, match="one of prepare, train"):
        submit(config, tmp_path / "run", "everything")
    with pytest.raises(RequestError, match="slurm or local"):
        submit(config, tmp_path / "run", executor="cloud")
    assert not list(tmp_path.iterdir())


def test_a_handle_knows_the_state_and_gives_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    model = make_model(tmp_path / "model")
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows(reviews(60))
    config = tiny_config(model, data={"train": str(tmp_path / "reviews.csv")})
    handle = submit(config, tmp_path / "run", "prepare", executor="local")
    assert [job.name for job in handle.jobs] == ["prepare"] and "prepare local-" in repr(handle)
    status = handle.status()
    assert {line.name: line.state for line in status.stages}["prepare"] == "done"
    assert status.state == "absent" and "prepare" in repr(status)
    run = handle.wait().result()
    assert run.config.seed == 42 and run.record["data"]["rows"]["test"] == 10
    again = submit(config.model_dump(mode="json"), tmp_path / "run", "prepare", executor="local")
    assert not again.jobs and "nothing was to be done" in repr(again)
    with pytest.raises(RequestError, match="infer-tuned needs train"):
        submit(config, tmp_path / "run", "infer", executor="local")
