"""Starts of jobs: one reader, so that the status, the report and the card say the same."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fabricated import make_run
from yelp_hpc.config import Config
from yelp_hpc.evaluation.across.compared import cost
from yelp_hpc.forecast.happened import what_happened
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.status import show_status
from yelp_hpc.jobs.supervisor import _begin
from yelp_hpc.rundir import attempts, modes
from yelp_hpc.rundir.attempts import Attempt
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages.collect import collect
from yelp_hpc.stages.publish import gpu_hours

START = 1_700_000_000.0
SENTENCE = "GPU-hours: 3.50 used, 1.00 of them lost to interruptions"


@pytest.fixture
def killed_once(tmp_path: Path) -> tuple[RunPaths, Config]:
    """A start on two GPUs that was killed after an hour, half of which had been saved."""
    run, config = make_run(tmp_path)
    for path in run.attempts.glob("*/*.json"):
        path.unlink()
    killed = Attempt("train", "7", 0, gpus=2, started=START)
    attempts.write(run, killed)
    os.utime(killed.path(run), (START + 3600, START + 3600))
    kept = run.checkpoints / "step-000010" / "state.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    for path in run.train.rglob("*"):
        os.utime(path, (START + 1800, START + 1800))
    return run, config


def test_a_killed_and_a_good_start_cost_the_same_everywhere(
    killed_once: tuple[RunPaths, Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, config = killed_once
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted again, as another job
    cluster = ClusterConfig.model_validate({"train": {"gpus": 2}})
    good = _begin(run, cluster, Job("train"), (("train/x", 1, int((START + 1800) * 1e9)),))
    good.started, good.ended, good.verdict = START + 7200, START + 7200 + 2700, "done"
    attempts.write(run, good)
    show_status(run.root)
    assert SENTENCE in capsys.readouterr().out
    show_status(run.root, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["gpu_hours"] == pytest.approx({"used": 3.5, "lost": 1.0})
    collect(run, config)
    assert SENTENCE in run.report.read_text()
    assert str(gpu_hours(run)) == SENTENCE


def test_of_several_nodes_the_leader_alone_counts_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cluster = RunPaths(tmp_path), ClusterConfig()
    for name, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_JOB_ID", "8")):
        monkeypatch.setenv(name, value)
    attempts.write(run, _begin(run, cluster, Job("train"), ()))
    monkeypatch.setenv("SLURM_PROCID", "1")  # a node that looks when the leader's record is there
    assert _begin(run, cluster, Job("train"), ()).stalled == 1
    (leader,) = attempts.read(run, "train")
    assert (leader.verdict, leader.ended) == ("", None)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert _begin(run, cluster, Job("train"), ()).stalled == 2


@pytest.mark.parametrize(("settings", "gpus"), [({"train": {"gpus": 4}}, 8), ({}, 6)])
def test_gpus_that_are_asked_for_in_other_words_are_counted_as_slurm_gave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], gpus: int
) -> None:
    given = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "8", "SLURM_JOB_NUM_NODES": "2"}
    for name, value in {**given, "SLURM_GPUS_ON_NODE": "3"}.items():
        monkeypatch.setenv(name, value)
    cluster = ClusterConfig.model_validate(settings)
    assert _begin(RunPaths(tmp_path), cluster, Job("train"), ()).gpus == gpus
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert _begin(RunPaths(tmp_path), ClusterConfig(), Job("prepare"), ()).gpus == 0


def test_a_clock_that_is_behind_takes_no_time_away(tmp_path: Path) -> None:
    """A heartbeat is the file server's time, the start the node's; a node's may be set back."""
    run, config = make_run(tmp_path)
    before = cost(run)
    behind = Attempt("train", "300", 0, gpus=4, started=START)
    attempts.write(run, behind)
    os.utime(behind.path(run), (START - 250, START - 250))
    attempts.write(run, Attempt("infer-base", "301", 0, gpus=1, started=START, ended=START - 99))
    assert cost(run) == before
    assert what_happened(run, config).train_seconds == 1800 + 1380
    collect(run, config)
    assert "-250" not in run.report.read_text() and "-99" not in run.report.read_text()


def test_a_process_number_that_comes_again_is_no_other_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cluster = RunPaths(tmp_path), ClusterConfig()
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "37")  # in a container it may be the same each time
    for verdict, stalled in (("failed", 1), ("again", 1), ("again", 2), ("stopped", 3), ("", 1)):
        start = _begin(run, cluster, Job("train"), ())
        assert start.stalled == stalled
        start.verdict, start.ended = verdict, start.started
        attempts.write(run, start)


def test_a_start_that_still_beats_is_not_taken_for_dead(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    now = time.time()
    for task, age in (((0, 1), 5.0), ((2,), 500.0), ((3,), 500.0)):
        start = Attempt("infer-base", f"9_{task[0]}", 0, task, started=now - 1000)
        attempts.write(run, start)
        os.utime(start.path(run), (now - age, now - age))
    dead = attempts.killed(run, "infer-base", "10", (1, 2))
    assert [attempt.task for attempt in dead] == [(2,)]
    assert [a.job for a in attempts.killed(run, "infer-base", "9_0", (0, 1))] == ["9_0"]


def test_shards_are_text_in_the_file_and_numbers_in_memory(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    attempts.write(run, Attempt("infer-base", "9_0", 0, (0, 1, 12)))
    (path,) = run.attempts.glob("*/*.json")
    assert json.loads(path.read_text())["shards"] == "0-1,12"
    (back,) = attempts.read(run, "infer-base")
    assert back.task == (0, 1, 12)
    path.write_text(path.read_text().replace("0-1,12", "0,x"))
    assert attempts.of_run(run) == []


def test_a_file_server_that_was_away_is_asked_again_and_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mine = RunPaths(tmp_path), Attempt("train", "7", 0)
    attempts.write(run, mine)
    attempts.write(run, Attempt("train", "7", 1))
    glob, stale = Path.glob, [2]

    def away(self: Path, pattern: str, **how: Any) -> Iterator[Path]:
        stale[0] -= 1
        if stale[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return glob(self, pattern, **how)

    monkeypatch.setattr(Path, "glob", away)
    assert len(attempts.read(run, "train")) == 2
    newer = attempts.newer(run, mine)
    assert newer and newer.restart == 1
    monkeypatch.setattr(modes, "SERVER_SECONDS", 0.0)
    stale[0] = 99
    assert attempts.newer(run, mine) is None
    with pytest.raises(OSError, match="Stale file handle") as refused:
        attempts.read(run, "train")
    assert "run the same command again" in modes.unreachable(refused.value)
    with pytest.raises(FileNotFoundError):
        modes.unreachable(FileNotFoundError(errno.ENOENT, "no such file", "x"))


def test_who_looks_at_the_same_time_or_cannot_write_sees_a_start_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mine = RunPaths(tmp_path), Attempt("train", "7", 0)
    attempts.write(run, mine)
    seen: list[bool] = []

    def look() -> None:
        seen.extend(attempts.beating(run, "train", "7") for _ in range(100))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 400 and all(seen)
    assert [path.name for path in mine.path(run).parent.iterdir()] == ["7-0.json"]

    def full(self: Path, *args: Any, **how: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "touch", full)
    assert attempts.beating(run, "train", "7")
    os.utime(mine.path(run), (1.0, 1.0))
    assert not attempts.beating(run, "train", "7")
