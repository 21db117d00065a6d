"""What is asked of Slurm, word by word, and what is made of its answers and refusals."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial

import pytest

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.slurm import Row

Asked = list[tuple[list[str], dict[str, object]]]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Exception], Asked]:
    """Slurm says this; returns the questions, as they come."""

    def make(answer: str | Exception) -> Asked:
        asked: Asked = []

        def client(argv: list[str], **options: object) -> str:
            asked.append((list(argv), options))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(slurm, "client", client)
        return asked

    return make


FORGOTTEN = StageError("squeue failed: slurm_load_jobs error: Invalid job id specified")
DOWN = StageError("squeue failed: Unable to contact slurm controller")


def test_the_queue_is_asked_for_all_tasks_of_all_jobs(
    answering: Callable[[str | Exception], Asked],
) -> None:
    asked = answering("7_1|RUNNING|None|g1|1:02|10:00|2|\n")
    assert slurm.queue(["7", "8"]) == [Row("7_1", "RUNNING", "None", "g1", "1:02", "10:00", 2)]
    form = "JobArrayID:|,State:|,Reason:|,NodeList:|,TimeUsed:|,TimeLimit:|,RestartCnt:|"
    assert asked == [(["squeue", "--noheader", "--array", f"--Format={form}", "--jobs=7,8"], {})]
    assert slurm.queue([]) == [] and len(asked) == 1


def test_a_queue_that_has_forgotten_the_only_job_is_empty_and_a_dead_one_an_error(
    answering: Callable[[str | Exception], Asked],
) -> None:
    answering(FORGOTTEN)
    assert slurm.queue(["7"]) == []
    assert slurm.state_of("7") == "GONE"
    answering(DOWN)
    with pytest.raises(StageError, match="Unable to contact"):
        slurm.queue(["7"])
    assert slurm.state_of("7") == "UNREACHABLE"
    assert slurm.end_time("7") is None


def test_the_accounting_is_asked_and_may_be_absent(
    answering: Callable[[str | Exception], Asked],
) -> None:
    asked = answering("7|COMPLETED|c1|0:09|1:00\n")
    assert slurm.accounting(["7", "9"]) == [Row("7", "COMPLETED", "", "c1", "0:09", "1:00")]
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", "--array"]
    fields = "--format=JobID,State,NodeList,Elapsed,Timelimit"
    assert asked == [([*argv, fields, "--jobs=7,9"], {"timeout": 20})]
    assert slurm.accounting([]) == [] and len(asked) == 1
    for refusal in (DOWN, RequestError("sacct is not installed")):
        answering(refusal)
        assert slurm.accounting(["7"]) == []


def test_state_end_host_requeue_and_cancel_ask_for_one_thing(
    answering: Callable[[str | Exception], Asked],
) -> None:
    asked = answering("RUNNING |PENDING|")
    assert slurm.state_of("7_3") == "RUNNING"
    squeue = ["squeue", "--noheader"]
    assert asked.pop() == ([*squeue, "--states=all", "--Format=State:|", "--jobs=7_3"], {})
    asked = answering("")
    assert slurm.state_of("7") == "GONE"
    asked = answering("1700000000 |1800000000|")
    assert slurm.end_time("7") == 1_700_000_000.0
    assert asked.pop() == ([*squeue, "--Format=EndTime:|", "--jobs=7"], {"epoch": True})
    answering("N/A|")
    assert slurm.end_time("7") is None
    asked = answering("g1\ng2\n")
    assert slurm.first_host("g[1-2]") == "g1"
    slurm.requeue("7_1")
    slurm.cancel(["7", "8"])
    slurm.cancel([])
    assert [argv for argv, _ in asked] == [
        ["scontrol", "show", "hostnames", "g[1-2]"],
        ["scontrol", "requeue", "7_1"],
        ["scancel", "7", "8"],
    ]


def test_a_client_gets_plain_times_and_whole_arrays_and_its_own_words_are_shown() -> None:
    script = 'echo "$SLURM_TIME_FORMAT $SLURM_BITSTR_LEN"; cat'
    assert slurm.client(["sh", "-c", script, "x"], epoch=False).startswith("standard 0")
    assert slurm.client(["sh", "-c", script, "x"], epoch=True).startswith("%s 0")
    with pytest.raises(StageError, match=r"^sh failed: out of luck$"):
        slurm.client(["sh", "-c", "echo out of luck >&2; exit 3"])
    with pytest.raises(StageError, match=r"^sh failed: only here$"):
        slurm.client(["sh", "-c", "echo only here; exit 1"])
    with pytest.raises(StageError, match=r"^sleep did not answer within 0 s$"):
        slurm.client(["sleep", "60"], timeout=0.1)
    with pytest.raises(
        RequestError, match=r"^no-such-tool is not installed on this machine: log in"
    ):
        slurm.client(["no-such-tool"])


def test_a_submission_sees_nothing_of_an_outer_job_but_the_way_to_its_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = ["SLURM_JOB_ID", "SLURMD_NODENAME", "SRUN_DEBUG", "SUBMITIT_EXECUTOR", "PMI_RANK",
              "PMIX_ID", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RANK", "WORLD_SIZE",
              "LOCAL_RANK"]  # fmt: skip
    kept = ["SLURM_CONF", "SBATCH_ACCOUNT", "MY_SLURM_NOTE", "PATH"]
    for name in [*hidden, *kept[:-1]]:
        monkeypatch.setenv(name, f"value of {name}")
    before = dict(os.environ)
    with slurm.clean_environment():
        assert not set(hidden) & set(os.environ)
        assert set(kept) <= set(os.environ)
        assert set(before) - set(os.environ) == set(hidden)
    assert dict(os.environ) == before


def test_nothing_is_submitted_where_sbatch_or_srun_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(there: set[str], name: str) -> str | None:
        return name if name in there else None

    nothing: set[str] = set()
    for there in ({"sbatch"}, {"srun"}, nothing):
        monkeypatch.setattr(shutil, "which", partial(look, there))
        with pytest.raises(RequestError, match=r"^sbatch is not installed on this machine: log in"):
            slurm.require_sbatch()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    slurm.require_sbatch()


def test_tokens_are_left_out() -> None:
    env = {"HF_TOKEN": "x", "HUGGING_FACE_HUB_TOKEN": "y", "HF_HOME": "/z"}
    assert slurm.without_tokens(env) == {"HF_HOME": "/z"}
