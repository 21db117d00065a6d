"""The whole machinery on this machine: submitit locally, real supervisors, played stages."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import yelp_hpc
from tests.jobs.fake_run import FakeRun
from tests.tiny import SIF
from yelp_hpc.errors import RequestError, SavedForRequeue, StageError
from yelp_hpc.jobs.chain import cancel, submit
from yelp_hpc.jobs.executor import freeze_cluster
from yelp_hpc.jobs.logs import find_logs
from yelp_hpc.jobs.snapshot import freeze
from yelp_hpc.jobs.status import collect_status
from yelp_hpc.jobs.submission import boot_id, process_start
from yelp_hpc.own_files import IMPORT_ROOT
from yelp_hpc.progress import to_nowhere
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import append_jsonl
from yelp_hpc.rundir.paths import MODELS, RunPaths

MakeRun = Callable[..., FakeRun]


def go(run: FakeRun, stage: str = "all") -> int:
    return len(submit(stage, run.root, run.config, run.cluster, "local", say=lambda text: None))


def once_started(run: FakeRun, name: str, act: Callable[[int], object]) -> threading.Thread:
    """Call `act` with the supervisor's pid a moment after the stage `name` began."""

    def wait() -> None:
        while not any(line["name"] == name for line in run.trace()):
            time.sleep(0.05)
        time.sleep(0.3)
        job = name.rstrip("0123456789").rstrip("-")
        act(attempts.read(RunPaths(run.root), job)[-1].pid)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_the_chain_runs_once_and_then_has_nothing_to_do(fake_run: MakeRun) -> None:
    run = fake_run("a run", shards=2)
    assert go(run) == 5
    trace = run.trace()
    assert [line["name"] for line in trace] == [
        *("prepare", "train", "infer-base-0", "infer-base-1", "infer-tuned-0", "infer-tuned-1"),
        "collect",
    ]
    # a model's shards share a process, which loads it once
    assert [len({line["pid"] for line in trace if m in line["name"]}) for m in MODELS] == [1, 1]
    # no result is pickled: on a disk that fills up, that would fail what is done
    assert not list(RunPaths(run.root).logs.glob("*/*result*"))
    assert go(run) == 0
    assert len(run.trace()) == 7
    lines, _ = collect_status(run.root, run.config)
    assert {line.state for line in lines} == {"done"}


def test_when_the_first_stage_fails_nothing_else_starts(fake_run: MakeRun) -> None:
    run = fake_run("a run", shards=2, fail=["prepare"])
    with pytest.raises(StageError, match="prepare failed: exit code 1") as failed:
        go(run)
    assert [line["name"] for line in run.trace()] == ["prepare"]
    # its log was shown while it ran: what went wrong is not said twice
    log = RunPaths(run.root).stage_log("prepare")
    assert f"its log, shown above, is {log}" in str(failed.value)
    assert "last lines of" not in str(failed.value)


def test_a_stage_that_refuses_its_input_ends_the_chain_as_it_ended(fake_run: MakeRun) -> None:
    run = fake_run(shards=1, fail=["prepare"], code=2)
    with pytest.raises(RequestError, match="prepare failed: exit code 2; its log, shown above"):
        go(run)
    run = fake_run("another", shards=1, fail=["train", "infer-base-0"], code=1)
    with pytest.raises(StageError, match="train failed: exit code 1"):
        go(run)


def test_a_disk_that_is_full_for_a_moment_needs_no_hand(fake_run: MakeRun) -> None:
    run = fake_run("a run", shards=1, full=1).prepared()
    assert go(run, "train") == 1
    assert [line["name"] for line in run.trace()] == ["train", "train"]
    first, second = attempts.read(RunPaths(run.root), "train")
    assert (first.verdict, second.verdict) == ("again", "done")
    assert first.reason.startswith("the disk was full")


def test_a_job_whose_own_log_is_on_a_full_disk_does_its_work(fake_run: MakeRun) -> None:
    run = fake_run("a run", shards=1)
    paths = RunPaths(run.root)
    call = ["prepare", str(paths.root), str(freeze_cluster(paths, run.cluster))]
    code = "import sys; from yelp_hpc.jobs.supervisor import supervise; supervise(*sys.argv[1:])"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-uc", code, *call], stdout=full, check=False)
    assert done.returncode == 0
    assert attempts.read(paths, "prepare")[-1].verdict == "done"


def test_a_disk_that_stays_full_ends_the_chain(fake_run: MakeRun) -> None:
    run = fake_run("a run", shards=1, cluster={"requeue_cap": 2}, full=9)
    with pytest.raises(StageError, match="prepare failed: exit code 1"):
        go(run)
    assert [line["name"] for line in run.trace()] == ["prepare", "prepare"]


def test_the_frozen_code_holds_every_file_that_the_package_reads(tmp_path: Path) -> None:
    frozen = freeze(RunPaths(tmp_path))
    installed = Path(yelp_hpc.__file__).parent.rglob("*")
    kept = {p.relative_to(frozen / "yelp_hpc") for p in (frozen / "yelp_hpc").rglob("*")}
    for path in installed:
        if path.is_file() and not any("cache" in part for part in path.parts):
            assert path.relative_to(Path(yelp_hpc.__file__).parent) in kept


def test_a_failed_shard_stops_only_what_needs_it_and_is_done_alone_next_time(
    fake_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    run = fake_run(shards=4, fail=["infer-base-1"]).prepared()
    (run.root / "train" / "adapter").mkdir(parents=True)
    (run.root / "train" / "adapter" / "complete.json").write_text('{"files": {}}')
    with pytest.raises(StageError, match=r"infer-base failed: shard 1 .* its log, shown above"):
        go(run, "infer")
    assert capfd.readouterr().err.count("the data is rotten") == 1
    assert len(run.predictions("base")) == 3
    assert len(run.predictions("tuned")) == 4
    trace = run.trace()
    assert [line["name"][-6:] for line in trace] == [
        f"{m[-4:]}-{k}" for m in MODELS for k in range(4)
    ]
    pids = [line["pid"] for line in trace]
    assert [len({*pids[:2]}), len({*pids[2:4]}), len({*pids[:4]}), len({*pids[4:]})] == [1, 1, 2, 1]
    lines, _ = collect_status(run.root, run.config)
    base = next(line for line in lines if line.name == "infer-base")
    assert base.state == "failed"
    assert (base.shards["done"], base.shards["failed"]) == (3, 1)
    assert "rotten" in find_logs(run.root)[0].read_text()
    before = len(run.trace())
    run.plan(steps=1)
    go(run, "infer")
    assert [line["name"] for line in run.trace()[before:]] == ["infer-base-1"]


def test_a_signal_to_save_runs_the_stage_again_where_it_was(fake_run: MakeRun) -> None:
    run = fake_run(steps=25).prepared()
    thread = once_started(run, "train", lambda pid: os.kill(pid, signal.SIGUSR2))
    go(run, "train")
    thread.join()
    tried = attempts.read(RunPaths(run.root), "train")
    assert [attempt.verdict for attempt in tried] == ["again", "done"]
    assert len(run.trace()) == 2


def base_alone(run: FakeRun) -> FakeRun:
    """A prepared run that asks the base model alone."""
    infer = run.config.infer.model_copy(update={"models": ("base",)})
    run.config = run.config.model_copy(update={"infer": infer})
    return run.prepared()


def test_shards_that_share_a_process_are_resumed_each_where_it_was(fake_run: MakeRun) -> None:
    run = base_alone(fake_run(shards=4, steps=15))
    thread = once_started(run, "infer-base-1", lambda pid: os.kill(pid, signal.SIGUSR2))
    go(run, "infer")
    thread.join()
    assert [line["name"][-1] for line in run.trace()] == ["0", "1", "1", "2", "3"]
    assert len({line["pid"] for line in run.trace()}) == 2
    tried = attempts.read(RunPaths(run.root), "infer-base")
    assert [(attempt.verdict, attempt.task) for attempt in tried] == [
        ("again", (0, 1, 2, 3)),
        ("done", (0, 1, 2, 3)),
    ]
    assert len(run.predictions("base")) == 4


def test_a_shard_whose_process_is_killed_is_the_one_that_is_said(fake_run: MakeRun) -> None:
    run = base_alone(fake_run(shards=3, steps=15))

    def kill(_: int) -> None:
        os.kill(run.trace()[-1]["pid"], signal.SIGKILL)

    thread = once_started(run, "infer-base-1", kill)
    with pytest.raises(StageError, match=r"infer-base failed: shard 1 exited -9"):
        go(run, "infer")
    thread.join()
    assert [name[6:10] for name in run.predictions("base")] == ["0000", "0002"]


def test_cancel_saves_and_stops(fake_run: MakeRun) -> None:
    run = fake_run(steps=200).prepared()
    thread = once_started(run, "train", lambda pid: cancel(run.root))
    with pytest.raises(SavedForRequeue):
        go(run, "train")
    thread.join()
    assert attempts.read(RunPaths(run.root), "train")[-1].verdict == "stopped"
    assert (run.root / "train" / "checkpoints" / "step.json").exists()


def test_a_file_server_that_is_away_for_a_moment_cancels_nothing(fake_run: MakeRun) -> None:
    run = fake_run(steps=10).prepared()
    told = run.root / "logs" / "cancelled"
    told.parent.mkdir()
    told.write_text("an earlier cancel")

    def away(pid: int) -> None:
        told.rename(told.with_name("kept"))
        told.symlink_to(told.name)  # any error but that it is not there
        time.sleep(0.5)
        told.with_name("kept").replace(told)

    thread = once_started(run, "train", away)
    assert go(run, "train") == 1
    thread.join()


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "cancel"])
def test_what_stops_a_stage_before_it_can_hear_stops_the_chain(fake_run: MakeRun, how: str) -> None:
    run = fake_run(steps=20).prepared()

    def say(text: str) -> None:
        if text.startswith("train: started"):  # its supervisor has no handler yet
            cancel(run.root) if how == "cancel" else os.kill(os.getpid(), signal.Signals[how])

    with pytest.raises(SavedForRequeue, match="Run the same command again"):
        submit("all", run.root, run.config, run.cluster, "local", say=say)
    assert {line["name"] for line in run.trace()} <= {"train"}
    assert go(run) == 4


def test_the_chain_goes_on_where_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """`2>&1 | head -1`."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.jobs.fake_run import FakeRun\n"
        "from yelp_hpc.jobs.chain import submit\n"
        "run = FakeRun(Path(sys.argv[1]), 2, {}, steps=3)\n"
        "submit('all', run.root, run.config, run.cluster, 'local')\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    with subprocess.Popen(argv, stderr=subprocess.PIPE, env=env) as chain:
        assert chain.stderr and chain.stderr.readline().startswith(b"prepare: started")
        chain.stderr.close()
        assert chain.wait() == 0
    assert RunPaths(tmp_path / "run").metrics.is_file()


def test_the_chain_goes_on_where_what_it_says_finds_no_room(
    fake_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run()
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert len(submit("prepare", run.root, run.config, run.cluster, "local")) == 1
        to_nowhere(full)


@pytest.mark.parametrize(("given", "seen"), [("1", "1"), ("GPU-8a1", "GPU-8a1"), ("", "-1")])
def test_a_stage_sees_the_gpus_that_the_shell_shows(
    fake_run: MakeRun, monkeypatch: pytest.MonkeyPatch, given: str, seen: str
) -> None:
    run = fake_run()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    go(run, "prepare")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    go(run, "train")
    assert [line["CUDA_VISIBLE_DEVICES"] for line in run.trace()] == [seen, None]


def test_in_an_image_a_stage_sees_the_gpus_that_the_shell_shows(
    fake_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No list in the shell is none in the image: an empty one would hide them all."""
    (tmp_path / "x.sif").write_bytes(SIF)
    (tmp_path / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; exit 1\n')
    (tmp_path / "apptainer").chmod(0o755)
    container = {"image": str(tmp_path / "x.sif"), "cache": str(tmp_path / "cache")}
    program = {"apptainer": str(tmp_path / "apptainer")}
    run = fake_run(cluster={"command": None, "container": container, "programs": program})
    for given in (None, "2"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        with pytest.raises(StageError):
            go(run, "prepare")
        start = RunPaths(run.root).stage_log("prepare").read_text().rpartition("=== job")[2]
        seen = [line for line in start.splitlines() if line.startswith("CUDA_VISIBLE")]
        assert seen == ([f"CUDA_VISIBLE_DEVICES={given}"] if given else [])


def test_a_stage_that_never_gets_anywhere_is_given_up(fake_run: MakeRun) -> None:
    run = fake_run(cluster={"requeue_cap": 2}, steps=1000, stuck=True).prepared()
    stop = threading.Event()

    def pester() -> None:
        seen = 0
        while not stop.is_set():
            tried = attempts.read(RunPaths(run.root), "train")
            if len(run.trace()) > seen and tried and not tried[-1].verdict:
                seen += 1
                time.sleep(0.4)
                os.kill(tried[-1].pid, signal.SIGUSR2)
            time.sleep(0.05)

    thread = threading.Thread(target=pester, daemon=True)
    thread.start()
    with pytest.raises(StageError, match="no progress"):
        go(run, "train")
    stop.set()
    thread.join()
    assert len(run.trace()) == 2


def test_a_running_stage_is_not_submitted_twice(fake_run: MakeRun) -> None:
    run = fake_run(steps=20).prepared()
    refused: list[str] = []

    def again(pid: int) -> None:
        with pytest.raises(RequestError, match="already submitted") as caught:
            go(run, "train")
        refused.append(str(caught.value))

    thread = once_started(run, "train", again)
    go(run, "train")
    thread.join()
    assert "local-" in refused[0]
    assert len(run.trace()) == 1


def test_a_process_id_alone_is_nobody(fake_run: MakeRun) -> None:
    run = fake_run(shards=1)
    argv = [sys.executable, "-c", "import time; time.sleep(60)", "submitit"]
    stranger = subprocess.Popen(argv)
    truth = {"began": process_start(stranger.pid), "boot_id": boot_id()}
    line = {"name": "prepare", "job": f"local-{stranger.pid}", "executor": "local", "time": 1.0}
    line |= {"stage": "prepare", "host": socket.gethostname(), "tasks": [""]}
    try:
        for lie in ({"began": "1"}, {"boot_id": "of another start"}):
            append_jsonl(run.root / "submissions.jsonl", {**line, **truth, **lie})
            assert cancel(run.root) == []
        assert go(run) == 5
        assert stranger.poll() is None
        append_jsonl(run.root / "submissions.jsonl", {**line, **truth, "time": 2.0})
        assert cancel(run.root) == [line["job"]]
        assert stranger.wait(10) == -signal.SIGTERM
    finally:
        stranger.kill()


def test_inside_an_allocation_of_several_nodes_it_still_runs_here_alone(
    fake_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NUM_NODES", "2"), ("SLURM_PROCID", "1"),
                        ("SLURM_STEP_NUM_NODES", "2"), ("SLURM_NODEID", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    run = fake_run(cluster={"train": {"gpus": 4}}).prepared()
    go(run, "train")
    (tried,) = attempts.read(RunPaths(run.root), "train")
    assert (tried.verdict, tried.gpus) == ("done", 4)
    assert run.trace()[0]["YELP_HPC_NNODES"] == "1"


def test_a_supervisor_that_died_at_once_is_not_taken_for_an_earlier_one_of_its_number(
    fake_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(shards=1)
    attempts.write(
        RunPaths(run.root), attempts.Attempt("prepare", "local-37", 0, verdict="done", ended=1.0)
    )
    dead = subprocess.Popen(["true"])
    monkeypatch.setattr("yelp_hpc.jobs.executor.start_local", lambda *_: ("local-37", dead))
    with pytest.raises(StageError, match="prepare failed: its supervisor died"):
        go(run, "prepare")


def test_two_chains_at_once(fake_run: MakeRun) -> None:
    run = fake_run(shards=1)
    start, ended = threading.Barrier(2), []

    def one() -> None:
        start.wait()
        try:
            ended.append(go(run))
        except RequestError as error:
            assert "a local chain runs here already" in str(error) or "already sub" in str(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [5]
    assert len(run.trace()) == 5


def test_submit_and_cancel_at_once_leave_all_or_nothing(fake_run: MakeRun) -> None:
    run = fake_run(steps=200).prepared()
    stop = threading.Event()

    def cancelling() -> None:
        while not stop.is_set() and not cancel(run.root):
            pass

    thread = threading.Thread(target=cancelling)
    thread.start()
    with pytest.raises(SavedForRequeue):
        go(run)
    stop.set()
    thread.join()
    assert cancel(run.root) == []
    assert len(run.trace()) <= 1


def test_a_stage_without_its_input_is_refused(fake_run: MakeRun) -> None:
    with pytest.raises(RequestError, match="needs prepare"):
        go(fake_run(), "train")


def test_a_command_that_does_not_start_is_one_clear_message(
    fake_run: MakeRun, tmp_path: Path
) -> None:
    run = fake_run(cluster={"command": ["/no/such/python"]})
    with pytest.raises(RequestError, match="command: /no/such/python is no program here"):
        go(run, "prepare")
    (tmp_path / "stage").write_text("#!/no/such/python\n")
    (tmp_path / "stage").chmod(0o755)
    run = fake_run("another", cluster={"command": [str(tmp_path / "stage")]})
    with pytest.raises(StageError, match=f"cannot start {tmp_path}/stage: No such file"):
        go(run, "prepare")


def test_no_secret_stays_in_the_run_directory(
    fake_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    run = fake_run(shards=1)
    go(run)
    files = [path for path in Path(run.root).rglob("*") if path.is_file()]
    assert any(path.suffix == ".pkl" for path in files)
    assert not [path for path in files if b"hf_very_secret" in path.read_bytes()]


def test_jobs_run_the_code_that_was_submitted_not_the_checkout(
    fake_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    shown = "import yelp_hpc as y, yelp_hpc.jobs as j; print('code:', y.__file__, j.__file__)"
    run = fake_run(cluster={"command": [sys.executable, "-c", shown]})
    go(run, "prepare")
    log = (run.root / "logs" / "prepare.log").read_text()
    assert log.count(f"{run.root}/code/") == 2
