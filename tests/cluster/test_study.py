"""A study on the real Slurm, its stages real: struck, it ends as if nobody had been there."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import (
    Cluster,
    copy_run,
    processes,
    read,
    wait_ended,
    wait_for,
    yelp_hpc,
)
from tests.tiny import HEAD, TAIL, make_model, reviews
from yelp_hpc.jobs import slurm as client
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import read_jsonl, sha256_file
from yelp_hpc.rundir.study import Study, read_study

pytestmark = pytest.mark.timeout(2400)


def arguments(top: Path, settings: list[float], seeds: list[int], **train: Any) -> list[str]:
    """What `study` is called with, but for --out; writes the files that it names into `top`."""
    make_model(top / "model")
    with (top / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews(300)])
    config = {
        "model": {"path": str(top / "model")},
        "data": {"source": "file", "train": str(top / "reviews.csv"), "test_rows": 60},
        "prompt": {"template": HEAD + "{review}" + TAIL + "{label}"},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"global_batch": 8, "max_tokens": 256, "save_every_steps": 10, **train},
        "collect": {"bootstrap": 100},
    }
    defaults = {"partition": "cpu", "memory": "500M", "time": "10", "save_seconds": 30}
    cluster = {"defaults": defaults, "array_parallelism": 2, "requeue_cap": 20}
    vary = {"seed": seeds, "train.learning_rate": settings}
    for name, values in {"config": config, "cluster": cluster, "vary": vary}.items():
        (top / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return ["study", str(top / "vary.yaml"), "--config", str(top / "config.yaml")]


def on_slurm(top: Path, asked: list[str]) -> tuple[Study, list[str]]:
    """Submit; the study, and every job id of it and of its runs."""
    yelp_hpc(*asked, "--cluster", str(top / "cluster.yaml"), "--out", str(top / "study"))
    study = read_study(top / "study")
    return study, jobs_of(study)


def jobs_of(study: Study) -> list[str]:
    places = [study.paths, *(study.run(run) for run in study.runs)]
    return [line["job"] for paths in places for line in read_jsonl(paths.submissions)]


def begun(study: Study, name: str) -> list[Path]:
    return list(study.run(name).checkpoints.glob("step-*"))


def test_a_struck_study_ends_with_each_run_as_if_alone(slurm: Cluster, tmp_path: Path) -> None:
    asked = arguments(tmp_path, [5e-3, 1e-3], [1, 2], epochs=6)
    study, jobs = on_slurm(tmp_path, asked)
    trainings = [ln for ln in read_jsonl(study.paths.submissions) if ln["name"] == "train"]
    assert len(trainings) == 1 and len(trainings[0]["tasks"]) == 4  # one array
    array = trainings[0]["job"]
    assert [read_jsonl(study.run(run).submissions)[-3]["job"] for run in study.runs][1:] == [
        f"{array}_{place}" for place in (1, 2, 3)
    ]
    wait_for(partial(begun, study, "01-seed1"), 240, "a checkpoint of the first task")
    slurm.sh("scontrol", "requeue", f"{array}_0")
    wait_for(partial(begun, study, "02-seed1"), 300, "a checkpoint of the third task")
    status = yelp_hpc("status", "--run", str(study.root)).stdout
    assert "4 runs" in status
    again = yelp_hpc(*asked, "--cluster", str(tmp_path / "cluster.yaml"), "--out", str(study.root))
    assert "nothing to" in again.stderr and jobs_of(study) == jobs  # whether it is over or not
    wait_ended(jobs, 900)
    board = read(study.leaderboard)
    assert not board["unfinished"] and [len(trial["runs"]) for trial in board["trials"]] == [2, 2]
    assert len(attempts.read(study.run("01-seed1"), "train")) >= 2
    yelp_hpc("verify", "--run", str(study.root))
    prepared = {sha256_file(study.run(run).split("test")) for run in study.runs}
    assert len(prepared) == 1
    assert [bool(attempts.read(study.run(run), "prepare")) for run in study.runs] == [
        True, False, False, False,
    ]  # fmt: skip
    again = yelp_hpc(*asked, "--cluster", str(tmp_path / "cluster.yaml"), "--out", str(study.root))
    assert "nothing to do" in again.stderr and jobs_of(study) == jobs
    alone = copy_run(study.run("01-seed1").root, tmp_path / "alone")
    yelp_hpc("run", "train", "--run", str(alone))
    name = "train/adapter/adapter_model.safetensors"
    assert sha256_file(alone / name) == sha256_file(study.run("01-seed1").root / name)


@pytest.mark.slow
def test_six_trials_of_two_seeds_under_kills_give_the_leaderboard_of_a_quiet_study(
    slurm: Cluster, tmp_path: Path
) -> None:
    asked = arguments(tmp_path, [5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4], [1, 2], epochs=2)
    study, jobs = on_slurm(tmp_path, asked)
    draw = random.Random(3)
    for round_ in range(12):
        time.sleep(draw.uniform(3, 8))
        live = [row for row in client.queue(jobs) if row.state == "RUNNING"]
        stages = [pid for pid, line in processes() if f"--run {study.root}/" in line]
        if round_ % 2 and live:
            slurm.sh("scontrol", "requeue", draw.choice(live).job)
        elif stages:
            with suppress(ProcessLookupError):
                os.kill(draw.choice(stages), signal.SIGKILL)
    wait_ended(jobs, 1800)
    for _ in range(3):  # what was killed outright has failed: the same command does it again
        again = yelp_hpc(
            *asked, "--cluster", str(tmp_path / "cluster.yaml"), "--out", str(study.root)
        )
        if "nothing to do" in again.stderr:
            break
        wait_ended(jobs_of(study), 1200)
    yelp_hpc("verify", "--run", str(study.root))
    yelp_hpc(*asked, "--executor", "local", "--out", str(tmp_path / "quiet"))
    boards = [read(tmp_path / name / "leaderboard.json") for name in ("study", "quiet")]
    for board in boards:
        for part in (board, *board["trials"]):
            part.pop("cost")
        board.pop("study")
    assert boards[0] == boards[1]
