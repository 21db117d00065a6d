"""The table of states, from facts as data, and the parsing of Slurm's output."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fabricated import make_run
from yelp_hpc.jobs.site.reasons import reason_in_words
from yelp_hpc.jobs.slurm import Row, parse_accounting, parse_queue
from yelp_hpc.jobs.status import JobStatus, collect_status, render, summarise
from yelp_hpc.jobs.watch.facts import Facts, gather
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt, GpuHours, gpu_hours
from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.paths import RunPaths

ROOT = Path(__file__).parents[2]
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
    assert [row.job for row in rows if row.live] == ["7_3", "8"]
    assert "ahead" in reason_in_words(rows[1].reason)
    (row,) = parse_accounting("7_[4-9]|PENDING|None|0|1\n7_1|CANCELLED by 0|g1|00:01:00|00:10:00\n")
    assert (row.job, row.state, row.node) == ("7_1", "CANCELLED", "g1")


def of(line: str, name: str = "infer-base", **facts: object) -> JobStatus:
    stage = name.partition("-")[0]
    base = {"name": name, "stage": stage, "done": False, "submission": SUBMITTED}
    (found,) = summarise([Facts(**{**base, **facts})])  # type: ignore[arg-type]
    assert f"{found.state}: {found.detail}" == line
    return found


def test_what_is_said_of_each_state() -> None:
    """Whole lines: what a user reads is the product."""
    again = "interrupted; submit it again to go on"
    for verdict in ("stopped", "lost", ""):
        of(f"stopped: {again}", "train", attempts=(attempt(verdict),))
    full = attempt("stopped", reason="the disk is full; submit again when there is room\nlog\nend")
    of("stopped: the disk is full; submit again when there is room", "train", attempts=(full,))
    of(f"stopped: {again}", "train", attempts=(full, attempt("stopped", reason="saved", task=(1,))))
    of(f"stopped: {again}", "train", attempts=(attempt("lost", reason="submit again"),))
    of("running: suspended by Slurm", "train", rows=(Row("7", "SUSPENDED"), Row("8", "PENDING")))
    of("running: ", "train", rows=(Row("7_1", "SUSPENDED"), Row("7_2", "RUNNING")))
    of("waiting: submitted; squeue does not show it yet", "train", unseen=True)
    of(
        "running: squeue does not show it",
        "train",
        unseen=True,
        attempts=(attempt("", ended=None),),
    )
    waits = "Slurm did not run it again: submit it again to go on"
    of(f"stopped: saved after SIGUSR2; {waits}", "train", accounting=(Row("7", "TIMEOUT"),),
       attempts=(attempt("requeued", reason="saved after SIGUSR2"),))  # fmt: skip
    of("failed: it never began: no such file", "train", said="no such file")
    of("failed: Slurm says FAILED: no such file", "train", said="no such file",
       accounting=(Row("7", "FAILED"),))  # fmt: skip
    of(f"stopped: {again}", "train", attempts=(attempt("stopped", reason="saved"),),
       accounting=(Row("7", "FAILED"),))  # fmt: skip
    cancelled = {**SUBMITTED, "cancelled": True}
    of("cancelled: cancelled; submit it again to go on", "train", submission=cancelled)
    for state, words in {
        "TIMEOUT": "the time limit came before it had saved: raise save_seconds",
        "NODE_FAIL": "the node died and the job was not requeued",
        "FAILED": "it failed before its supervisor could say why: see `logs`",
    }.items():
        of(f"failed: Slurm says {state}: {words}", "train", accounting=(Row("7", state),))
    of("unknown: submitted, but Slurm has no trace of it", "train", attempts=(attempt("done"),))
    of("absent: not submitted", "train", submission=None)
    of("running: ", "train", alive=True)
    of("running: ", "train", rows=(Row("7", "COMPLETING"),))
    of("waiting: waits for an earlier stage", "train", rows=(Row("7", "PENDING", "Dependency"),))
    gone = "cancelled; submit it again to go on"
    of(f"cancelled: {gone}", "train", accounting=(Row("7", "CANCELLED"), Row("7", "FAILED")))
    for state in ("COMPLETED", "PENDING", "RUNNING", "REQUEUED"):
        unknown = "unknown: submitted, but Slurm has no trace of it"
        of(unknown, "train", accounting=(Row("7", state),))
    of("failed: Slurm says OUT_OF_MEMORY: raise memory", "train",
       accounting=(Row("7_1", "COMPLETED"), Row("7_2", "OUT_OF_MEMORY")))  # fmt: skip
    of("failed: Slurm says ODD: see `logs`", "train", accounting=(Row("7", "ODD"),))
    tried = (attempt("failed", reason="first"), attempt("failed", reason="second\nlog"))
    of("failed: second", "train", attempts=tried)
    partial = of("partial: 2/3 shards, submit infer to do the rest", shards=3,
                 shards_done=frozenset({0, 2}))  # fmt: skip
    assert partial.shards == {"done": 2, "running": 0, "failed": 0, "all": 3}
    whole = of("done: 3/3 shards", done=True, shards=3, shards_done=frozenset({0, 1, 2}))
    assert whole.rows == {}


def test_a_shard_that_was_done_after_all_has_not_failed() -> None:
    tried = (attempt("failed", "7_0", task=(0,)), attempt("failed", "7_1", task=(1, 2)))
    line = "failed: 1/3 shards, 2 failed"
    found = of(line, attempts=tried, shards=3, shards_done=frozenset({0}))
    assert found.shards["failed"] == 2
    # a task of two shards, one of them done, is not done; nor is a shard that failed twice two
    again = (*tried, attempt("failed", "8", task=(1,)))
    of("failed: 2/3 shards, 1 failed", attempts=again, shards=3, shards_done=frozenset({0, 2}))


def test_a_line_is_put_together_from_what_runs_what_was_and_what_is_left() -> None:
    log = {"step": 30, "loss": 1.25, "tokens_per_second": 0, "eta_seconds": 0}
    rows = (Row("7", "RUNNING", "None", "g1", "1:02", "10:00", 2),)
    mine = attempt("", job="7", restart=3, ended=None, node="g7")
    running = of("running: step 30/?, loss 1.2500, ETA 0:00:00", "train", rows=rows,
                 training=log, attempts=(mine,))  # fmt: skip
    assert (running.job, running.node, running.elapsed, running.limit) == (
        "7",
        "g1",
        "1:02",
        "10:00",
    )
    assert (running.restarts, running.training) == (3, log)
    words = "step 30/60, loss 1.2500, ETA 0:00:00; interrupted; submit it again to go on"
    over = of(f"stopped: {words}", "train", steps=60, training=log,
              attempts=(attempt("lost", "6", node="g1"),
                        attempt("lost", node="g2", started=10.0, ended=75.0)))  # fmt: skip
    assert (over.node, over.elapsed, over.limit, over.restarts) == ("g2", "0:01:05", "", 0)
    queued = Row("7_0", "PENDING", node="g1", elapsed="0:00")
    runs = Row("7_1", "RUNNING", node="g2", elapsed="0:09")
    both = of("running: ", "train", rows=(queued, runs))
    assert (both.node, both.elapsed) == ("g2", "0:09")  # of those, one that runs
    assert over.gpu_hours == round(2 * (40 + 65) / 3600, 3) > 0
    lost = of("stopped: interrupted; submit it again to go on", "train",
              attempts=(attempt("lost", lost=20.0),))  # fmt: skip
    assert (lost.gpu_hours, lost.gpu_hours_lost) == (0.022, 0.011)
    assert of("done: ", "train", done=True, training=log, steps=60).training == log
    nothing = of("unknown: submitted, but Slurm has no trace of it", "train")
    assert (nothing.node, nothing.elapsed, nothing.limit, nothing.restarts) == ("", "", "", 0)
    told = of("failed: Slurm says BOOT_FAIL: the node did not start", "train",
              accounting=(Row("7", "BOOT_FAIL", "", "g3", "0:07", "1:00"),))  # fmt: skip
    assert (told.node, told.elapsed, told.limit) == ("g3", "0:07", "1:00")
    assert of("absent: not submitted", "train", submission=None).job == ""
    slow = of("running: 0/2 shards, 1 running, 5/20 rows", shards=2,
              rows=(Row("7_0", "RUNNING"),), shards_progress={0: {**shard("running", 5, 0.0),
              "rows": 10}})  # fmt: skip
    assert slow.rows == {"done": 5, "all": 20, "rows_per_second": 0.0, "eta_seconds": None}
    third = of("running: 0/2 shards, 1 running, 5/20 rows, 0.3 rows/s, ETA 0:00:45", shards=2,
               rows=(Row("7_0", "RUNNING"),), shards_progress={0: {**shard("running", 5, 1 / 3),
               "rows": 10}})  # fmt: skip
    assert third.rows == {"done": 5, "all": 20, "rows_per_second": 0.333, "eta_seconds": 45.0}
    of("running: 0/2 shards, 1 running", shards=2, rows=(Row("7_0", "RUNNING"),))


def by_stage(run: RunPaths) -> dict[str, JobStatus]:
    lines, _ = collect_status(run.root, load_run(run.root)[1])
    return {line.name: line for line in lines}


def test_steps_of_the_whole_training_are_those_of_its_rows(tmp_path: Path) -> None:
    """The log's epoch has four decimals: 1/4700 of one is 0.0002, and would be 5,000 steps."""
    run, _ = make_run(tmp_path)
    record = read_json(run.run_json)
    record["data"] = {"rows": {"train": 150_400}}
    record["config"]["resolved"]["train"] |= {"global_batch": 32, "epochs": 2}
    write_json(run.run_json, record)
    run.train_log.write_text(json.dumps({"step": 1, "epoch": 0.0002, "loss": 1.0}) + "\n")
    assert by_stage(run)["train"].detail.startswith("step 1/9400, loss 1.0000")
    record["config"]["resolved"]["train"]["max_steps"] = 100
    write_json(run.run_json, record)
    assert by_stage(run)["train"].detail.startswith("step 1/100,")


def test_rates_and_rows_are_those_of_shards_that_are_worked_at(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, shards=4)
    for number, state, done, identity in (
        (0, "complete", 100, "of other settings"),
        (1, "running", 40, ""),
        (2, "running", 40, ""),
    ):
        said = {**shard(state, done, 10.0), "identity": identity}
        write_json(run.shard_progress("base", number, 4), said)
    for number in (1, 2):
        run.shard("base", number, 4).unlink()
        start = Attempt("infer-base", f"9_{number}", 0, (number,), started=time.time() - 900)
        attempts.write(run, start)
    dead = start.path(run)
    os.utime(dead, (time.time() - 600, time.time() - 600))
    line = by_stage(run)["infer-base"]
    assert line.shards["done"] == 1  # of the two files one is of other settings
    (facts,) = (f for f in gather(run.root, load_run(run.root)[1])[0] if f.name == "infer-base")
    (told,) = summarise([replace(facts, rows=(Row("9_1", "RUNNING"),))])
    assert told.rows == {"done": 80, "all": 400, "rows_per_second": 10.0, "eta_seconds": 32.0}


LINES = [
    JobStatus("prepare", "done", "6", "c1", "0:12", "10:00"),
    JobStatus("train", "running", "123456", "node-with-a-long-name-7", "1:02:03", "8:00:00", 1,
              "step 30/60, loss 1.2500, 900 tokens/s, ETA 0:01:01\x1b[2J"),
]  # fmt: skip


def test_the_table_has_a_line_a_stage_where_there_is_no_terminal() -> None:
    assert render(LINES, "it is down", GpuHours(2.0, 0.5)).split("\n") == [
        "stage    state    job     node                     elapsed/limit    restarts",
        "prepare  done     6       c1                       0:12/10:00       0",
        "train    running  123456  node-with-a-long-name-7  1:02:03/8:00:00  1         "
        "step 30/60, loss 1.2500, 900 tokens/s, ETA 0:01:01",
        "GPU-hours: 2.00 used, 0.50 of them lost to interruptions",
        "from the run directory alone, Slurm did not answer: it is down",
    ]


def test_the_table_is_folded_to_the_terminal_and_loses_nothing() -> None:
    folded = render(LINES, width=80).split("\n")
    assert max(map(len, folded)) <= 80
    assert folded[0] == "stage    state    job     elapsed/limit"
    words = " ".join(" ".join(folded).split())
    for text in (
        "prepare done 6 0:12/10:00 c1",
        "loss 1.2500",
        "node-with-a-long-name-7",
        "1 restart",
    ):
        assert text in words
    assert render(LINES, width=200) == render(LINES)
    widest = max(map(len, render(LINES).split("\n")))
    assert render(LINES, width=widest) == render(LINES)
    assert render(LINES, width=widest - 1) != render(LINES)


def test_a_narrow_table_folds_the_job_and_the_details_alone() -> None:
    lines = [replace(line, job="123456_[1-3,7-9,11-13]", restarts=2) for line in LINES]
    assert render(lines, width=60) == NARROW.strip("\n")


NARROW = """
stage    state    job         elapsed/limit
prepare  done     123456_[1-  0:12/10:00       c1; 2
                  3,7-9,11-1                   restarts
                  3]
train    running  123456_[1-  1:02:03/8:00:00  step 30/60,
                  3,7-9,11-1                   loss 1.2500,
                  3]                           900 tokens/s,
                                               ETA 0:01:01;
                                               node-with-a-l
                                               ong-name-7; 2
                                               restarts
"""


def test_watch_shows_each_state_in_the_place_of_the_last() -> None:
    """On a real terminal, from the first look to the last."""
    code = """
from yelp_hpc.jobs import status
from yelp_hpc.jobs.status import JobStatus
from yelp_hpc.rundir import manifest
looks = [([JobStatus("train", state)], "") for state in ("waiting", "running", "done")]
status.WATCH_SECONDS = 0.05
status.collect_status = lambda *_: looks.pop(0)
from pathlib import Path
from yelp_hpc.rundir.paths import RunPaths
manifest.load_run = lambda run: (RunPaths(run), None)
status.show_status(Path("."), watch=True)
"""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", code], stdout=slave, env=env, check=True, cwd=ROOT)
    os.close(slave)
    shown = b""
    with suppress(OSError):
        while chunk := os.read(master, 4096):
            shown += chunk
    text = shown.decode()
    places = [text.index(state) for state in ("waiting", "running", "done")]
    assert places == sorted(places)
    assert re.search(r"\x1b\[\d*A", text)  # the cursor goes up instead of a page scrolling by
