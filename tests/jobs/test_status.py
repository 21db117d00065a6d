"""The table of states, from facts as data, and the parsing of Slurm's output."""

from __future__ import annotations

import pytest

from yelp_hpc.config import Config
from yelp_hpc.jobs.slurm import Row, parse_accounting, parse_queue, reason_in_words
from yelp_hpc.jobs.status import Facts, render, summarise, total_steps
from yelp_hpc.rundir.attempts import Attempt, gpu_hours

SUBMITTED = {"job": "7", "executor": "slurm"}


def attempt(verdict: str, job: str = "7", **fields: object) -> Attempt:
    values = {"ended": 50.0, "started": 10.0, "gpus": 2, **fields}
    return Attempt("train", job, verdict=verdict, **{"restart": 0, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "state", "words"),
    [
        ({"done": True, "rows": (Row("7", "RUNNING"),)}, "done", ""),  # the marker wins
        ({"rows": (Row("7", "RUNNING"),), "attempts": (attempt("failed"),)}, "running", ""),
        ({"rows": (Row("7", "PENDING", "Resources"),)}, "waiting", "nodes to become free"),
        ({"rows": (Row("7", "PENDING", "BeginTime"),)}, "waiting", "requeued"),
        ({"attempts": (attempt("failed", reason="exit 1\nlog"),)}, "failed", "exit 1"),
        ({"accounting": (Row("7", "CANCELLED"),)}, "cancelled", "submit it again"),
        ({"accounting": (Row("7", "TIMEOUT"),)}, "failed", "raise save_seconds"),
        ({"attempts": (attempt("lost"),)}, "stopped", "submit it again"),
        ({"submission": None}, "absent", "not submitted"),
        ({}, "unknown", "no trace"),
    ],
)
def test_state(facts: dict[str, object], state: str, words: str) -> None:
    base = {"name": "train", "stage": "train", "done": False, "submission": SUBMITTED}
    (line,) = summarise([Facts(**{**base, **facts})])  # type: ignore[arg-type]
    assert line.state == state
    assert words in line.detail


def shard(state: str, done: int, speed: float) -> dict[str, object]:
    return {"state": state, "rows": 100, "done": done, "rows_per_second": speed}


def test_shards_and_training_are_counted() -> None:
    rows = (Row("7_1", "RUNNING", node="g1"), Row("7_2", "PENDING", "JobArrayTaskLimit"))
    tried = (attempt("failed", "7_0", task=(0,)), attempt("done", "7_3", task=(3,)))
    told = {
        0: shard("saved", 10, 9.0),
        1: shard("running", 40, 25.0),
        3: shard("complete", 100, 30.0),
    }
    infer = Facts(
        "infer-base", "infer", False, SUBMITTED, False, rows, (), tried, 4, frozenset({3}), told
    )
    log = {"step": 30, "epoch": 0.5, "loss": 1.25, "tokens_per_second": 900.0, "eta_seconds": 61}
    train = Facts(
        "train", "train", False, SUBMITTED, rows=(Row("7", "RUNNING"),), training=log, steps=60
    )
    first, second = summarise([infer, train])
    assert first.shards == {"done": 1, "running": 1, "failed": 1, "all": 4}
    assert first.detail == "1/4 shards, 1 running, 1 failed, 150/400 rows, 25.0 rows/s, ETA 0:00:10"
    assert first.rows["eta_seconds"] == 10.0
    assert second.detail == "step 30/60, loss 1.2500, 900 tokens/s, ETA 0:01:01"
    text = render([first, second], "the controller does not answer")
    assert "1/4 shards" in text
    assert "Slurm did not answer" in text


def test_steps_of_the_whole_training() -> None:
    config = Config.model_validate(
        {"model": {"path": "x"}, "data": {"source": "demo"}, "train": {"epochs": 3}}
    )
    assert total_steps({"step": 30, "epoch": 0.5}, config) == 180


def test_gpu_hours_count_used_and_lost() -> None:
    tried = [attempt("lost", ended=1810.0, lost=900.0), attempt("done", ended=1810.0)]
    assert gpu_hours(tried) == pytest.approx((2.0, 0.5))


def test_squeue_and_sacct_are_read() -> None:
    text = (
        "7_3              |RUNNING|None|g1|1:02|10:00|2|\n8|PENDING|(Priority)||0:00|1:00|0|\n"
        "9|COMPLETED|None|g1|0:01|1:00|0|\n"
    )
    rows = parse_queue(text)
    assert rows[0] == Row("7_3", "RUNNING", "None", "g1", "1:02", "10:00", 2)
    assert [row.job for row in rows] == ["7_3", "8"]
    assert "ahead" in reason_in_words(rows[1].reason)
    (row,) = parse_accounting("7_[4-9]|PENDING|None|0|1\n7_1|CANCELLED by 0|g1|00:01:00|00:10:00\n")
    assert (row.job, row.state, row.node) == ("7_1", "CANCELLED", "g1")
