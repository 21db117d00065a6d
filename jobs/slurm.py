"""What Slurm knows of jobs, and what it is asked to do: squeue, sacct, scontrol and scancel.

squeue is read through --Format and not --json: Slurm 22.05's --json ignores -j and prints every job
of the cluster, and its schema changes from release to release. A job asks about itself through
scontrol: squeue may stand behind a cache of a minute. Times come as differences that Slurm made
itself, never as a wall clock to be compared with this machine's.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs.site.client import PATIENCE, NoAnswer, client, no_client, user_name

_FIELDS = (
    *("JobArrayID", "State", "Reason", "NodeList", "TimeUsed", "TimeLimit", "RestartCnt"),
    *("SubmitTime", "UserName", "Name", "Command"),
)
_ACCOUNTED = "JobID,State,NodeList,Elapsed,Timelimit,User,JobName"
_RUNS = ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "STOPPED", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class Row:
    """A job or array task as squeue or sacct sees it. Times are Slurm's own text."""

    job: str
    """`123` or `123_4`."""
    state: str
    reason: str = ""
    node: str = ""
    elapsed: str = ""
    limit: str = ""
    restarts: int = 0
    submitted: float | None = None
    """By the controller's clock; a requeue moves it."""
    user: str = ""
    what: str = ""
    """Its name and its script, `NAME|SCRIPT`: a run may be called anything."""

    @property
    def parent(self) -> str:
        """The id of the array; of a single job its own."""
        return self.job.partition("_")[0]

    @property
    def runs(self) -> bool:
        """Whether it is on a node, or about to leave it."""
        return self.state in _RUNS

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state not in FINISHED


FINISHED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "PREEMPTED", "REVOKED"),
        *("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"),
    }
)
# a flag of a job may stand in the place of its state
_FLAGS = {
    **dict.fromkeys(("SIGNALING", "RESIZING"), "RUNNING"),
    **dict.fromkeys(("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"), "PENDING"),
    **dict.fromkeys(("RESV_DEL_HOLD", "LAUNCH_FAILED", "EXPEDITING"), "PENDING"),
    **{"STOPPED": "SUSPENDED", "POWER_UP_NODE": "CONFIGURING"},
}
_FORGOTTEN = re.compile(r"Invalid job id|Job \S+ not found", re.IGNORECASE)
_ENDED = re.compile(r"Invalid job id|already (completing|completed|done|finished)", re.IGNORECASE)


def _state(text: str) -> str:
    """The state in `CANCELLED by 0`, `CANCELLED+`, `RUNNING,SIGNALING` or `REQUEUE_HOLD`."""
    first, *flags = text.strip().partition(" ")[0].rstrip("+*").replace("+", ",").split(",")
    if "COMPLETING" in flags:  # as where one word is shown
        return "COMPLETING"
    return _FLAGS.get(first, first)


def queue(job_ids: Sequence[str], patience: float = 0.0) -> list[Row]:
    """The array tasks and jobs of `job_ids` that Slurm still holds, finished ones left out."""
    return [row for row in everything(job_ids, patience) if row.live]


def everything(job_ids: Sequence[str], patience: float = 0.0) -> list[Row]:
    """As `queue`, with those that ended not long ago."""
    if not job_ids:
        return []
    rows = _squeue(["--states=all", f"--jobs={','.join(job_ids)}"], patience)
    asked = {job.partition("_")[0] for job in job_ids}
    return [row for row in rows if row.parent in asked]  # a site's script may show more


def of_script(script: Path, patience: float = 0.0) -> list[Row]:
    """What Slurm holds, or held a moment ago, of a script, or of the scripts in a folder.

    It finds a job whose sbatch was killed or timed out before it could tell the id.
    """
    rows = _squeue(["--states=all", f"--user={user_name()}"], patience)
    at = [f"|{place}" for place in {str(script), os.path.realpath(script)}]
    ends = ("/" if os.path.isdir(script) else "", "")  # noqa: PTH112 - never raises
    return [row for row in rows if any(f"{a}{ends[0]}" in f"|{row.what}" for a in at)]


def _squeue(which: Sequence[str], patience: float) -> list[Row]:
    form = ",".join(f"{field}:|" for field in _FIELDS)
    try:
        text = client(
            ["squeue", "--array", f"--Format={form}", *which], epoch=True, patience=patience
        )
    except StageError as error:
        if not _FORGOTTEN.search(str(error)):  # what squeue says of the only id
            raise
        return []
    # with a header, so that an empty queue differs from a script that prints something else
    if text.strip() and not any(line.count("|") >= 7 for line in text.splitlines()):
        raise no_client("squeue", text)
    return parse_queue(text)


def parse_queue(text: str) -> list[Row]:
    """Rows of `squeue --Format`; what a site's banner or the header says is left out."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 7 or not re.fullmatch(r"\d+(_\S+)?(\+\d+)?", cells[0]):
            continue
        job, state, reason, node, used, limit, restarts = cells[:7]
        submitted, user, *what = [*cells[7:], "", ""]
        rows.append(
            Row(
                *(job, _state(state), reason, node, used, limit),
                restarts=int(restarts) if restarts.isdigit() else 0,
                submitted=float(submitted) if submitted.isdigit() else None,
                user=user,
                what="|".join(what).rstrip("|"),
            )
        )
    return rows


def is_of(row: Row, record: Mapping[str, Any]) -> bool:
    """Whether a row is the job of a submission's record: an id alone is nobody's.

    Ids start anew when a site sets its Slurm up again. What one of the two does not tell is no
    difference.
    """
    name, script = record.get("job_name"), record.get("script")
    users = {row.user, str(record.get("user") or "")} - {""}
    # a number where the directory of users did not answer
    if len(users) > 1 and not users <= {user_name(), str(os.getuid())}:
        return False
    if row.what and name and row.what not in (name, f"{name}|{script}"):  # sacct: no script
        return False
    known = record.get("submitted")
    if row.submitted is None or not isinstance(known, int | float):
        return True
    later = row.submitted - known
    return later > -2 and (later < 2 or row.restarts > 0)  # a requeue submits it again


def accounting(job_ids: Sequence[str]) -> list[Row]:
    """What sacct remembers of jobs, the last run of each.

    Raises:
        RequestError: there is no sacct here.
        StageError: it does not answer, or keeps no accounts.
    """
    if not job_ids:
        return []
    # tasks of an array have a line each once they ran; Slurm 22.05 knows no --array
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", f"--format={_ACCOUNTED}"]
    argv += [f"--jobs={','.join(job_ids)}"]
    try:
        text = client(argv, timeout=20)
    except StageError as error:
        if "too wide" not in str(error).lower():  # sites may refuse to search all the years
            raise
        text = client([*argv, "--starttime=now-7days"], timeout=20)
    return parse_accounting(text)


def parse_accounting(text: str) -> list[Row]:
    """Rows of `sacct --parsable2`; `CANCELLED by 0` becomes `CANCELLED`."""
    rows = {}
    for line in text.splitlines():
        cells = [*line.split("|"), *[""] * 7]
        job, state, node, elapsed, limit, user = cells[:6]
        if re.fullmatch(r"\d+(_\d+)?", job) and line.count("|") >= 4:  # no banner, nothing pending
            node = "" if node.startswith("None") else node
            what = "|".join(cells[6:]).rstrip("|")
            rows[job] = Row(job, _state(state), "", node, elapsed, limit, 0, None, user, what)
    return list(rows.values())


def facts_of(job: str, patience: float = 0.0, timeout: float = 60) -> dict[str, str]:
    """What `scontrol show job` says of one job or array task; {} when it does not know it.

    Of an array: of a task that has not ended, if there is one.

    Raises:
        RequestError: there is no scontrol here.
        StageError: it does not answer.
    """
    try:
        argv = ["scontrol", "-o", "show", "job", job]
        text = client(argv, timeout=timeout, epoch=True, patience=patience)
    except StageError as error:
        if _FORGOTTEN.search(str(error)):
            return {}
        raise
    lines = [line for line in text.splitlines() if "JobId=" in line]
    if not lines:
        raise no_client("scontrol", text)
    told = [dict(reversed(_PAIRS.findall(line))) for line in lines]  # a comment's come last
    for facts in told:
        facts["JobState"] = _state(facts.get("JobState", "GONE"))
    return next((facts for facts in told if facts["JobState"] not in FINISHED), told[0])


_PAIRS = re.compile(r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)")
"""A value may hold blanks, as a job's name and its script's."""


def held(job: str) -> bool | None:
    """Whether the controller itself holds a job that has not ended; None: no answer."""
    try:
        state = facts_of(job).get("JobState", "GONE")
    except (StageError, RequestError):
        return None
    return state not in {"GONE", *FINISHED}


def state_of(job: str) -> str:
    """The state of one job or array task now.

    `GONE` when Slurm does not know it, `UNREACHABLE` when it cannot be asked. A job that is being
    cancelled, preempted or requeued is COMPLETING or PENDING, never RUNNING.
    """
    try:
        state = facts_of(job, patience=10).get("JobState", "GONE")
        return "RUNNING" if state in ("SUSPENDED", "CONFIGURING") else state
    except (StageError, RequestError):
        return "UNREACHABLE"


class TimeLimit:
    """The end that Slurm sets to this job, as this machine's own clock counts.

    The limit moves: an administrator changes it, a suspended job's stands still.
    """

    def __init__(self, job: str, environ: Mapping[str, str]) -> None:
        self._job = job
        self._end = math.inf
        start, end = environ.get("SLURM_JOB_START_TIME"), environ.get("SLURM_JOB_END_TIME")
        if start and end and start.isdigit() and end.isdigit():  # since 23.02: needs no client
            self._end = time.monotonic() + int(end) - int(start)
        self.ask()

    @property
    def left(self) -> float:
        """Seconds, `math.inf` where no limit is known."""
        return self._end - time.monotonic()

    def ask(self) -> float:
        """Ask Slurm again and return `left`; no answer leaves what was known."""
        try:
            # a client that hangs must not use up the time that is left to save
            facts = facts_of(self._job, timeout=min(20.0, max(2.0, self.left / 4)))
            limit, used = facts.get("TimeLimit", ""), facts.get("RunTime", "")
            if limit.upper() in ("UNLIMITED", "INFINITE"):
                self._end = math.inf
            elif limit and used and facts.get("JobState") != "PENDING":
                self._end = time.monotonic() + seconds(limit) - seconds(used)
        except (StageError, RequestError, ValueError):
            pass
        return self.left


def seconds(text: str) -> int:
    """Seconds of Slurm's `D-HH:MM:SS`, `HH:MM:SS` or `MM:SS`. Raises ValueError for other text."""
    days, _, clock = text.rpartition("-")
    count = 0
    for part in clock.split(":"):
        count = count * 60 + int(part)
    return int(days or 0) * 86_400 + count


def requeue(job: str) -> None:
    """Ask for the job, or the one array task, to be run again.

    Raises:
        RequestError: there is no scontrol here.
        StageError: it was refused (`NoAnswer`: nobody answered).
    """
    client(["scontrol", "requeue", job])


def elsewhere(job: str, nodes: Sequence[str]) -> str:
    """The list of nodes for `exclude`: those that the job avoids already, and `nodes`.

    Raises:
        StageError: Slurm does not answer, or the partition has not nodes enough beside them.
    """
    facts = facts_of(job, patience=10)
    before = facts.get("ExcNodeList", "(null)")
    partition = facts.get("Partition", "").partition(",")[0]
    text = client(["scontrol", "-o", "show", "partition", partition])
    there = re.search(r"\bNodes=(\S+)", text)
    avoided = [*([] if before == "(null)" else [before]), *nodes]
    needed = int(facts.get("NumNodes", "1").partition("-")[0])
    if there and len(_hostnames(there[1]) - _hostnames(",".join(avoided))) < needed:
        raise StageError(f"partition {partition} has no other node")
    return ",".join(avoided)


def _hostnames(nodes: str) -> set[str]:
    """The names in a list as Slurm writes it, `c[1-3],d7`."""
    return set(client(["scontrol", "show", "hostnames", nodes]).split())


def exclude(job: str, nodes: str) -> None:
    """Keep a job that waits, as after a requeue, off nodes, as far as Slurm lets it.

    Asked from inside the job that is being ended, the client may be ended with it: it is asked
    again.
    """
    for _ in range(5):
        with suppress(StageError):
            client(["scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}"])
            return
        time.sleep(0.2)


def cancel(job_ids: Sequence[str], cluster: str = "") -> None:
    """Cancel jobs; ones that have ended are no error.

    Args:
        cluster: theirs, where the user's shell names several, of which each may have such ids.
    """
    if not job_ids:
        return
    where = [f"--clusters={cluster}"] if cluster and several_clusters() else []
    try:
        client(["scancel", *where, *job_ids], patience=PATIENCE)
    except NoAnswer:
        raise
    except StageError as error:
        said = [line for line in str(error).splitlines() if "error" in line]
        if not said or not all(_ENDED.search(line) for line in said):
            raise


def several_clusters() -> str:
    """The clusters that the user's shell names, `a,b` or `all`; "" where it names one or none."""
    named = named_cluster()
    return named if named == "all" or "," in named else ""


def named_cluster() -> str:
    """The cluster, or several, that the user's shell names, or ""."""
    return os.environ.get("SLURM_CLUSTERS") or os.environ.get("SBATCH_CLUSTERS") or ""


def cluster_name() -> str:
    """The cluster that this machine's clients ask, "" when it cannot be told."""
    if named := named_cluster():
        return named
    try:
        text = client(["scontrol", "show", "config"])
    except (StageError, RequestError):
        return ""
    match = re.search(r"^ClusterName\s*=\s*(\S+)", text, re.MULTILINE)
    return match[1] if match else ""
