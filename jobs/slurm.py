"""The Slurm client: squeue, sacct, scontrol and scancel as functions.

squeue is read through --Format and not --json: Slurm 22.05's --json ignores -j and prints every job
of the cluster, and its schema changes from release to release.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from yelp_hpc.errors import RequestError, StageError

_FIELDS = ("JobArrayID", "State", "Reason", "NodeList", "TimeUsed", "TimeLimit", "RestartCnt")
TOKENS = tuple(
    prefix + name
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
    for prefix in ("", "APPTAINERENV_", "SINGULARITYENV_")
)
_RANKS = frozenset(
    ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
)


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

    @property
    def parent(self) -> str:
        """The id of the array; of a single job its own."""
        return self.job.partition("_")[0]


def client(argv: Sequence[str], timeout: float = 60, epoch: bool = False) -> str:
    """Run a Slurm command and return what it prints.

    Raises:
        RequestError: the command is not installed here.
        StageError: it failed; its own message is shown.
    """
    try:
        done = subprocess.run(
            list(argv),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={
                **os.environ,
                "SLURM_TIME_FORMAT": "%s" if epoch else "standard",
                "SLURM_BITSTR_LEN": "0",  # else sparse arrays are cut short
            },
        )
    except FileNotFoundError:
        raise RequestError(
            f"{argv[0]} is not installed on this machine: log in to a node of the cluster, or use "
            "--executor local"
        ) from None
    except subprocess.TimeoutExpired:
        raise StageError(f"{argv[0]} did not answer within {timeout:.0f} s") from None
    if done.returncode:
        raise StageError(f"{argv[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def queue(job_ids: Sequence[str]) -> list[Row]:
    """The array tasks and jobs of `job_ids` that Slurm still holds, finished ones left out."""
    if not job_ids:
        return []
    form = ",".join(f"{field}:|" for field in _FIELDS)
    argv = ["squeue", "--noheader", "--array", f"--Format={form}"]
    try:
        text = client([*argv, f"--jobs={','.join(job_ids)}"])
    except StageError as error:
        if "Invalid job id" not in str(error):  # what squeue says when it has forgotten the only id
            raise
        return []
    return parse_queue(text)


def parse_queue(text: str) -> list[Row]:
    """Rows of `squeue --Format`; see `queue`."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > len(_FIELDS) - 1:
            job, state, reason, node, used, limit, restarts = cells[: len(_FIELDS)]
            count = int(restarts) if restarts.isdigit() else 0
            rows.append(Row(job, state, reason, node, used, limit, count))
    return [row for row in rows if row.state not in FINISHED]


FINISHED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE"),
        *("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"),
    }
)


def accounting(job_ids: Sequence[str]) -> list[Row]:
    """What sacct remembers of jobs, the last run of each; nothing where there is no accounting."""
    if not job_ids:
        return []
    argv = ["sacct", "--noheader", "--parsable2", "--allocations", "--array"]
    fields = "--format=JobID,State,NodeList,Elapsed,Timelimit"
    try:
        return parse_accounting(client([*argv, fields, f"--jobs={','.join(job_ids)}"], timeout=20))
    except (RequestError, StageError):
        return []


def parse_accounting(text: str) -> list[Row]:
    """Rows of `sacct --parsable2`; `CANCELLED by 0` becomes `CANCELLED`."""
    rows = {}
    for line in text.splitlines():
        job, state, node, elapsed, limit = (line.split("|") + [""] * 5)[:5]
        if job and "[" not in job:
            node = "" if node.startswith("None") else node
            rows[job] = Row(job, state.split(" ")[0], "", node, elapsed, limit)
    return list(rows.values())


def state_of(job: str) -> str:
    """The state of one job or array task now, `GONE` when Slurm does not know it.

    A job that is being cancelled, preempted or requeued is COMPLETING or PENDING, never RUNNING.
    """
    try:
        form = "--Format=State:|"
        lines = client(["squeue", "--noheader", "--states=all", form, f"--jobs={job}"]).split("|")
    except StageError as error:
        return "GONE" if "Invalid job id" in str(error) else "UNREACHABLE"
    return lines[0].strip() or "GONE"


def end_time(job: str) -> float | None:
    """When the time limit ends a running job, seconds since 1970, if Slurm tells."""
    try:
        text = client(["squeue", "--noheader", "--Format=EndTime:|", f"--jobs={job}"], epoch=True)
        return float(text.split("|")[0])
    except (StageError, ValueError):
        return None


def requeue(job: str) -> None:
    """Ask for the job, or the one array task, to be run again.

    Raises:
        StageError: Slurm refused.
    """
    client(["scontrol", "requeue", job])


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; ones that have ended are no error."""
    if job_ids:
        client(["scancel", *job_ids])


def first_host(node_list: str) -> str:
    """The first host name of Slurm's `g[1-2],h7` notation."""
    return client(["scontrol", "show", "hostnames", node_list]).split()[0]


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hide the variables of an outer job and the Hub's tokens while something is submitted.

    submitit.helpers.clean_env also drops SLURM_CONF, without which a client finds no cluster on
    some sites, and the user's own SBATCH_ defaults.
    """
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (
            (name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI")))
            and name != "SLURM_CONF"
        )
        or name in TOKENS
        or name in _RANKS
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def require_sbatch() -> None:
    """Raises RequestError where nothing can be submitted from."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise RequestError(
            "sbatch is not installed on this machine: log in to a node of the cluster, or use "
            "--executor local"
        )


def without_tokens(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without the Hub's tokens."""
    return {name: value for name, value in env.items() if name not in TOKENS}


def reason_in_words(reason: str) -> str:
    """Why a job waits, for someone who has not read Slurm's manual."""
    plain = reason.strip("()")
    return _REASONS.get(plain.partition(",")[0], plain)


_REASONS = {
    "None": "about to be scheduled",
    "Priority": "others are ahead of it in the queue",
    "Resources": "waiting for nodes to become free",
    "Dependency": "waits for an earlier stage",
    "DependencyNeverSatisfied": "an earlier stage failed, so it will never start",
    "BeginTime": "was requeued, starts again in a moment",
    "JobHeldUser": "held by its owner: scontrol release",
    "JobHeldAdmin": "held by an administrator, or after failing to start",
    "JobArrayTaskLimit": "as many array tasks run as array_parallelism allows",
    "PartitionTimeLimit": "asks for more time than its partition allows",
    "PartitionNodeLimit": "asks for more nodes than its partition has",
    "ReqNodeNotAvail": "the nodes it asks for are down or reserved",
    "AssocGrpGRES": "your group's GPUs are all in use",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as the qos allows",
    "QOSMaxGRESPerUser": "you use as many GPUs as the qos allows",
    "launch failed requeued held": "failed to start and is held: scontrol release",
}
