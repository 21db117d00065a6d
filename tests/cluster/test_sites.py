"""A table of sites: what differs from the cluster of these tests, and what the chain does there.

Real Slurm wherever Slurm can do it; where a site's oddity is a program of its own, a small script
on PATH stands in its place. Everywhere the real product runs its chain or says what is wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import RUN, Cluster, states_of, wait_ended, wait_for, yelp_hpc
from tests.jobs.fake_run import FakeRun
from yelp_hpc.errors import RequestError, SavedForRequeue, StageError, YelpHpcError
from yelp_hpc.jobs import slurm as client
from yelp_hpc.jobs.chain import cancel, submit
from yelp_hpc.jobs.logs import find_logs
from yelp_hpc.jobs.status import JobStatus, collect_status
from yelp_hpc.jobs.submission import process_start, records
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import append_jsonl
from yelp_hpc.rundir.paths import RunPaths

MakeRun = Callable[..., FakeRun]

# what stands on PATH before the real client, which is $REAL
SHIMS = {
    "a banner on stdout": ("squeue sbatch sacct scontrol", 'echo "Welcome here"\n"$REAL" "$@"'),
    "an answer with the cluster's name": ("sbatch", 'id=$("$REAL" "$@") && echo "$id;lab"'),
    "a controller that is busy at first": (
        "squeue sbatch scontrol",
        'if [ ! -e "$0.done" ]; then touch "$0.done"; echo "slurm: Socket timed out on send/recv '
        'operation" >&2; exit 1; fi\nexec "$REAL" "$@"',
    ),
    "an sbatch that times out after it was heard": (
        "sbatch",
        '"$REAL" "$@" >/dev/null\necho "sbatch: error: Batch job submission failed: Socket timed '
        'out on send/recv operation" >&2\nexit 1',
    ),
    "squeue behind a cache": (
        "squeue",
        'key="$0.$(echo "$*" | md5sum | cut -c1-8)"\n[ -e "$key" ] && '
        '[ $(($(date +%s) - $(stat -c %Y "$key"))) -lt 20 ] || '
        '"$REAL" "$@" > "$key" 2>/dev/null\ncat "$key"',
    ),
}  # fmt: skip
ENVIRONMENTS = {
    "defaults that would win over the script": {
        "SBATCH_PARTITION": "nope",
        "SBATCH_TIMELIMIT": "0:01",
        "SBATCH_MEM_PER_NODE": "7T",
        "SBATCH_NO_REQUEUE": "1",
    },
    "no environment for jobs": {"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"},
    "filters of squeue and sacct": {
        "SQUEUE_STATES": "COMPLETED",
        "SQUEUE_USERS": "nobody",
        "SQUEUE_PARTITION": "low",
        "SACCT_FORMAT": "JobID",
        "SLURM_TIME_FORMAT": "relative",
        "SLURM_CLUSTERS": "lab",
    },
    "an srun of one's own": {
        "SRUN_CPUS_PER_TASK": "64",
        "SLURM_NTASKS": "7",
        "SRUN_EXCLUSIVE": "1",
    },
}


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a script in the place of clients."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(names: str, script: str) -> None:
        for name in names.split():
            real = subprocess.run(["which", name], capture_output=True, text=True, check=True)
            text = f"#!/bin/bash\nREAL={real.stdout.strip()}\n{script}\n"
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return make


def go(run: FakeRun, stage: str = "all", wait: bool = False) -> dict[str, str]:
    """Submit; returns job name → job id."""
    made = submit(stage, run.root, run.config, run.cluster, wait=wait, say=lambda text: None)
    return {submission.name: submission.job for submission in made}


def once_each(run: FakeRun) -> None:
    """Every stage of the chain ran, once."""
    names = [line["name"] for line in run.trace()]
    assert sorted(names) == sorted(set(names))
    assert set(states_of(run).values()) == {"done"}


def train_line(run: FakeRun) -> JobStatus:
    (line,) = [line for line in collect_status(run.root, run.config)[0] if line.name == "train"]
    return line


@pytest.mark.parametrize("site", ENVIRONMENTS)
def test_the_users_shell_changes_nothing(
    slurm: Cluster, slurm_run: MakeRun, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    for name, value in ENVIRONMENTS[site].items():
        monkeypatch.setenv(name, value)
    run = slurm_run("a-run", shards=1)
    ids = go(run)
    with pytest.raises(RequestError, match="already submitted"):
        go(run)
    wait_ended(list(ids.values()), 120)
    once_each(run)


@pytest.mark.parametrize("site", SHIMS)
def test_clients_of_the_sites_own(
    slurm: Cluster, slurm_run: MakeRun, shim: Callable[[str, str], None], site: str
) -> None:
    shim(*SHIMS[site])
    run = slurm_run("a-run", shards=1)
    go(run, wait=True)
    once_each(run)


def test_a_wrapper_that_is_no_squeue_is_named_and_so_is_the_key(
    slurm: Cluster, slurm_run: MakeRun, shim: Callable[[str, str], None]
) -> None:
    real = subprocess.run(["which", "squeue"], capture_output=True, text=True, check=True)
    shim("squeue", 'echo "usage: rc-squeue [-m]" >&2; exit 2')
    run = slurm_run("a-run", shards=1)
    ids = go(run)  # a first submission asks it nothing
    with pytest.raises(YelpHpcError, match=r"programs: \{squeue: PATH\}"):
        go(run)
    run.cluster = run.cluster.model_copy(update={"programs": {"squeue": real.stdout.strip()}})
    with pytest.raises(RequestError, match="already submitted"):
        go(run)
    wait_ended(list(ids.values()), 120)
    once_each(run)


def test_a_node_without_clients_runs_its_stage_and_says_so_at_the_limit(
    slurm: Cluster, slurm_run: MakeRun, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for tool in ("bash", "env", "cat", "sleep", "srun", "grep"):
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=True)
        (folder / tool).symlink_to(found.stdout.strip())
    run = slurm_run(cluster={"setup": [f"export PATH={folder}"]}, steps=60).prepared()
    job = go(run, "train")["train"]
    wait_for(run.trace, 60, "train to begin")
    time.sleep(1)
    slurm.sh("scancel", "--signal=USR2", job)
    wait_ended([job], 60)
    (tried,) = attempts.read(RunPaths(run.root), "train")
    assert tried.verdict == "stopped"
    assert "no scontrol" in tried.reason and "submit again" in tried.reason
    run.plan(steps=1)
    go(run, "train", wait=True)
    assert states_of(run)["train"] == "done"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "/no/such/python"}, "/no/such/python"),
        ({"setup": ["module load apptainer/9.9"]}, "module"),
        ({"setup": ["echo no licence today; exit 3"]}, "no licence today"),
    ],
)
def test_why_it_died_before_a_supervisor_could_begin(
    slurm: Cluster, slurm_run: MakeRun, change: dict[str, object], words: str
) -> None:
    run = slurm_run(cluster=change)
    ids = go(run, "prepare")
    wait_ended(list(ids.values()), 60)
    if "module" in words:  # the shell goes on without it
        assert states_of(run)["prepare"] == "done"
        return
    assert states_of(run)["prepare"] == "failed"
    assert words in find_logs(run.root)[0].read_text()
    with pytest.raises(StageError, match=words):
        go(run, "prepare", wait=True)


def test_a_job_id_alone_is_nobody(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run("a-run")
    other = slurm.sh(
        "sbatch", "--parsable", "--mem=50M", "--output=/dev/null", "--wrap", "sleep 30"
    )
    go(run, "prepare", wait=True)
    (line,) = records(RunPaths(run.root))
    append_jsonl(run.root / "submissions.jsonl", {**line, "name": "train", "job": other})
    try:
        assert cancel(run.root) == []
        assert slurm.sh("squeue", "-h", "-j", other, "-o", "%T") in ("RUNNING", "PENDING")
        assert states_of(run)["train"] not in ("running", "waiting")
    finally:
        slurm.sh("scancel", other)


def test_a_run_of_another_cluster_is_not_this_ones(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run("a-run")
    go(run, "prepare", wait=True)
    (line,) = records(RunPaths(run.root))
    far = {**line, "name": "train", "job": "999999", "slurm_cluster": "far", "time": 1.0}
    append_jsonl(run.root / "submissions.jsonl", far)
    with pytest.raises(RequestError, match="of cluster far"):
        go(run)
    cancel(run.root)
    go(run, wait=True)
    once_each(run)


def test_the_limit_moves_and_a_job_is_suspended(slurm: Cluster, slurm_run: MakeRun) -> None:
    place = {"partition": "cpu", "gpus": 0, "time": "1", "save_seconds": 15}
    run = slurm_run(cluster={"train": place}, steps=900).prepared()
    job = go(run, "train")["train"]
    wait_for(run.trace, 60, "train to begin")
    slurm.sh("scontrol", "update", f"jobid={job}", "timelimit=10")
    slurm.sh("scontrol", "suspend", job)
    wait_for(lambda: states_of(run)["train"] == "running", 20, "the state")
    time.sleep(3)
    slurm.sh("scontrol", "resume", job)
    wait_ended([job], 200)
    (tried,) = attempts.read(RunPaths(run.root), "train")  # never told to save at the old limit
    assert tried.verdict == "done"


def test_the_controller_is_away_when_the_requeue_is_asked_for(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    run = slurm_run(steps=60).prepared()
    job = go(run, "train")["train"]
    wait_for(run.trace, 60, "train to begin")
    time.sleep(1)
    supervisor = attempts.read(RunPaths(run.root), "train")[-1].pid
    slurm.stop_controller()
    try:
        os.kill(supervisor, 12)  # USR2, as the node itself would send it
        time.sleep(5)
    finally:
        slurm.script("slurm_up.sh")
    wait_ended([job], 90)
    tried = attempts.read(RunPaths(run.root), "train")
    assert [attempt.verdict for attempt in tried] == ["requeued", "done"]


def test_a_clock_that_is_ahead_ends_nobody(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run(steps=150).prepared()
    job = go(run, "train")["train"]
    paths = RunPaths(run.root)
    wait_for(lambda: attempts.read(paths, "train"), 60, "the first start")
    first = attempts.read(paths, "train")[0]
    slurm.sh("scontrol", "requeue", job)
    wait_for(lambda: attempts.read(paths, "train")[0].ended, 30, "the first start's end")
    first = attempts.read(paths, "train")[0]
    first.started += 300  # the first node's clock was five minutes ahead
    attempts.write(paths, first)
    wait_ended([job], 120)
    assert states_of(run)["train"] == "done"


def test_at_once(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run("a-run", shards=1, steps=10)
    outcomes: list[object] = []

    def one() -> None:
        try:
            outcomes.append(go(run))
        except RequestError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (ids,) = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    wait_ended(list(ids.values()), 120)
    once_each(run)


def test_submit_and_cancel_at_once_leave_all_or_nothing(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run("a-run", shards=1)
    ids: dict[str, str] = {}
    thread = threading.Thread(target=lambda: ids.update(go(run)))
    thread.start()
    wait_for(lambda: records(RunPaths(run.root)), 60, "the first job")
    gone = cancel(run.root)
    thread.join()
    assert set(gone) == set(ids.values()) and len(gone) == 5
    wait_ended(gone, 60)
    go(run, wait=True)
    assert set(states_of(run).values()) == {"done"}


def preempt(slurm: Cluster) -> None:
    argv = ["sbatch", "--partition=cpu", "--nodelist=c1", "--cpus-per-task=4", "--mem=100M"]
    slurm.sh(*argv, "--time=1", "--output=/dev/null", "--wrap", "sleep 5")


def test_a_partition_that_cancels_what_it_preempts(slurm: Cluster, slurm_run: MakeRun) -> None:
    place = {"partition": "lowc", "cpus": 4, "sbatch": {"nodelist": "c1"}}
    run = slurm_run(cluster={"train": place}, steps=100).prepared()

    def strike() -> None:
        wait_for(run.trace, 60, "train to begin")
        preempt(slurm)

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(SavedForRequeue, match="run the same command again"):
        go(run, "train", wait=True)
    thread.join()
    line = train_line(run)
    assert (line.state, "another job took its place" in line.detail) == ("stopped", True)
    run.plan(steps=1)
    go(run, "train", wait=True)
    assert states_of(run)["train"] == "done"


@pytest.fixture
def suspending(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cluster with a partition whose jobs are suspended; all of it is gang-scheduled then."""
    try:
        slurm.stop_controller()
        monkeypatch.setenv("SUSPENDS", "1")
        slurm.script("slurm_up.sh")
        yield
    finally:
        monkeypatch.delenv("SUSPENDS")
        slurm.stop_controller()
        slurm.script("slurm_up.sh")


def test_a_partition_that_suspends_what_it_preempts(
    slurm: Cluster, suspending: None, slurm_run: MakeRun
) -> None:
    place = {"partition": "lows", "cpus": 4, "sbatch": {"nodelist": "c1"}}
    run = slurm_run(cluster={"train": place}, steps=60).prepared()
    job = go(run, "train")["train"]
    wait_for(run.trace, 60, "train")
    preempt(slurm)
    wait_for(lambda: slurm.sh("squeue", "-h", "-j", job, "-o", "%T") == "SUSPENDED", 30, "it")
    line = train_line(run)
    assert (line.state, line.detail) == ("running", "suspended by Slurm")
    wait_ended([job], 90)
    assert states_of(run)["train"] == "done" and len(run.trace()) == 1


def test_a_site_that_refuses_requeue(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run("a-run", shards=1, cluster={"requeue": False}, steps=60).prepared()

    def save_soon() -> None:
        wait_for(lambda: attempts.read(RunPaths(run.root), "train"), 60, "train to begin")
        time.sleep(1)
        slurm.sh("scancel", "--signal=USR2", attempts.read(RunPaths(run.root), "train")[0].job)

    thread = threading.Thread(target=save_soon)
    thread.start()
    with pytest.raises(SavedForRequeue, match="submit again"):
        go(run, wait=True)
    thread.join()
    line = train_line(run)
    assert (line.state, "submit again" in line.detail) == ("stopped", True)
    run.plan(steps=1)
    go(run, wait=True)
    assert set(states_of(run).values()) == {"done"}


def test_a_submission_that_was_killed_before_it_was_recorded(
    slurm: Cluster, slurm_run: MakeRun
) -> None:
    run = slurm_run("a-run", shards=1, steps=100).prepared()
    job = go(run, "train")["train"]
    (run.root / "submissions.jsonl").unlink()
    with pytest.raises(RequestError, match=f"job {job}"):
        go(run, "train")
    assert cancel(run.root) == [job]
    wait_ended([job], 30)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sbatch": {"hold": ""}}, "held by its owner"),
        ({"cpus": 99}, "more than its partition's settings allow|Change prepare.cpus"),
        ({"time": "9-0"}, "more time than its partition allows"),
    ],
)
def test_what_can_never_start_ends_the_wait(
    slurm: Cluster, slurm_run: MakeRun, asked: dict[str, object], words: str
) -> None:
    run = slurm_run(cluster={"defaults": {"partition": "cpu", **asked}})
    with pytest.raises(YelpHpcError, match=words):
        go(run, "prepare", wait=True)
    cancel(run.root)


def test_a_job_that_is_requeued_and_held_ends_the_wait(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run(steps=100).prepared()

    def hold() -> None:
        wait_for(run.trace, 60, "train to begin")
        slurm.sh("scontrol", "requeuehold", records(RunPaths(run.root))[-1]["job"])

    thread = threading.Thread(target=hold)
    thread.start()
    with pytest.raises(StageError, match="requeued and is held"):
        go(run, "train", wait=True)
    thread.join()
    cancel(run.root)


def test_the_node_does_not_see_the_folder(slurm: Cluster, slurm_run: MakeRun) -> None:
    run = slurm_run("a-run")
    file = run.root.parent / "cluster.yaml"
    file.write_text("defaults: {partition: cpu, time: 5, sbatch: {nodelist: c1}}\n")
    pid = int((RUN / "slurmd.c1.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not process_start(pid), 30, "slurmd to end")
    hidden = f"mount -t tmpfs tmpfs {run.root.parent} && exec slurmd -N c1"
    subprocess.run(["unshare", "--mount", "bash", "-c", hidden], check=True)
    try:
        argv = ["doctor", "--cluster", str(file), "--run", str(run.root), "--on-node", "--json"]
        done = yelp_hpc(*argv, check=False, HF_HUB_OFFLINE="1")
        found = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "node job"]
        assert "the node does not see this folder" in found[0]["text"], found
    finally:
        os.kill(int((RUN / "slurmd.c1.pid").read_text()), signal.SIGTERM)
        time.sleep(1)
        slurm.script("slurm_up.sh")


def test_an_admins_note_in_latin_1(slurm: Cluster, slurm_run: MakeRun) -> None:
    note = b"K\xfchlung defekt"
    subprocess.run(
        [b"scontrol", b"update", b"nodename=g2", b"state=drain", b"reason=" + note], check=True
    )
    try:
        assert client.cluster_name() == "lab"
        run = slurm_run("a-run", shards=1)
        go(run, wait=True)
        once_each(run)
        names = [f"--{kind}={run.root.parent / kind}.yaml" for kind in ("cluster", "config")]
        yelp_hpc("init", *names)
        done = yelp_hpc("doctor", *names, check=False, HF_HUB_OFFLINE="1")
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    finally:
        slurm.sh("scontrol", "update", "nodename=g2", "state=resume")
