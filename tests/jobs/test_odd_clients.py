"""Clients as sites have them, played: a job is queued once, found again, and cancelled alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.fake_run import FakeRun
from yelp_hpc.config import LoadedConfig
from yelp_hpc.errors import RequestError, SavedForRequeue, StageError, YelpHpcError
from yelp_hpc.jobs import chain, submission
from yelp_hpc.jobs.chain import cancel, submit
from yelp_hpc.jobs.site.client import user_name
from yelp_hpc.jobs.status import collect_status
from yelp_hpc.jobs.watch import follow
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import append_jsonl, read_object
from yelp_hpc.rundir.manifest import Asked
from yelp_hpc.rundir.paths import RunPaths

HEAD = 'echo "JOBID|STATE|REASON|NODELIST|TIME|LIMIT|RESTARTS|SUBMIT|USER|NAME|COMMAND|"\n'
QUEUED = (
    'n=$(($(cat $S/n 2>/dev/null || echo 100) + 1)); echo $n >$S/n; s="${@: -1}"\n'
    'name=$(grep -o "job-name=.*" "$s"); echo "$n|PENDING|Resources||0:00|10:00|0|1700000000|'
    f'{user_name()}|${{name#*=}}|$s|" >>$S/jobs\n'
)
ASKED = (
    'case "$*" in *"show config"*) echo "ClusterName = lab";;\n'
    '*"show job"*) while IFS="|" read -r id state a b c d e f g h script; do '
    '[ "$id" = "${@: -1}" ] && echo "JobId=$id JobState=$state SubmitTime=1700000000 '
    'JobName=$h Command=${script%|}" && exit; '
    'done <$S/jobs; echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;; esac\n'
)
SOUND = {
    "sbatch": f"{QUEUED}echo $n",
    "squeue": f"{HEAD}cat $S/jobs",
    "scontrol": ASKED,
    "scancel": 'for i in "$@"; do grep -v "^$i|" $S/jobs >$S/left; mv $S/left $S/jobs; done',
    "sacct": "exit 0",
    "srun": "exit 0",
}
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
SITES: dict[str, dict[str, str]] = {
    "as they are": {},
    "a queue that shows nothing yet": {"squeue": HEAD},
    "a queue without a word": {"squeue": "exit 0"},
    "no squeue": {"squeue": ""},
    "several clusters": {"squeue": f'echo "CLUSTER: lab"\n{HEAD}cat $S/jobs'},
    "no scontrol": {"scontrol": ""},
    "a scontrol that does not answer": {"scontrol": AWAY},
    "no sacct": {"sacct": ""},
    "a sacct without a database": {"sacct": "echo 'Slurm accounting is off' >&2; exit 1"},
    "words around the id": {"sbatch": f'{QUEUED}echo "lua: hi"; echo "Submitted batch job $n"'},
    "an id on a line of another system": {"sbatch": f'{QUEUED}printf "hi\\r\\n$n\\r\\n"'},
    "numbers around the id": {"sbatch": f"{QUEUED}echo 17; echo $n; echo Credits left:; echo 42"},
    "colours around the id": {"sbatch": f"{QUEUED}printf '\\033[32m%s\\033[0m\\n' $n"},
    "a script that fails after the job was queued": {
        "sbatch": f"{QUEUED}echo $n; echo 'cannot write the mail' >&2; exit 3"
    },
    "a script that hands in a copy": {
        "sbatch": f"{QUEUED.replace('|$s|', '|/spool/$n.sh|')}echo $n"
    },
    "a script that hands in standard input": {
        "sbatch": f"{QUEUED.replace('|$s|', '|(null)|')}echo $n"
    },
    "a plugin that renames": {"sbatch": f"{QUEUED.replace('${name#', 'a lab: ${name#')}echo $n"},
    "states with flags": {"sbatch": f"{QUEUED.replace('PENDING', 'PENDING,LAUNCH_FAILED')}echo $n"},
    "a queue of everybody's": {
        "squeue": f'{HEAD}echo "7|PENDING|JobHeldUser||0:00|1:00|0|17|eve|yelp-train:a-run|/x|"\n'
        "cat $S/jobs"
    },
    "a script that was lost once": {
        "sbatch": "[ -e $S/once ] || { touch $S/once; echo 'sbatch: error: Batch job submission "
        f"failed: I/O error writing script/environment to file' >&2; exit 1; }}\n{QUEUED}echo $n"
    },
}


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """Puts these clients, and nothing else of Slurm, on PATH; returns what Slurm holds, a file."""
    folder, state = tmp_path / "bin", tmp_path / "state"
    for made in (folder, state):
        made.mkdir()
    for tool in ("bash", "cat", "grep", "touch", "mv", "env"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    monkeypatch.setenv("PATH", str(folder))

    def make(clients: dict[str, str]) -> Path:
        for name, script in {**SOUND, **clients}.items():
            (folder / name).unlink(missing_ok=True)
            if script:
                (folder / name).write_text(f"#!{folder}/bash\nS={state}\n{script}\n")
                (folder / name).chmod(0o755)
        return state / "jobs"

    (state / "jobs").touch()
    return make


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    cluster = {"defaults": {"partition": "cpu", "time": "10"}, "python": sys.executable}
    return FakeRun(tmp_path / "a-run", 1, cluster).prepared()


def go(run: FakeRun) -> list[str]:
    made = submit("train", run.root, run.config, run.cluster, say=lambda text: None)
    return [each.job for each in made]


def state_of(run: FakeRun) -> str:
    return next(x.state for x in collect_status(run.root, run.config)[0] if x.name == "train")


@pytest.mark.parametrize("site", SITES)
def test_a_job_is_queued_once_found_again_and_cancelled(
    play: Callable[[dict[str, str]], Path], run: FakeRun, site: str
) -> None:
    jobs = play(SITES[site])
    assert go(run) == ["101"]
    with pytest.raises(RequestError, match="train is job 101"):
        go(run)
    assert state_of(run) == "waiting"
    assert cancel(run.root) == ["101"]
    assert jobs.read_text() == ""
    assert state_of(run) == "cancelled"


@pytest.mark.parametrize("site", ["a queue that shows nothing yet", "a queue without a word"])
def test_what_squeue_never_shows_is_asked_of_the_controller(
    play: Callable[[dict[str, str]], Path], run: FakeRun, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "YOUNG_SECONDS", 0.0)
    jobs = play(SITES[site])
    go(run)
    with pytest.raises(RequestError, match="train is job 101"):
        go(run)
    attempts.write(RunPaths(run.root), attempts.Attempt("train", "101", 0))
    assert state_of(run) == "running"
    play({**SITES[site], "scontrol": AWAY})
    with pytest.raises(RequestError, match="train is job 101"):  # its supervisor shows life
        go(run)
    play(SITES[site])
    jobs.write_text("")
    (record,) = (run.root / "logs" / "attempts" / "train").iterdir()
    os.utime(record, (1.0, 1.0))
    assert go(run) == ["102"]


@pytest.mark.parametrize("clients", [{}, {"scontrol": ""}, {"scontrol": AWAY}])
@pytest.mark.parametrize("whose", ["somebody", user_name()])
def test_an_id_that_another_job_has_now_is_left_alone(
    play: Callable[[dict[str, str]], Path], run: FakeRun, whose: str, clients: dict[str, str]
) -> None:
    jobs = play(clients)
    go(run)
    stranger = f"101|RUNNING|None|g1|0:10|10:00|0|1600000000|{whose}|x|/home/x.sh|\n"
    jobs.write_text(stranger)
    assert cancel(run.root) == []
    assert jobs.read_text() == stranger
    assert go(run) == ["102"]


def test_a_chain_that_is_refused_half_way_is_taken_back(
    play: Callable[[dict[str, str]], Path], run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = '[ "$(cat $S/n)" = 102 ] && echo "QOSMaxSubmitJobPerUserLimit" >&2 && exit 1'
    jobs = play({"sbatch": f"{limit}\n{QUEUED}echo $n", "squeue": f"{HEAD}exit 0"})
    with pytest.raises(RequestError, match="max_array_size"):
        submit("all", run.root, run.config, run.cluster)
    assert "cancelled what was queued before: 101, 102" in capsys.readouterr().err
    assert jobs.read_text() == ""
    assert state_of(run) == "cancelled"
    play({})
    assert go(run) == ["103"]


def test_a_queue_that_cannot_be_asked_is_no_empty_one(
    play: Callable[[dict[str, str]], Path], run: FakeRun
) -> None:
    jobs = play({})
    go(run)
    before = jobs.read_text()
    play({"squeue": "echo 'out of memory' >&2; exit 139"})
    with pytest.raises(YelpHpcError, match="squeue failed: out of memory"):
        go(run)
    with pytest.raises(YelpHpcError, match="squeue failed: out of memory"):
        cancel(run.root)
    assert jobs.read_text() == before


def test_an_error_without_an_exit_code_is_no_empty_queue(
    play: Callable[[dict[str, str]], Path], run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "YOUNG_SECONDS", 0.0)
    monkeypatch.setattr(chain, "PATIENCE", 0.0)
    play({})
    go(run)
    lost = AWAY.replace("exit 1", "exit 0")
    play({"squeue": lost, "scontrol": lost})
    with pytest.raises(StageError, match="Unable to contact slurm controller"):
        go(run)
    with pytest.raises(StageError, match="Unable to contact slurm controller"):
        cancel(run.root)
    play({})
    cancel(run.root)
    play({"sbatch": "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2"})
    with pytest.raises(RequestError, match=r"Change train\.account"):
        go(run)


def test_a_job_that_slurm_has_forgotten_and_whose_supervisor_lives_is_elsewhere(
    play: Callable[[dict[str, str]], Path], run: FakeRun
) -> None:
    """Two clusters of one name, on one file system."""
    jobs = play({})
    go(run)
    jobs.write_text("")
    attempts.write(RunPaths(run.root), attempts.Attempt("train", "101", 0))
    with pytest.raises(RequestError, match="train is job 101"):
        go(run)


def test_what_runs_beyond_this_machine_is_not_called_cancelled(
    play: Callable[[dict[str, str]], Path], run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(run.root)
    play({})
    go(run)
    (line,) = submission.records(paths)
    append_jsonl(paths.submissions, {**line, "slurm_cluster": "far"})
    attempts.write(paths, attempts.Attempt("train", "101", 0))
    with pytest.raises(StageError, match=r"runs on cluster far: end it there \(scancel 101\)"):
        cancel(run.root)
    with pytest.raises(RequestError, match="of cluster far"):
        go(run)
    local = {**line, "executor": "local", "job": "local-77", "host": "g7", "name": "prepare"}
    append_jsonl(paths.submissions, local)
    attempts.write(paths, attempts.Attempt("prepare", "local-77", 0))
    with pytest.raises(StageError, match=r"prepare runs on g7: end it there \(kill 77\)"):
        cancel(run.root)


def test_of_several_clusters_one_has_to_be_named(
    play: Callable[[dict[str, str]], Path], run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = play({"scancel": f'echo "$*" >>$S/asked\n{SOUND["scancel"]}'})
    go(run)
    for several in ("lab,far", "all"):
        monkeypatch.setenv("SLURM_CLUSTERS", several)
        for dry_run in (True, False):
            with pytest.raises(RequestError, match="export SLURM_CLUSTERS=NAME"):
                submit(
                    "all" if dry_run else "infer",
                    run.root,
                    run.config,
                    run.cluster,
                    dry_run=dry_run,
                )
    assert cancel(run.root) == ["101"]
    assert jobs.with_name("asked").read_text() == "--clusters=lab 101\n"


def test_what_ended_meanwhile_is_no_error_of_cancel(
    play: Callable[[dict[str, str]], Path], run: FakeRun
) -> None:
    said = "scancel: error: Kill job error on job id 101: {}"
    for why, ends in (("Invalid job id specified", True), ("Access/permission denied", False)):
        play({"scancel": f"echo '{said.format(why)}' >&2; exit 1"})
        if ends:
            go(run)
            assert cancel(run.root) == ["101"]
            (play({}).with_name("jobs")).write_text("")
        else:
            go(run)
            with pytest.raises(StageError, match=why):
                cancel(run.root)


def waited(run: FakeRun, verdict: str = "done", reason: str = "") -> str:
    """The last word of a wait for a job that ends two seconds later."""
    ended = attempts.Attempt("train", "101", 0, ended=time.time(), verdict=verdict, reason=reason)
    later = threading.Timer(2, attempts.write, (RunPaths(run.root), ended))
    said: list[str] = []
    later.start()
    submit("train", run.root, run.config, run.cluster, wait=True, say=said.append)
    later.join()
    return said[-1]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(follow, "ABSENT_SECONDS", 0.1)


@pytest.mark.usefixtures("hasty")
def test_what_only_vanishes_from_the_queue_is_waited_for(
    play: Callable[[dict[str, str]], Path], run: FakeRun
) -> None:
    play({"squeue": f"{HEAD}[ -e $S/shown ] || cat $S/jobs; touch $S/shown"})
    assert waited(run) == "train (job 101): ended"


@pytest.mark.usefixtures("hasty")
def test_what_saved_and_is_no_longer_queued_is_waited_for_no_more(
    play: Callable[[dict[str, str]], Path], run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "YOUNG_SECONDS", float("inf"))
    play({"squeue": HEAD, "scontrol": "echo 'slurm_load_jobs error: Invalid job id' >&2; exit 1"})
    with pytest.raises(SavedForRequeue, match="saved after SIGTERM"):
        waited(run, "stopped", "saved after SIGTERM")


def test_a_refusal_leaves_what_lay_in_the_folder_before(
    play: Callable[[dict[str, str]], Path], run: FakeRun, tmp_path: Path
) -> None:
    play({"sbatch": "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2"})
    note, new = tmp_path / "mine" / "logs" / "note.txt", tmp_path / "new"
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    asked = Asked(LoadedConfig(run.config, run.config.model_dump(mode="json"), {}), "c.yaml")
    for place in (tmp_path / "mine", new):
        with pytest.raises(RequestError, match="Invalid account"):
            submit("prepare", place, run.config, run.cluster, asked=asked, say=lambda text: None)
    assert note.read_text() == "mine" and not (tmp_path / "mine" / "run.json").exists()
    assert not new.exists()


def test_a_refusal_leaves_what_a_stage_wrote_meanwhile(
    play: Callable[[dict[str, str]], Path], run: FakeRun
) -> None:
    paths = RunPaths(run.root)
    before = read_object(paths.run_json)
    wrote = {**before, "precision": {"chosen": "bf16"}, "snapshot": "code/abc"}
    (run.root.parent / "wrote").write_text(json.dumps(wrote))
    no = "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1"
    play({"sbatch": f"cat {run.root.parent}/wrote >{paths.run_json}; {no}"})
    with pytest.raises(RequestError, match="Invalid account"):
        submit("all", run.root, run.config, run.cluster, say=lambda text: None)
    assert read_object(paths.run_json) == {**before, "precision": {"chosen": "bf16"}}


def test_ctrl_c_between_two_jobs_leaves_none_of_them(
    play: Callable[[dict[str, str]], Path], run: FakeRun
) -> None:
    jobs = play({"sbatch": f"[ -s $S/jobs ] && kill -INT $PPID\n{QUEUED}echo $n"})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            submit("all", run.root, run.config, run.cluster, say=lambda text: None)
    finally:
        signal.signal(signal.SIGINT, before)
    play({})
    assert jobs.read_text() == ""
    assert go(run) == ["103"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("verdict", "reason", "kind"),
    [
        ("failed", "exit code 2\nrows.csv: row 7 has no label", RequestError),
        ("failed", "exit code 25\nodd", StageError),
        ("failed", "exit code 1\nexit code 2", StageError),
    ],
)
def test_a_wait_ends_as_the_local_chain_does(
    play: Callable[[dict[str, str]], Path],
    run: FakeRun,
    verdict: str,
    reason: str,
    kind: type[YelpHpcError],
) -> None:
    play({"squeue": f"{HEAD}[ -e $S/shown ] || cat $S/jobs; touch $S/shown"})
    with pytest.raises(kind, match=reason.partition("\n")[2]):
        waited(run, verdict, reason)


@pytest.mark.usefixtures("hasty")
def test_without_squeue_the_wait_asks_the_controller_and_without_both_it_says_so(
    play: Callable[[dict[str, str]], Path], run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "YOUNG_SECONDS", 0.5)
    play({"squeue": ""})
    assert waited(run) == "train (job 101): ended"
    play({"squeue": "", "scontrol": ""})
    with pytest.raises(StageError, match="were submitted, but neither squeue nor scontrol"):
        submit("train", run.root, run.config, run.cluster, wait=True, say=lambda text: None)


ENDS = {
    "no python": (
        "/var/spool/slurmd/job00101/slurm_script: line 31: /opt/py/bin/python: No such file or "
        "directory",
        "srun: error: g1: task 0: Exited with exit code 127",
    ),
    "a site's epilog after the error": (
        "slurmstepd: error: execve(): /opt/py/bin/python: No such file or directory",
        "srun: error: g1: task 0: Exited with exit code 2\n\n=== Job 101 of me on lab ===\n"
        "CPU utilised: 0 %\nBilled: 3 SU\n==========",
    ),
    "a module that is not there": (
        'Lmod has detected the following error: The following module(s) are unknown: "python/9"',
        "Please check the spelling, or try:\n   $ module spider python/9\n",
    ),
    "out of memory as it began": (
        "slurmstepd: error: *** JOB 101 ON g1 CANCELLED AT 2026-01-01T00:00:00 ***",
        "Disk I/O: 1 MB",
    ),
    "nothing that looks like an error": ("give up", "\n"),
}


@pytest.mark.parametrize("end", ENDS)
def test_why_a_job_died_is_said_whatever_the_site_writes_below(
    play: Callable[[dict[str, str]], Path], run: FakeRun, end: str
) -> None:
    telling, below = ENDS[end]
    jobs = play({"sacct": "echo '101|FAILED|g1|0:01|10:00|" + user_name() + "|yelp-train:a-run'"})
    go(run)
    jobs.write_text("")
    out = run.root / "logs" / "slurm" / "101_0_log.out"
    out.write_text(f"Welcome to g1\nquota: 80 %\n{telling}\n{below}")
    (train,) = [x for x in collect_status(run.root, run.config)[0] if x.name == "train"]
    assert (train.state, train.detail) == ("failed", f"Slurm says FAILED: {telling}")
