"""Why a job waits: what Slurm's reasons mean, and which of them no waiting mends. Pure."""

from __future__ import annotations

import re

# reasons that no waiting mends; those of an association or a qos name what is over the limit
_NEVER = re.compile(
    r"DependencyNeverSatisfied|Partition(Config|(Time|Node)Limit)|BadConstraints"
    r"|Invalid(Account|QOS)|AccountNotAllowed|QOSNotAllowed|DeadLine|ReservationDeleted"
    r"|JobHeld(User|Admin)|JobHoldMaxRequeue|.*requeued.*held.*"
    r"|(Assoc|QOS)Max\w*(PerJob|PerNode|WallDurationPerJob\w*)(Limit)?$|QOSMin\w+"
    r"|NodesUnavailable|ReqNodeNotInPartition|MaxMemPerLimit",
    re.IGNORECASE,
)
_OVER = re.compile(r"(?P<whose>Assoc|QOS)(?P<how>Max|Min|Grp|Used)(?P<what>\w+)")


def never_starts(reason: str) -> bool:
    """Whether a job that waits for this reason waits until somebody acts."""
    return bool(_NEVER.fullmatch(reason.strip("()").partition(",")[0]))


def reason_in_words(reason: str) -> str:
    """Why a job waits, for someone who has not read Slurm's manual."""
    plain = reason.strip("()").partition(",")[0]
    if said := _REASONS.get(plain) or _REASONS.get(plain.replace("_", " ")):  # of newer versions
        return said
    if re.fullmatch(".*requeued.*held.*", plain):  # whatever failed
        return _REASONS["launch failed requeued held"]
    if over := _OVER.fullmatch(plain):
        whose = "your association" if over["whose"] == "Assoc" else "the qos"
        never = "; it will never start" if never_starts(plain) else ""
        place = "under the least" if over["how"] == "Min" else "over a limit"
        return f"{place} of {whose} ({plain}){never}"
    return reason.strip("()")


_REASONS = {
    "None": "about to be scheduled",
    "Priority": "others are ahead of it in the queue",
    "Resources": "waiting for nodes to become free",
    "Dependency": "waits for an earlier stage",
    "DependencyNeverSatisfied": "an earlier stage failed, so it will never start",
    "BeginTime": "was requeued, starts again in a moment, or waits for its begin time",
    "JobHeldUser": "held by its owner: scontrol release",
    "JobHeldAdmin": "held by an administrator, or after failing to start",
    "JobArrayTaskLimit": "as many array tasks run as array_parallelism allows",
    "JobHoldMaxRequeue": "failed to start too often and is held: scontrol release",
    "PartitionConfig": "asks for more than its partition's settings allow",
    "PartitionTimeLimit": "asks for more time than its partition allows",
    "PartitionNodeLimit": "asks for more nodes than its partition has, or these are down",
    "MaxMemPerLimit": "asks for more memory than its partition allows",
    "InvalidAccount": "its account is no longer valid, so it will never start",
    "AccountNotAllowed": "its partition does not take its account, so it will never start",
    "InvalidQOS": "its qos is no longer valid, so it will never start",
    "QOSNotAllowed": "its partition or account does not take its qos, so it will never start",
    "ReservationDeleted": "its reservation was deleted, so it will never start",
    "DeadLine": "cannot end before its deadline, so it will never start",
    "PartitionDown": "its partition takes no jobs at the moment",
    "PartitionInactive": "its partition takes no jobs at the moment",
    "BadConstraints": "no node can ever give what it asks for",
    "Licenses": "waiting for a licence",
    "Reservation": "waiting for its reservation to begin",
    "ReqNodeNotAvail": "the nodes it asks for are down or reserved",
    "AssocGrpGRES": "your group's GPUs are all in use",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as the qos allows",
    "QOSMaxGRESPerUser": "you use as many GPUs as the qos allows",
    "launch failed requeued held": "failed to start and is held: scontrol release",
    "job requeued in held state": "was requeued and is held: scontrol release",
}
