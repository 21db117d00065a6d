"""What Slurm says about itself: partitions, nodes, GPUs, limits, accounts.

Text in, frozen facts out; `ask_slurm` asks. Read through `scontrol -o` and `sacctmgr -P`,
whose KEY=VALUE pairs keep their names from release to release; `--json` does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import Field

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs.cluster import minutes
from yelp_hpc.jobs.site.client import client, no_client, user_groups, user_name
from yelp_hpc.jobs.slurm import accounting
from yelp_hpc.settings import Frozen

_NO_LIMIT = {"", "UNLIMITED", "INFINITE", "NONE", "N/A", "(NULL)"}
# a node in one of these runs no new job; POWERED_DOWN ones are started when needed
_UNUSABLE = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "MAINT", "FUTURE", "INVAL")


class Partition(Frozen):
    """A partition; a None limit is none, () of groups, accounts or qos means all."""

    name: str
    default: bool = False
    up: bool = True
    hidden: bool = False
    max_minutes: int | None = None
    max_nodes: int | None = None
    total_nodes: int = 0
    allow_groups: tuple[str, ...] = ()
    allow_accounts: tuple[str, ...] = ()
    deny_accounts: tuple[str, ...] = ()
    allow_qos: tuple[str, ...] = ()
    deny_qos: tuple[str, ...] = ()
    qos: str | None = None
    preempted: bool = False
    """Its jobs give way to those of another."""
    preempt_mode: str = ""
    """How: REQUEUE, CANCEL or SUSPEND."""
    grace_seconds: int = 0


class Node(Frozen):
    """A node. `gpus`: type → how many; an untyped GPU has the type ""."""

    name: str
    cpus: int
    memory: int
    """MB."""
    usable: bool
    partitions: tuple[str, ...]
    gpus: dict[str, int] = Field(default={})


class Qos(Frozen):
    """A quality of service, or an association's own limits; a None limit is none."""

    name: str
    max_minutes: int | None = None
    gpus_a_job: int | None = None
    gpus_a_user: int | None = None
    """GPUs of any type."""
    typed_a_job: dict[str, int] = Field(default={})
    typed_a_user: dict[str, int] = Field(default={})
    """GPU type → limit."""
    submitted_a_user: int | None = None
    gpus_together: int | None = None
    """GPUs of all jobs under it, and the same by type."""
    typed_together: dict[str, int] = Field(default={})
    least_gpus: int | None = None
    """A job with fewer waits for ever."""


class Association(Frozen):
    """An account that the user may charge; `partition` "" is any."""

    account: str
    partition: str = ""
    qos: tuple[str, ...] = ()
    default_qos: str = ""
    limits: Qos | None = None


class SlurmFacts(Frozen):
    """Everything that was asked. `problem`: why nothing could be."""

    problem: str = ""
    installed: bool = True
    version: str = ""
    user: str = ""
    groups: tuple[str, ...] = ()
    """The user's, as far as this machine knows them."""
    settings: dict[str, str] = Field(default={})
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[Node, ...] = ()
    associations: tuple[Association, ...] | None = None
    """None: sacctmgr does not answer."""
    default_account: str = ""
    qos: tuple[Qos, ...] = ()
    accounting_problem: str = ""
    refusals: dict[str, str] = Field(default={})
    """Stage → what `sbatch --test-only` says against it; "" when nothing."""

    def partition(self, name: str) -> Partition | None:
        """The partition of that name, if there is one."""
        return next((p for p in self.partitions if p.name == name), None)

    def closed_to_groups(self, partition: Partition) -> bool:
        """Whether the partition takes members of groups alone of which the user is in none."""
        allowed = partition.allow_groups
        return bool(allowed and self.groups) and not {*allowed} & {*self.groups}

    def nodes_of(self, partition: str) -> list[Node]:
        """Nodes that the partition holds."""
        return [node for node in self.nodes if partition in node.partitions]

    def gpus_of(self, partition: str) -> dict[str, int]:
        """GPU type → the most that one node of the partition has."""
        most: dict[str, int] = {}
        for node in self.nodes_of(partition):
            for kind, count in node.gpus.items():
                most[kind] = max(count, most.get(kind, 0))
        return most

    def enforces(self, what: str) -> bool:
        """Whether Slurm enforces `associations`, `limits` or `qos`."""
        words = set(self.settings.get("AccountingStorageEnforce", "").lower().split(","))
        implied = {"associations": {"limits", "qos", "safe", "wckeys"}, "limits": {"safe"}}
        return "all" in words or bool(words & ({what} | implied.get(what, set())))


def ask_slurm() -> SlurmFacts:
    """Ask the Slurm of this machine; raises nothing, what fails is in the facts."""
    user = user_name()
    try:
        told = client(["scontrol", "--version"], timeout=30)
        version = next(iter(re.findall(r"^slurm\S* (\d+\.\S+)", told, re.MULTILINE)), "")
        if not version:
            raise no_client("scontrol", told)
        settings = parse_settings(client(["scontrol", "show", "config"]))
        partitions = parse_partitions(client(["scontrol", "-a", "-o", "show", "partition"]))
        nodes = parse_nodes(client(["scontrol", "-a", "-o", "show", "node"]))
    except RequestError as error:
        return SlurmFacts(problem=str(error), installed=False, user=user)
    except StageError as error:
        return SlurmFacts(problem=str(error), user=user)
    facts: dict[str, object] = {}
    cluster = settings.get("ClusterName", "")
    where = [f"cluster={cluster}"] if cluster else []
    try:
        show = ["sacctmgr", "-nP", "show"]
        fields = "format=Account,Partition,QOS,DefaultQOS,MaxWall,MaxTRES,GrpTRES,MaxSubmit"
        text = client([*show, "assoc", f"user={user}", *where, fields], timeout=30)
        facts["associations"] = parse_associations(text)
        text = client([*show, "user", user, "format=User,DefaultAccount"], timeout=30)
        own = [line.split("|")[1] for line in text.splitlines() if line.startswith(f"{user}|")]
        facts["default_account"] = next(iter(own), "")
        fields = "format=Name,MaxWall,MaxTRES,MaxTRESPU,MaxSubmitPU,GrpTRES,MinTRES"
        facts["qos"] = parse_qos(client([*show, "qos", fields], timeout=30))
    except (RequestError, StageError):
        facts["associations"] = facts.get("associations")
    try:
        accounting(["1"])  # as `status` asks it
    except (RequestError, StageError) as error:
        facts["accounting_problem"] = str(error)
    return SlurmFacts.model_validate(
        {
            "version": version,
            "user": user,
            "groups": user_groups(),
            "settings": settings,
            "partitions": partitions,
            "nodes": nodes,
            **facts,
        }
    )


def parse_settings(text: str) -> dict[str, str]:
    """`scontrol show config`: `Key = value` lines."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """`scontrol -o show partition`."""
    return tuple(
        Partition(
            name=record["PartitionName"],
            default=record.get("Default") == "YES",
            up=record.get("State", "UP") == "UP",
            hidden="YES" in map(record.get, ("Hidden", "RootOnly", "ReqResv")),
            max_minutes=time_limit(record.get("MaxTime", "")),
            max_nodes=_number(record.get("MaxNodes", "")),
            total_nodes=_number(record.get("TotalNodes", "")) or 0,
            allow_groups=_names(record.get("AllowGroups", "ALL")),
            allow_accounts=_names(record.get("AllowAccounts", "ALL")),
            deny_accounts=_names(record.get("DenyAccounts", "")),
            allow_qos=_names(record.get("AllowQos", "ALL")),
            deny_qos=_names(record.get("DenyQos", "")),
            qos=next(iter(_names(record.get("QoS", ""))), None),
            preempt_mode=_preempt_mode(record.get("PreemptMode", "")),
            preempted=bool(_preempt_mode(record.get("PreemptMode", ""))),
            grace_seconds=_number(record.get("GraceTime", "")) or 0,
        )
        for record in records(text)
        if "PartitionName" in record
    )


def parse_nodes(text: str) -> tuple[Node, ...]:
    """`scontrol -o show node`."""
    return tuple(
        Node(
            name=record["NodeName"],
            cpus=_number(record.get("CPUEfctv") or record.get("CPUTot", "")) or 0,
            memory=_number(record.get("RealMemory", "")) or 0,
            usable=usable(record.get("State", "")),
            partitions=_list(record.get("Partitions", "")),  # one may well be called "all"
            gpus=parse_gres(record.get("Gres", "")),
        )
        for record in records(text)
        if "NodeName" in record
    )


def usable(state: str) -> bool:
    """Whether a node in `state` (`IDLE+DRAIN`, `DOWN*`, `MIXED+PLANNED`) takes jobs."""
    words = state.upper().split("+")
    return not state.endswith("*") and not any(word.startswith(_UNUSABLE) for word in words)


def parse_gres(text: str) -> dict[str, int]:
    """GPUs of `gpu:a100:4(S:0-1),gpu:2,mps:200`: type → count."""
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *parts = [part for part in item.strip().split(":") if part != "no_consume"]
        if name != "gpu":
            continue
        count = int(parts.pop()) if parts and parts[-1].isdigit() else 1
        kind = ":".join(parts)
        found[kind] = found.get(kind, 0) + count
    return found


def parse_associations(text: str) -> tuple[Association, ...]:
    """`sacctmgr -nP show assoc format=Account,Partition,QOS,DefaultQOS` and four limits."""
    found = []
    for line in text.splitlines():
        account, partition, qos, default, *limits = (line.split("|") + [""] * 8)[:8]
        if account and line.count("|") >= 3:  # a site's banner has less
            names = tuple(name.lstrip("+") for name in qos.split(",") if name)
            own = {"account": account, "partition": partition, "default_qos": default}
            (told,) = parse_qos("|".join([f"account {account}", *limits])) or (None,)
            found.append(Association.model_validate({**own, "qos": names, "limits": told}))
    return tuple(found)


def parse_qos(text: str) -> tuple[Qos, ...]:
    """`sacctmgr -nP show qos format=Name,MaxWall,MaxTRES,MaxTRESPU,MaxSubmitPU,GrpTRES,MinTRES`."""
    found = []
    for line in text.splitlines():
        name, wall, job, user, submitted, together, least = (line.split("|") + [""] * 7)[:7]
        if name and line.count("|") >= 3:
            found.append(
                Qos(
                    name=name,
                    max_minutes=time_limit(wall),
                    gpus_a_job=_gpus(job),
                    gpus_a_user=_gpus(user),
                    typed_a_job=_typed_gpus(job),
                    typed_a_user=_typed_gpus(user),
                    submitted_a_user=_number(submitted),
                    gpus_together=_gpus(together),
                    typed_together=_typed_gpus(together),
                    least_gpus=_gpus(least),
                )
            )
    return tuple(found)


def records(text: str) -> Iterator[dict[str, str]]:
    """The KEY=VALUE pairs of each line; a value may hold spaces (`OS=Linux 6.1 #1 SMP`)."""
    for line in text.splitlines():
        parts = re.split(r"(?:^|\s+)([A-Za-z][\w:/]*)=", line)
        if len(parts) > 2:
            pairs = zip(parts[1::2], parts[2::2], strict=True)
            found: dict[str, str] = {}
            for key, value in pairs:
                found.setdefault(key, value.strip())  # a comment's own a=b comes later
            yield found


def time_limit(text: str) -> int | None:
    """Minutes of a limit, None for no limit."""
    if text.strip().upper() in _NO_LIMIT:
        return None
    try:
        return minutes(text.strip())
    except ValueError:
        return None


def _preempt_mode(text: str) -> str:
    """REQUEUE, CANCEL or SUSPEND of `GANG,SUSPEND` and the like; "" where nothing is preempted."""
    modes = (mode for mode in text.upper().split(",") if mode in ("REQUEUE", "CANCEL", "SUSPEND"))
    return next(modes, "")


def _names(text: str) -> tuple[str, ...]:
    return () if text.upper() == "ALL" else _list(text)


def _list(text: str) -> tuple[str, ...]:
    if text.upper() in _NO_LIMIT:
        return ()
    return tuple(name for name in text.split(",") if name)


def _number(text: str) -> int | None:
    match = re.match(r"\d+", text.strip())
    return int(match[0]) if match else None


def _gpus(tres: str) -> int | None:
    typed = _typed_gpus(tres)
    if match := re.search(r"(?:^|,)gres/gpu=(\d+)", tres):
        return int(match[1])
    return next(iter(typed.values())) if len(typed) == 1 else None


def _typed_gpus(tres: str) -> dict[str, int]:
    return {kind: int(n) for kind, n in re.findall(r"(?:^|,)gres/gpu:([^=,]+)=(\d+)", tres)}
