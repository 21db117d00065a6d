"""Trackers: one run of each for one run directory, from the log alone, and no package is a must."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from yelp_hpc.cli.main import main
from yelp_hpc.config import config_from_dict, load_config
from yelp_hpc.errors import RequestError
from yelp_hpc.jobs.train import write_trackers
from yelp_hpc.rundir.manifest import record_run
from yelp_hpc.rundir.paths import TRACKERS, RunPaths
from yelp_hpc.training.trackers import PACKAGES, missing, scalars, track

CONFIG = config_from_dict({"model": {"path": "x"}, "data": {"source": "demo"}})


def log_to(run: RunPaths, steps: int) -> None:
    run.train.mkdir(parents=True, exist_ok=True)
    with run.train_log.open("w", encoding="utf-8") as log:
        for step in range(1, steps + 1):
            line = {"step": step, "loss": 2.0 / step, "learning_rate": 1e-4}
            log.write(json.dumps(line | ({"validation_loss": 1.0} if step % 5 == 0 else {})) + "\n")


def shown(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def test_tensorboard_shows_each_step_once_however_often_it_is_written(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    for steps in (7, 12):  # a requeue between them
        log_to(run, steps)
        said = list(track(run, CONFIG, ["tensorboard"]))
        assert f"{steps} steps" in said[0] and "tensorboard --logdir" in said[0]
    assert len(list(run.tracker("tensorboard").iterdir())) == 1
    board = shown(run.tracker("tensorboard"))
    loss = board.Scalars("train/loss")
    assert [e.step for e in loss] == list(range(1, 13))
    assert [e.value for e in loss] == pytest.approx([2.0 / s for s in range(1, 13)])
    assert [e.step for e in board.Scalars("train/validation_loss")] == [5, 10]


def test_the_log_is_read_as_numbers_by_step() -> None:
    log: list[dict[str, Any]] = [
        {"step": 2, "loss": 1, "note": "x", "ok": True},
        {"step": 1, "loss": 3.0},
        {"loss": 9.0},
    ]
    assert scalars(log) == [(1, {"train/loss": 3.0}), (2, {"train/loss": 1.0})]


def test_a_package_that_is_not_there_is_named_with_its_command(tmp_path: Path) -> None:
    absent = [n for n in TRACKERS if importlib.util.find_spec(PACKAGES[n][0]) is None]
    assert len(missing(TRACKERS)) == len(absent)
    log_to(RunPaths(tmp_path), 1)
    for name in absent:
        with pytest.raises(RequestError, match=f"-m pip install {PACKAGES[name][1]}"):
            list(track(RunPaths(tmp_path), CONFIG, [name]))
        assert not RunPaths(tmp_path).tracker(name).exists()
    with pytest.raises(RequestError, match="has no step yet"):
        list(track(RunPaths(tmp_path / "empty"), CONFIG, ["tensorboard"]))


def test_the_end_of_a_training_writes_what_the_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("model: {path: x}\ndata: {source: demo}\nname: curves\n")
    run = RunPaths(tmp_path / "run")
    for names in ("[]", "[tensorboard]"):
        record_run("run", load_config("c.yaml", (f"train.trackers={names}",)), "c.yaml", [])
        log_to(run, 3)
        write_trackers(run)
        assert run.tracker("tensorboard").is_dir() == (names != "[]")
    assert [e.step for e in shown(run.tracker("tensorboard")).Scalars("train/loss")] == [1, 2, 3]
    identity = run.tracker("id.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["yelp_hpc", "track", "--run", "run"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and "tensorboard: 3 steps" in capsys.readouterr().out
    assert run.tracker("id.json").read_bytes() == identity  # one run there, for good


def test_the_others_hold_one_run_with_every_step(tmp_path: Path) -> None:
    """Those that are installed; no lock holds them."""
    others = {"wandb", "trackio", "mlflow"}
    run = RunPaths(tmp_path / "run")
    (tmp_path / "c.yaml").write_text("model: {path: x}\ndata: {source: demo}\n")
    record_run(run.root, load_config(tmp_path / "c.yaml"), "c.yaml", [])
    for name in (n for n in others if importlib.util.find_spec(PACKAGES[n][0])):
        for steps in (3, 6):
            log_to(run, steps)
            argv = [sys.executable, "-m", "yelp_hpc", "track", "--run", str(run.root), "--to", name]
            subprocess.run(argv, check=True)  # MLflow's client remembers a store that is gone
        if name == "wandb":
            assert len(list((run.tracker(name) / "wandb").glob("offline-run-*"))) == 1
        elif name == "mlflow":
            (losses,) = run.tracker(name).glob("[0-9]*/*/metrics/train/loss")
            steps_kept = [int(line.split()[2]) for line in losses.read_text().splitlines()]
            assert steps_kept == [*range(1, 7)]
        else:
            assert len(list(run.tracker(name).glob("*.db"))) == 1
    assert {path.name for path in (run.root / "trackers").glob("*/")} <= others
