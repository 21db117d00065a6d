"""Jobs on the real Slurm with played stages: chains, arrays, refusals, a dead controller."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, descendants, processes, wait_ended, wait_for
from tests.jobs.fake_run import FakeRun
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs import slurm as client
from yelp_hpc.jobs.chain import cancel, submit
from yelp_hpc.jobs.status import collect_status
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import read_jsonl
from yelp_hpc.rundir.paths import RunPaths

MakeRun = Callable[..., FakeRun]


def go(run: FakeRun, stage: str = "all", wait: bool = False) -> dict[str, str]:
    """Submit and return job name → job id."""
    made = submit(stage, run.root, run.config, run.cluster, wait=wait, say=lambda text: None)
    return {submission.name: submission.job for submission in made}


def states(run: FakeRun) -> dict[str, str]:
    lines, _ = collect_status(run.root, run.config)
    return {line.name: line.state for line in lines}


def test_a_chain_runs_alone_with_one_sbatch_a_stage(
    slurm: Cluster, slurm_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    run = slurm_run("the-run", steps=20)
    ids = go(run)
    assert len(read_jsonl(run.root / "submissions.jsonl")) == len(ids) == 5
    names = slurm.sh("squeue", "-h", "-o", "%j", "-j", ids["train"])
    assert names == "yelp-train:the-run"
    with pytest.raises(RequestError, match=f"job {ids['prepare']}"):
        go(run)
    wait_for(lambda: states(run)["train"] == "running", 60, "train to run")
    job = slurm.sh("scontrol", "show", "job", ids["train"])
    assert "gres/gpu:rtx3090" in job or "gpu:rtx3090" in job
    wait_ended(list(ids.values()), 120)
    assert set(states(run).values()) == {"done"}
    assert go(run) == {}
    spool = [p for p in run.root.rglob("*") if p.is_file() and b"hf_very_secret" in p.read_bytes()]
    assert not spool
    assert "hf_very_secret" not in slurm.sh("sacct", "-j", ids["train"], "--env-vars")


def test_an_array_survives_kills_and_a_controller_restart_and_is_completed_by_itself(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    broken = ["infer-base-17"]
    run = slurm_run(shards=64, cluster={"array_parallelism": 8}, steps=15, fail=broken).prepared()
    (run.root / "train" / "adapter").mkdir(parents=True)
    (run.root / "train" / "adapter" / "complete.json").write_text('{"files": {}}')
    run.config = run.config.model_copy(
        update={"infer": run.config.infer.model_copy(update={"models": ("base",)})}
    )
    job = go(run, "infer")["infer-base"]
    draw = random.Random(5)
    wait_for(run.trace, 60, "a shard to begin")
    for round_ in range(5):
        time.sleep(1.5)
        victim = draw.choice(wait_for(lambda: running(job), 30, "a task to run")).job
        if round_ % 2:
            slurm.sh("scontrol", "requeue", victim)
        else:  # the node's own out-of-memory killer, or an admin
            for pid in descendants([p for p, line in processes() if shard_line(run, line)])[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if round_ == 2:
            slurm.stop_controller()
            lines, problem = collect_status(run.root, run.config)
            assert problem
            assert next(line for line in lines if line.name == "infer-base").shards["done"] >= 0
            slurm.script("slurm_up.sh")
    wait_ended([job], 240)
    missing = set(range(64)) - {int(name[6:10]) for name in run.predictions("base")}
    assert 17 in missing
    assert len(missing) <= 4
    assert states(run)["infer-base"] == "failed"
    before = len(run.trace())
    run.plan(steps=1)
    again = go(run, "infer", wait=True)["infer-base"]
    redone = sorted(line["name"] for line in run.trace()[before:])
    assert redone == sorted(f"infer-base-{shard}" for shard in missing)
    assert len(run.predictions("base")) == 64
    assert again != job


def running(job: str) -> list[client.Row]:
    return [row for row in client.queue([job]) if row.state == "RUNNING"]


def shard_line(run: FakeRun, line: str) -> bool:
    return "fake_stage.py infer" in line and str(run.root) in line and "submitit" not in line


def test_without_grace_slurm_requeues_and_nothing_is_lost_but_the_time(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    place = {"partition": "low0", "gpus": 4, "gpu_type": "rtx3090"}
    run = slurm_run(cluster={"train": place}, steps=60).prepared()
    job = go(run, "train")["train"]
    wait_for(lambda: (run.root / "train" / "checkpoints" / "step.json").exists(), 60, "a step")
    slurm.preempt()
    wait_ended([job], 120)
    verdicts = [attempt.verdict for attempt in attempts.read(RunPaths(run.root), "train")]
    assert len(verdicts) == 2
    assert verdicts[0] in ("lost", "stopped", "requeued")  # who was first, Slurm or the supervisor
    assert verdicts[1] == "done"


@pytest.mark.parametrize("how", ["TERM", "USR2"])
def test_a_site_that_sends_one_signal_only(slurm: Cluster, slurm_run: MakeRun, how: str) -> None:
    run = slurm_run(steps=40).prepared()
    job = go(run, "train")["train"]
    wait_for(run.trace, 60, "train to begin")
    time.sleep(0.5)
    slurm.sh("scancel", f"--signal={how}", job)
    wait_ended([job], 60)
    tried = attempts.read(RunPaths(run.root), "train")
    assert [attempt.verdict for attempt in tried] == ["requeued", "done"]
    assert how in tried[0].reason


def test_a_signal_before_the_supervisor_is_ready_is_not_lost(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    run = slurm_run(steps=5).prepared()
    job = go(run, "train")["train"]
    for restart in range(3):
        wait_for(lambda: step_of(job), 60, "the job's step")  # Python has not begun or only starts
        # scancel tries again for up to 11 s while the step starts, so it is not waited for
        with subprocess.Popen(["scancel", "--signal=TERM", job]) as scancel:
            wait_for(partial(restarted, job, restart), 60, "the requeue")
            scancel.kill()
        wait_for(lambda: not step_of(job), 30, "the step to end")
    wait_ended([job], 60)
    tried = attempts.read(RunPaths(run.root), "train")
    assert tried[-1].verdict == "done"
    assert {attempt.verdict for attempt in tried[:-1]} <= {"requeued"}


def step_of(job: str) -> list[int]:
    return [pid for pid, line in processes() if f"slurmstepd: [{job}.0]" in line]


def test_a_signal_that_ends_the_step_before_it_began_is_not_lost(
    slurm: Cluster, slurm_run: MakeRun, tmp_path: Path
) -> None:
    python = tmp_path / "python"  # ends as srun does when a signal came while the step started
    python.write_text(
        f'#!/bin/sh\n[ "$SLURM_RESTART_COUNT" ] || exit 143\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run = slurm_run(shards=2, cluster={"python": str(python)}, steps=2)
    ids = go(run)
    wait_ended(list(ids.values()), 180)
    assert set(states(run).values()) == {"done"}
    assert all(run.predictions(model) for model in ("base", "tuned"))


def restarted(job: str, times: int) -> bool:
    return restarts(job) > times


def restarts(job: str) -> int:
    return max((row.restarts for row in client.queue([job])), default=0)


def test_a_stage_that_does_not_save_in_time_is_requeued_before_the_limit(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    train = {"partition": "cpu", "gpus": 0, "time": "1", "save_seconds": 30}
    run = slurm_run(cluster={"train": train}, steps=600, deaf=True).prepared()
    wait_ended(list(go(run, "train").values()), 180)
    tried = attempts.read(RunPaths(run.root), "train")
    assert [attempt.verdict for attempt in tried] == ["requeued", "done"]
    assert "save_seconds" in tried[0].reason


def test_jobs_run_the_code_that_was_submitted_not_the_checkout(
    slurm: Cluster, slurm_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    shown = "import yelp_hpc as y, yelp_hpc.jobs as j; print('code:', y.__file__, j.__file__)"
    run = slurm_run(cluster={"command": [sys.executable, "-c", shown]})
    wait_ended(list(go(run, "prepare").values()), 60)
    log = (run.root / "logs" / "prepare.log").read_text()
    assert log.count(f"{run.root}/code/") == 2


def test_two_nodes_meet_and_are_requeued_as_one(slurm: Cluster, slurm_run: MakeRun) -> None:
    train = {"partition": "cpu", "gpus": 0, "nodes": 2}
    run = slurm_run(cluster={"train": train}, steps=60).prepared()
    job = go(run, "train")["train"]
    wait_for(lambda: len(run.trace()) == 2, 60, "both nodes to begin")
    time.sleep(0.5)
    slurm.sh("scancel", "--signal=USR2", job)
    wait_ended([job], 90)
    began = run.trace()
    for pair in (began[:2], began[2:]):
        assert {line["YELP_HPC_NODE_RANK"] for line in pair} == {"0", "1"}
        assert {line["MASTER_ADDR"] for line in pair} == {"c1"}
        assert len({line["MASTER_PORT"] for line in pair}) == 1
    tried = attempts.read(RunPaths(run.root), "train")
    assert [attempt.verdict for attempt in tried] == ["requeued", "done"]


def test_a_disk_that_is_full_when_time_is_up_costs_a_requeue(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    train = {"partition": "cpu", "gpus": 0}
    run = slurm_run(cluster={"train": train}, steps=60, full=1, at_save=True).prepared()
    job = go(run, "train")["train"]
    wait_for(lambda: len(run.trace()) == 1, 60, "the stage to begin")
    time.sleep(0.3)
    slurm.sh("scancel", "--signal=USR2", job)
    wait_ended([job], 90)
    first, second = attempts.read(RunPaths(run.root), "train")
    assert [first.verdict, second.verdict] == ["requeued", "done"]
    assert first.reason.startswith("the disk was full")


def test_two_nodes_that_met_a_full_disk_begin_anew(slurm: Cluster, slurm_run: MakeRun) -> None:
    train = {"partition": "cpu", "gpus": 0, "nodes": 2}
    run = slurm_run(cluster={"train": train}, full=2).prepared()
    job = go(run, "train")["train"]
    wait_ended([job], 90)
    assert [line["YELP_HPC_NNODES"] for line in run.trace()] == ["2"] * 4
    first, second = attempts.read(RunPaths(run.root), "train")
    assert [first.verdict, second.verdict] == ["requeued", "done"]
    assert first.reason.startswith("the disk was full")


def test_a_node_whose_hardware_failed_is_named_and_left(slurm: Cluster, slurm_run: MakeRun) -> None:
    train = {"partition": "cpu", "gpus": 0}
    run = slurm_run(cluster={"train": train}, steps=3, ill=True).prepared()
    job = go(run, "train")["train"]
    wait_ended([job], 120)
    first, second = attempts.read(RunPaths(run.root), "train")
    assert [first.verdict, second.verdict] == ["requeued", "done"]
    assert first.node != second.node
    assert f"node {first.node} failed: ECC error" in first.reason
    assert f"ExcNodeList={first.node}" in slurm.sh("scontrol", "show", "job", job)


def test_a_node_whose_hardware_failed_is_kept_where_the_site_leaves_no_other(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    train = {"partition": "cpu", "gpus": 0, "exclude": "c2,g1"}
    cluster = {"train": train, "requeue_cap": 2}
    run = slurm_run(cluster=cluster, steps=3, ill=True).prepared()
    wait_ended([go(run, "train")["train"]], 120)
    tried = attempts.read(RunPaths(run.root), "train")
    assert [start.node for start in tried] == ["c1", "c1"]
    assert tried[-1].verdict == "failed"


def test_a_job_takes_the_nodes_that_the_queue_gives(slurm: Cluster, slurm_run: MakeRun) -> None:
    train = {"partition": "cpu", "gpus": 0, "nodes": "2-3"}
    run = slurm_run(cluster={"train": train}, steps=5).prepared()
    job = go(run, "train")["train"]
    wait_ended([job], 90)
    began = run.trace()
    assert len(began) in (2, 3)
    assert {line["YELP_HPC_NNODES"] for line in began} == {str(len(began))}
    assert {line["YELP_HPC_NODE_RANK"] for line in began} == set("012"[: len(began)])


def test_cancel_ends_this_run_and_no_other(slurm: Cluster, slurm_run: MakeRun) -> None:
    mine, other = slurm_run("mine", steps=300), slurm_run("other", steps=10)
    answers = slurm_run("mine/predict/new", shards=1, steps=300).prepared()
    my_ids, other_ids = go(mine), go(other)
    its_ids = go(answers, "train")
    wait_for(lambda: [x for x in mine.trace() if x["name"] == "train"], 60, "train to begin")
    assert set(cancel(mine.root)) >= {my_ids["train"], its_ids["train"]}
    wait_ended([*my_ids.values(), *its_ids.values()], 30)
    wait_ended(list(other_ids.values()), 120)
    assert set(states(other).values()) == {"done"}
    assert states(mine)["train"] in ("cancelled", "stopped")
    assert (mine.root / "train" / "checkpoints" / "step.json").exists()
    mine.plan(steps=1)
    go(mine, wait=True)
    assert set(states(mine).values()) == {"done"}


def test_submitting_from_inside_a_job_does_not_inherit_it(
    slurm: Cluster, slurm_run: MakeRun, tmp_path: Path
) -> None:
    run = slurm_run(shards=1)
    script = tmp_path / "inner.py"
    script.write_text(
        "from yelp_hpc.jobs.chain import submit\nfrom yelp_hpc.jobs.cluster import ClusterConfig\n"
        "from yelp_hpc.config import Config\n"
        f"submit('all', {str(run.root)!r}, Config.model_validate({run.config.model_dump()!r}),"
        f" ClusterConfig.model_validate({run.cluster.model_dump()!r}))\n"
    )
    top = Path(__file__).parents[2]
    wrap = f"PYTHONPATH={top} {sys.executable} {script}"
    argv = ["sbatch", "--parsable", "--array=0", "--gres=gpu:rtx3090:2", "-p", "gpu", "--mem=200M"]
    outer = slurm.sh(*argv, f"--output={tmp_path}/outer.log", "--wrap", wrap)
    wait_ended([outer], 60)
    ids = [line["job"] for line in read_jsonl(run.root / "submissions.jsonl")]
    assert ids, (tmp_path / "outer.log").read_text()
    wait_ended(ids, 120)
    assert set(states(run).values()) == {"done"}
    assert outer not in ids


def test_waiting_ends_with_what_collect_said(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run(shards=1)
    said: list[str] = []
    submit("all", run.root, run.config, run.cluster, wait=True, say=said.append)
    assert said[-1] == "collect begins\ncollect ends"


def test_a_stage_that_dies_shows_its_last_words_and_the_rest_is_not_started(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    run = slurm_run(fail=["train"])
    with pytest.raises(StageError, match="the data is rotten"):
        go(run, wait=True)
    found = states(run)
    assert found["train"] == "failed"
    assert not run.predictions("tuned")
    assert len(run.predictions("base")) == 3


@pytest.mark.parametrize(
    ("section", "key"),
    [({"partition": "nope"}, "partition"), ({"gpus": 9, "gpu_type": "rtx3090"}, "gpus")],
)
def test_what_sbatch_refuses_is_shown_with_the_key_and_nothing_stays_submitted(
    slurm: Cluster, slurm_run: MakeRun, section: dict[str, object], key: str
) -> None:
    run = slurm_run(cluster={"train": section})
    with pytest.raises(RequestError, match=f"train.*{key}"):
        go(run)
    wait_ended([line["job"] for line in read_jsonl(run.root / "submissions.jsonl")], 20)
    assert slurm.sh("squeue", "-h", "-n", f"yelp-prepare:{run.root.name}", "-o", "%i") == ""


def test_a_controller_that_is_down_is_said_and_status_still_answers(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    run = slurm_run().prepared()
    slurm.stop_controller()
    try:
        with pytest.raises(StageError, match="controller"):
            go(run, "train")
        lines, _ = collect_status(run.root, run.config)
        assert lines[0].state == "done"
    finally:
        slurm.script("slurm_up.sh")


def test_without_accounting_the_state_comes_from_the_run_directory(
    slurm: Cluster, slurm_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slurm_run(fail=["prepare"])
    ids = go(run, "prepare")
    wait_ended(list(ids.values()), 60)
    broken = tmp_path / "bin" / "sacct"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
    assert subprocess.run(["sacct"], check=False, capture_output=True).returncode == 1
    assert states(run)["prepare"] == "failed"
