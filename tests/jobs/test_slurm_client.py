"""What is asked of Slurm, what is made of its answers, and in which environment it is asked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.cluster import Resources
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.site.client import PATIENCE, NoAnswer, client, own_environment, user_name
from yelp_hpc.jobs.site.reasons import never_starts, reason_in_words
from yelp_hpc.jobs.site.refusals import refusal, user_defaults
from yelp_hpc.jobs.slurm import Row
from yelp_hpc.jobs.submission import by_cluster
from yelp_hpc.runtime import use_programs, without_tokens

Asked = list[list[str]]
HEAD = "JOBID|STATE|REASON|NODELIST|TIME|TIME_LIMIT|RESTART_COUNT|SUBMIT_TIME|USER|NAME|COMMAND|\n"


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Exception], Asked]:
    """Slurm says this; returns the questions, as they come."""

    def make(answer: str | Exception) -> Asked:
        asked: Asked = []

        def told(argv: list[str], **options: object) -> str:
            asked.append([*argv, *(f"{k}={v}" for k, v in options.items() if v)])
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(slurm, "client", told)
        return asked

    return make


FORGOTTEN = StageError("squeue failed: slurm_load_jobs error: Invalid job id specified")
DOWN = NoAnswer("squeue failed: Unable to contact slurm controller")


def test_the_queue_is_asked_for_all_tasks_and_a_banner_is_no_row(
    answering: Callable[[str | Exception], Asked],
) -> None:
    line = "7_1|RUNNING|None|g1|1:02|10:00|2|1700|me|yelp-train:a|b|/run/logs/slurm/train-1.sh|\n"
    asked = answering(f"Welcome | to the cluster\n{HEAD}{line}8|COMPLETED|None|g1|1:02|10:00|0|\n")
    (row,) = slurm.queue(["7", "8"], patience=5.0)
    assert (row.job, row.restarts, row.submitted, row.user) == ("7_1", 2, 1700.0, "me")
    assert row.what == "yelp-train:a|b|/run/logs/slurm/train-1.sh"
    assert {"--array", "--states=all", "--jobs=7,8"} <= set(asked[0])
    assert slurm.queue([]) == [] and len(asked) == 1
    fields = ("JobArrayID:|,State:|,Reason:|,NodeList:|,TimeUsed:|,TimeLimit:|,RestartCnt:|,"
              "SubmitTime:|,UserName:|,Name:|,Command:|")  # fmt: skip
    head = ["squeue", "--array", f"--Format={fields}", "--states=all"]
    assert asked[0] == [*head, "--jobs=7,8", "epoch=True", "patience=5.0"]
    ended = slurm.everything(["7", "8"], patience=3.0)[1]
    assert (ended.job, ended.live, ended.runs) == ("8", False, False)
    assert asked[1] == [*head, "--jobs=7,8", "epoch=True", "patience=3.0"]
    answering("JOBID|STATE|REASON|NODELIST|TIME|TIME_LIMIT|RESTARTS|\n")
    assert slurm.queue(["7"]) == []  # a header alone
    answering("Welcome\nUsage: rc-squeue [-m]\n")
    with pytest.raises(StageError, match="name the real one"):
        slurm.queue(["7"])


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


def test_jobs_are_found_by_their_script_or_its_folder(
    answering: Callable[[str | Exception], Asked], tmp_path: Path
) -> None:
    folder, link = tmp_path / "slurm", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    lines = [f"{n}|PENDING|None||0:00|1:00|0|5|me|a|b|{script}|\n" for n, script in enumerate((
        folder / "train-1.sh", folder / "train-11.sh", f"{folder}-2/train-1.sh", "train-1.sh",
        f"{folder}/train-1.sh.bak"))]  # fmt: skip
    asked = answering(HEAD + "".join(lines))

    def found(script: Path) -> list[str]:
        return [row.job for row in slurm.of_script(script, patience=2.0)]

    assert found(link) == found(folder) == ["0", "1", "4"]
    (folder / "train-1.sh").touch()
    assert found(link / "train-1.sh")[0] == found(folder / "train-1.sh")[0] == "0"
    assert "1" not in found(folder / "train-1.sh")
    assert found(tmp_path / "other.sh") == []
    assert asked[0][3:] == ["--states=all", f"--user={user_name()}", "epoch=True",
                            "patience=2.0"]  # fmt: skip


def test_what_is_asked_of_a_job_and_what_is_asked_for_it(
    answering: Callable[[str | Exception], Asked],
) -> None:
    told = "\nWelcome\nJobId=7 JobName=a b JobState=RUNNING Reason=None NodeList=g[1-2] Comment=\n"
    asked = answering(told)
    facts = slurm.facts_of("7_1", patience=4.0)
    assert facts == {"JobId": "7", "JobName": "a b", "JobState": "RUNNING", "Reason": "None",
                     "NodeList": "g[1-2]", "Comment": ""}  # fmt: skip
    assert slurm.state_of("7") == "RUNNING"
    slurm.requeue("7_1")
    slurm.cancel(["7", "8"])
    slurm.cancel([])
    show = ["scontrol", "-o", "show", "job"]
    assert asked == [
        [*show, "7_1", "timeout=60", "epoch=True", "patience=4.0"],
        [*show, "7", "timeout=60", "epoch=True", "patience=10"],
        ["scontrol", "requeue", "7_1"],
        ["scancel", "7", "8", f"patience={PATIENCE}"],
    ]
    answering("JobId=7 UserId=me\n")
    assert slurm.state_of("7") == "GONE"
    answering(StageError("scontrol failed: slurm_load_jobs error: Invalid job id specified"))
    assert slurm.facts_of("7") == {}
    answering("Usage: scontrol\n")
    with pytest.raises(StageError, match=r"scontrol .*Usage: scontrol"):
        slurm.facts_of("7")
    answering(RequestError("scontrol is not installed"))
    assert slurm.state_of("7") == "UNREACHABLE"


def test_the_name_of_the_cluster(
    answering: Callable[[str | Exception], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CLUSTERS", "SBATCH_CLUSTERS"):
        monkeypatch.delenv(name, raising=False)
    asked = answering("Configuration data\nAccountingStorageClusterName = x\nClusterName = lab 2\n")
    assert slurm.cluster_name() == "lab"
    assert asked == [["scontrol", "show", "config"]]
    answering("nothing\n")
    assert slurm.cluster_name() == ""
    for error in (DOWN, RequestError("scontrol is not installed")):
        answering(error)
        assert slurm.cluster_name() == ""
    monkeypatch.setenv("SBATCH_CLUSTERS", "near")
    assert slurm.cluster_name() == "near"
    monkeypatch.setenv("SLURM_CLUSTERS", "far")
    assert slurm.cluster_name() == "far"


@pytest.mark.parametrize(
    ("reason", "words", "never"),
    [
        ("None", "about to be scheduled", False),
        ("(Priority)", "others are ahead of it in the queue", False),
        ("(ReqNodeNotAvail, May be reserved)", "the nodes it asks for are down or reserved", False),
        ("DependencyNeverSatisfied", "an earlier stage failed, so it will never start", True),
        ("(launch failed requeued held)",
         "failed to start and is held: scontrol release", True),
        ("AssocMaxWallDurationPerJobLimit",
         "over a limit of your association (AssocMaxWallDurationPerJobLimit); it will never start",
         True),
        ("user_env_retrieval_failed_requeued_held",
         "failed to start and is held: scontrol release", True),
        ("QOSMinGRES", "under the least of the qos (QOSMinGRES); it will never start", True),
        ("QOSGrpCpuLimit", "over a limit of the qos (QOSGrpCpuLimit)", False),
        ("AssocGrpCPUMinutesLimit",
         "over a limit of your association (AssocGrpCPUMinutesLimit)", False),
        ("(Odd_Reason, more)", "Odd_Reason, more", False),
        ("(XOddX)", "XOddX", False),
        ("partitiontimelimit", "partitiontimelimit", True),
    ],
)  # fmt: skip
def test_why_a_job_waits(reason: str, words: str, never: bool) -> None:
    assert reason_in_words(reason) == words
    assert never_starts(reason) is never


def test_a_job_id_alone_is_nobody() -> None:
    record = {"user": "me", "job_name": "yelp-train:a", "script": "/a/s.sh", "submitted": 1000.0}
    mine = Row("7", "RUNNING", submitted=1000.0, user="me", what="yelp-train:a|/a/s.sh")
    assert slurm.is_of(mine, record)
    changes: list[dict[str, object]] = [
        {"user": "other"},
        {"what": "yelp-train:a|/b/s.sh"},
        {"what": "sleep|/a/s.sh"},
        {"submitted": 900.0},
        {"submitted": 1100.0},
    ]
    for change in changes:
        assert not slurm.is_of(Row(**{**vars(mine), **change}), record)
    requeued = Row(**{**vars(mine), "submitted": 1100.0, "restarts": 1})
    assert slurm.is_of(requeued, record)
    assert slurm.is_of(Row("7", "FAILED", user="me", what="yelp-train:a"), record)  # sacct
    # what one of the two does not tell is no difference
    for silent in ({"user": ""}, {"what": ""}, {"submitted": None}):
        assert slurm.is_of(Row(**{**vars(mine), **silent}), record)
    number = str(os.getuid())  # the directory of users did not answer, then or now
    for then, now in ((user_name(), number), (number, user_name())):
        assert slurm.is_of(Row(**{**vars(mine), "user": now}), {**record, "user": then})
    assert not slurm.is_of(Row(**{**vars(mine), "user": number}), record)
    for key in ("user", "job_name", "submitted"):
        assert slurm.is_of(mine, {k: v for k, v in record.items() if k != key})
    assert slurm.is_of(mine, {**record, "submitted": "then"})
    for moved, own in ((-2.0, False), (-1.9, True), (0.0, True), (1.9, True), (2.0, False)):
        assert slurm.is_of(Row(**{**vars(mine), "submitted": 1000.0 + moved}), record) is own
        again = Row(**{**vars(mine), "submitted": 1000.0 + moved, "restarts": 1})
        assert slurm.is_of(again, record) is (moved > -2)


def test_the_accounting_is_asked_as_every_version_can_answer(
    answering: Callable[[str | Exception], Asked],
) -> None:
    asked = answering("banner\n7|COMPLETED|c1|0:09|1:00|me|a name\n")
    (row,) = slurm.accounting(["7", "9"])
    assert (row.state, row.node, row.user, row.what) == ("COMPLETED", "c1", "me", "a name")
    form = "--format=JobID,State,NodeList,Elapsed,Timelimit,User,JobName"
    head = ["sacct", "--noheader", "--parsable2", "--allocations", form]  # 22.05: no --array
    assert asked == [[*head, "--jobs=7,9", "timeout=20"]]
    assert slurm.accounting([]) == []
    (row, other) = slurm.parse_accounting(
        "7_1|PENDING|None assigned|0:01|1:00|me|a|b|\n7_1|CANCELLED by 0|g1|0:02|1:00|me|a|b\n"
        "7_[2-3]|PENDING|None assigned|0:00|1:00\n7.batch|FAILED|g1|0:01|1:00\n8|FAILED|g1|0\n"
        "9|FAILED|g2|0:03|2:00\n"
    )
    assert row == Row("7_1", "CANCELLED", "", "g1", "0:02", "1:00", 0, None, "me", "a|b")
    assert other == Row("9", "FAILED", "", "g2", "0:03", "2:00")
    assert slurm.parse_accounting("7|PENDING|None assigned|0|1|")[0].node == ""
    assert slurm.parse_accounting("7||g1|0:01|1:00")[0].state == ""
    answering(DOWN)
    with pytest.raises(StageError):
        slurm.accounting(["7"])


def test_a_database_that_searches_some_days_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(argv: list[str], **options: object) -> str:
        if not any(word.startswith("--starttime=") for word in argv):
            raise NoAnswer("sacct failed: slurmdbd: Too wide of a date range in query")
        return "7|FAILED|c1|0:09|1:00|me|a\n"

    monkeypatch.setattr(slurm, "client", told)
    assert slurm.accounting(["7"])[0].state == "FAILED"


def test_the_end_of_a_job_is_what_slurm_counts_and_not_a_clock(
    answering: Callable[[str | Exception], Asked],
) -> None:
    told = "JobId=7 JobState=RUNNING RunTime=00:01:00 TimeLimit=1-00:02:00 EndTime=5"
    answering(told)
    limit = slurm.TimeLimit("7", {})
    assert 86_400 < limit.left <= 86_460
    answering(told.replace("1-00:02:00", "00:01:30"))
    assert 20 < limit.ask() <= 30
    answering(DOWN)
    assert 20 < limit.ask() <= 30
    there = {"SLURM_JOB_START_TIME": "100", "SLURM_JOB_END_TIME": "160"}
    assert 50 < slurm.TimeLimit("7", there).left <= 60
    assert slurm.seconds("02:03") == 123
    assert slurm.seconds("7") == 7
    assert slurm.seconds("1-02:03:04") == 86_400 + 7384
    for wrong in ("", "soon", "1-", "1:x"):
        with pytest.raises(ValueError):
            slurm.seconds(wrong)
    for unlimited in ("UNLIMITED", "Infinite"):
        answering(told)
        assert limit.ask() < math.inf
        answering(told.replace("1-00:02:00", unlimited))
        assert limit.ask() == math.inf
    answering(told.replace("RUNNING", "PENDING"))  # it is requeued: nothing runs down
    assert limit.ask() == math.inf
    for none in (told.replace("RunTime=00:01:00", ""), told.replace("1-00:02:00", "Partition")):
        answering(none)
        assert limit.ask() == math.inf
    answering(DOWN)
    for there in ({"SLURM_JOB_START_TIME": "100"}, {"SLURM_JOB_END_TIME": "160"},
                  {"SLURM_JOB_START_TIME": "100", "SLURM_JOB_END_TIME": "x"},
                  {"SLURM_JOB_START_TIME": "x", "SLURM_JOB_END_TIME": "160"}):  # fmt: skip
        assert slurm.TimeLimit("7", there).left == math.inf
    ended = "JobId=8 ArrayTaskId=0 JobState=COMPLETED\nJobId=7 ArrayTaskId=1 JobState={}"
    for state, lives in (("RUNNING", True), ("FAILED", False)):
        answering(ended.format(state))
        assert slurm.held("7") is lives
    answering(DOWN)
    assert slurm.held("7") is None


def test_a_client_gets_plain_times_and_whole_arrays_and_its_own_words_are_shown() -> None:
    script = 'echo "$SLURM_TIME_FORMAT $SLURM_BITSTR_LEN"; cat'
    assert client(["sh", "-c", script, "x"], epoch=False).startswith("standard 0")
    assert client(["sh", "-c", script, "x"], epoch=True).startswith("%s 0")
    assert client(["sh", "-c", 'echo "$LC_ALL $LANGUAGE"']).strip() == "C C"
    with pytest.raises(StageError, match=r"^sh failed: out of luck$"):
        client(["sh", "-c", "echo out of luck >&2; exit 3"])
    with pytest.raises(StageError, match=r"^sh failed: only here$"):
        client(["sh", "-c", "echo only here; exit 1"])
    with pytest.raises(NoAnswer, match=r"^sleep did not answer within 0 s$"):
        client(["sleep", "60"], timeout=0.1)
    with pytest.raises(
        RequestError, match=r"^no-such-tool is not installed on this machine: log in"
    ):
        client(["no-such-tool"])
    assert "K\ufffdln" in client(["printf", r"K\366ln"])  # an administrator's Latin-1


@pytest.mark.parametrize(
    "said",
    [
        "Socket timed out on send/recv operation",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "Slurm backup controller in standby mode",
        "Munge encode failed: Failed to access socket",
        "fork: Resource temporarily unavailable",
        "Batch job submission failed: I/O error writing script/environment to file",
        "slurm_load_jobs error: Unexpected message received",
        "Welcome\nsbatch: error: Batch job submission failed: Message send failure",
        "Batch job submission failed: Unable to create job record, try again",
        "slurm_load_jobs error: RPC rate limit exceeded",
        "sbatch: error: Batch job submission failed: Protocol authentication error",
        "Slurm temporarily unable to accept job, sleeping and retrying",
        "getaddrinfo() failed: Temporary failure in name resolution",
        "sbatch: error: Unable to open file train.sh: Stale file handle",
    ],
)
def test_no_answer_is_asked_again(said: str, tmp_path: Path) -> None:
    once = (
        f"[ -e {tmp_path}/x ] && echo yes && exit 0; touch {tmp_path}/x; echo '{said}' >&2; exit 1"
    )
    with pytest.raises(NoAnswer):
        client(["sh", "-c", f"echo '{said}' >&2; exit 1"])
    assert client(["sh", "-c", once], patience=5) == "yes\n"


def test_other_names_of_programs() -> None:
    use_programs({"squeue": "echo"})
    try:
        assert client(["squeue", "x"]) == "x\n"
    finally:
        use_programs({})


def test_a_client_sees_nothing_of_the_users_shell_but_the_way_to_its_cluster() -> None:
    hidden = ["SLURM_JOB_ID", "SLURMD_NODENAME", "SRUN_DEBUG", "SUBMITIT_EXECUTOR", "PMI_RANK",
              "PMIX_ID", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RANK", "WORLD_SIZE", "LOCAL_RANK",
              "SBATCH_PARTITION", "SBATCH_EXPORT", "SQUEUE_STATES", "SACCT_FORMAT",
              "SCONTROL_ALL", "SLURM_EXPORT_ENV"]  # fmt: skip
    kept = ["SLURM_CONF", "SLURM_CLUSTERS", "MY_SLURM_NOTE", "PATH"]
    env = dict.fromkeys([*hidden, *kept], "value")
    assert set(own_environment(env)) == set(kept)
    devices = {"CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}
    assert own_environment(devices) == devices
    assert own_environment({**devices, "SLURM_JOB_ID": "7"}) == {"PATH": "/bin"}
    assert own_environment({"SBATCH_CLUSTERS": "far"}) == {"SLURM_CLUSTERS": "far"}


def test_the_users_defaults_fill_in_what_the_cluster_file_leaves_out() -> None:
    env = {"SBATCH_PARTITION": "x", "SBATCH_QOS": "long", "SBATCH_MEM_PER_CPU": "1G",
           "SBATCH_GRES": "gpu:1", "SBATCH_TIMELIMIT": "soon", "SBATCH_EXPORT": "NONE",
           "SBATCH_NO_REQUEUE": "1", "SBATCH_EXCLUSIVE": ""}  # fmt: skip
    want = Resources(partition="gpu", memory="8G", gpus=0, sbatch={"reservation": "r"})
    taken = {option: value for option, (value, _) in user_defaults(want, env).items()}
    assert taken == {"qos": "long", "exclusive": ""}
    assert user_defaults(Resources(), {"SBATCH_TIMELIMIT": "1:00:00"})["time"][0] == "1:00:00"


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("Invalid account or account/partition combination specified", "infer.account"),
        (
            "QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job "
            "violates accounting/QOS policy (job submit limit, user size and/or time limits)",
            "max_array_size",
        ),
        (
            "AssocMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job "
            "violates accounting/QOS policy (job submit limit, ...)",
            "infer.time",
        ),
        ("Batch job submission failed: Invalid job array specification", "Change max_array_size"),
        ("lua: read our page on partitions\nsbatch: error: Batch job submission failed: Requested "
         "time limit is invalid (missing or exceeds some limit)", "infer.time"),
        ("QOSMaxCpuPerNode\nsbatch: error: Batch job submission failed: Job violates "
         "accounting/QOS policy (job submit limit, ...)", "infer.cpus"),
        ("Welcome! Partitions: our page\nPlease ask for a walltime below 48 h.\nsbatch: error: "
         "Batch job submission failed: Unspecified error", "infer.time"),
        ("Batch job submission failed: Invalid node name specified", "sbatch (nodelist)"),
        ("Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: "
         "Requested node configuration is not available", "Change infer.memory or"),
        ("Batch job submission failed: More processors requested than permitted", "infer.cpus"),
        ("Batch job submission failed: User's group not permitted to use this partition",
         "infer.partition"),
        ("Batch job submission failed: Required node not available (down, drained or reserved)",
         "constraint"),
        ("Batch job submission failed: Invalid Trackable RESource (TRES) specification",
         "infer.gpus"),
        ("Batch job submission failed: Access/permission denied", "No key of the cluster config"),
        ("Batch job submission failed: Job dependency problem", "run the same command again"),
        ("Batch job submission failed: Incompatible versions of client and server code",
         "do not fit"),
        ("No cluster 'far' known by database.", "SLURM_CLUSTERS"),
        ("sbatch: error: CLI filter plugin terminated with error", "ask the site's support"),
        ("option '--exclusive' doesn't allow an argument", "infer.sbatch"),
        ("Nodes may be slow, try again later\nsbatch: error: Batch job submission failed: Invalid "
         "qos specification", "infer.qos"),
        ("munge is fine. Slurm temporarily unable to accept job, sleeping and retrying\nsbatch: "
         "error: Batch job submission failed: Invalid feature specification", "infer.constraint"),
        ("lua: --requeue is not permitted\nsbatch: error: Batch job submission failed: Unspecified "
         "error", "Change requeue"),
    ],
)  # fmt: skip
def test_a_refusal_names_a_key_that_exists(said: str, key: str) -> None:
    error = refusal(Job("infer"), f"sbatch: error: {said}")
    assert isinstance(error, RequestError)
    assert key in str(error)
    assert "infer.max_array_size" not in str(error)


def test_an_sbatch_that_hangs_is_no_refusal() -> None:
    assert isinstance(refusal(Job("infer"), "sbatch did not answer within 90 s"), NoAnswer)


@pytest.mark.parametrize(
    ("text", "state", "runs", "live"),
    [
        ("RUNNING,SIGNALING", "RUNNING", True, True),
        ("SIGNALING", "RUNNING", True, True),
        ("RUNNING,CONFIGURING,POWER_UP_NODE", "RUNNING", True, True),
        ("STOPPED", "SUSPENDED", True, True),
        ("COMPLETED,COMPLETING", "COMPLETING", True, True),
        ("FAILED,LAUNCH_FAILED", "FAILED", False, False),
        ("PENDING,SPECIAL_EXIT", "PENDING", False, True),
        ("SPECIAL_EXIT", "PENDING", False, True),
        ("REQUEUE_HOLD", "PENDING", False, True),
        ("CANCELLED by 1000", "CANCELLED", False, False),
        ("CANCELLED+", "CANCELLED", False, False),
    ],
)
def test_flags_of_a_state(
    text: str,
    state: str,
    runs: bool,
    live: bool,
    answering: Callable[[str | Exception], Asked],
) -> None:
    answering(f"{HEAD}7|{text}|None||0:00|1:00|0|5|me|a|/s.sh|\n")
    (row,) = slurm.everything(["7"])
    assert (row.state, row.runs, row.live) == (state, runs, live)
    assert slurm.parse_accounting(f"7|{text}|g1|0:01|1:00|me|a")[0].state == state
    answering(f"JobId=7 JobName=a JobState={text.partition(' ')[0]} Reason=None")
    assert slurm.facts_of("7")["JobState"] == state
    assert slurm.state_of("7") == ("RUNNING" if state == "SUSPENDED" else state)


def test_a_task_that_the_controller_has_forgotten_alone(
    answering: Callable[[str | Exception], Asked],
) -> None:
    answering(StageError("scontrol failed: Job 12_3 not found"))
    assert slurm.facts_of("12_3") == {}


@pytest.mark.parametrize(
    "reason",
    [
        *("job requeued in held state", "(launch_failed_requeued_held)", "JobHoldMaxRequeue"),
        *("PartitionConfig", "BadConstraints", "JobHeldAdmin", "DependencyNeverSatisfied"),
        *("QOSMaxGRESPerJob", "AssocMaxWallDurationPerJobLimit", "QOSMinGRES"),
        *("MaxMemPerLimit", "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed", "DeadLine"),
    ],
)
def test_what_no_waiting_mends(reason: str) -> None:
    assert never_starts(reason)
    assert reason_in_words(reason) != reason.strip("()")


@pytest.mark.parametrize(
    "reason", ["Priority", "Resources", "Dependency", "BeginTime", "AssocGrpGRES", "Licenses",
               "QOSMaxJobsPerUserLimit", "ReqNodeNotAvail, UnavailableNodes:g1"]
)  # fmt: skip
def test_what_waiting_mends(reason: str) -> None:
    assert not never_starts(reason)


def test_one_of_several_clusters_that_the_shell_names(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"executor": "slurm", "job": "1", "slurm_cluster": name} for name in ("a", "b", "c")]
    for named, mine in (("a,b", ["a", "b"]), ("all", ["a", "b", "c"]), ("c", ["c"])):
        monkeypatch.setenv("SLURM_CLUSTERS", named)
        here, elsewhere = by_cluster(lines)
        assert [line["slurm_cluster"] for line in here] == mine
        assert len(elsewhere) == 3 - len(mine)


def test_tokens_are_left_out() -> None:
    env = {"HF_TOKEN": "x", "HUGGING_FACE_HUB_TOKEN": "y", "HF_HOME": "/z"}
    assert without_tokens(env) == {"HF_HOME": "/z"}


def test_what_slurm_does_not_say_is_not_made_up() -> None:
    assert [row.job for row in slurm.parse_queue(
        "7|PENDING|None||0:00|1:00|0|\n8_[1-3%2]|PENDING|None||0:00|1:00|0|\n"
        "9+1|PENDING|None||0:00|1:00|0|\n7x|PENDING|None||0:00|1:00|0|\n7|PENDING|a||0:00|1:00\n"
    )] == ["7", "8_[1-3%2]", "9+1"]  # fmt: skip
    (row,) = slurm.parse_queue("7 |RUNNING|None|g1|0:09|1:00|3|N/A|me|a | b|/s.sh||\n")
    assert row == Row("7", "RUNNING", "None", "g1", "0:09", "1:00", 3, None, "me", "a|b|/s.sh")
    (row,) = slurm.parse_queue("7|RUNNING|None|g1|0:09|1:00|3|170|me\n")
    assert (row.submitted, row.user, row.what) == (170.0, "me", "")
    (row,) = slurm.parse_queue("7|PENDING|(Odd_Reason)||0:00|1:00|N/A|\n")
    assert row == Row("7", "PENDING", "(Odd_Reason)", "", "0:00", "1:00", 0)
    assert reason_in_words(row.reason) == "Odd_Reason"
    assert reason_in_words("(ReqNodeNotAvail, May be reserved)").startswith("the nodes it asks")
