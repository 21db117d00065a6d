"""Accounts and qos of the cluster config against what Slurm grants the user, and its limits.

Pure: settings and facts in, findings out. Also holds what the checks of Slurm share.
"""

from __future__ import annotations

from collections.abc import Iterator

from yelp_hpc.config import Config
from yelp_hpc.errors import nearest
from yelp_hpc.jobs.cluster import ClusterConfig, Resources, time_text
from yelp_hpc.jobs.doctor.findings import Finding, Level, advice, config_line, listed
from yelp_hpc.jobs.site.slurm_facts import Partition, Qos, SlurmFacts


def key(cluster: ClusterConfig, stage: str, name: str) -> str:
    """The dotted key that a stage's value of `name` comes from."""
    own = getattr(getattr(cluster, stage), name) is not None
    inherited = getattr(cluster.defaults, name) is not None
    return f"{stage}.{name}" if own or not inherited else f"defaults.{name}"


def partitions_of(slurm: SlurmFacts, want: Resources) -> list[Partition]:
    """The known partitions that a job asks for, the default one where it names none."""
    if want.partition:
        named = (slurm.partition(name) for name in want.partition.split(","))
        return [partition for partition in named if partition]
    return [partition for partition in slurm.partitions if partition.default]


def check_account(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    """Whether the account may be charged by this user on the partitions of the stage."""
    want = cluster.resources(stage)
    for partition in partitions_of(slurm, want):
        if slurm.closed_to_groups(partition):
            at, groups = key(cluster, stage, "partition"), listed(partition.allow_groups)
            text = f"{at}: partition {partition.name} takes the groups {groups}; you are in none"
            yield advice("account", "warning", text, "name another partition")
    if slurm.associations is None:
        return
    where = key(cluster, stage, "account")
    mine = list(dict.fromkeys(a.account for a in slurm.associations))
    bad: Level = "failure" if slurm.enforces("associations") else "warning"
    if not mine:
        if bad == "failure":
            text = f"user {slurm.user} has no account in Slurm, and the site demands one"
            yield advice("account", bad, text, "ask the site's support for an account")
        return
    if want.account and want.account not in mine:
        near = nearest(want.account, mine)
        hint = f"; the nearest is {near}" if near else ""
        text = f"{where}: user {slurm.user} has no account {want.account} ({listed(mine)}){hint}"
        yield config_line("account", bad, text, f"{where}: {near or mine[0]}")
        return
    account = want.account or slurm.default_account
    for partition in partitions_of(slurm, want):
        allowed = partition.allow_accounts
        if (allowed and account not in allowed) or account in partition.deny_accounts:
            fit = [a for a in mine if (not allowed or a in allowed)]
            fit = [a for a in fit if a not in partition.deny_accounts]
            text = f"{where}: partition {partition.name} does not take account {account}"
            if fit:
                yield config_line("account", "failure", text, f"{where}: {fit[0]}")
            else:
                text += f" (it takes {listed(allowed)})"
                yield advice("account", "failure", text, "name another partition")


def check_qos(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    """Whether the QOS is one that this user, account and partition may use."""
    want = cluster.resources(stage)
    where = key(cluster, stage, "qos")
    account = want.account or slurm.default_account
    mine = {
        name
        for association in slurm.associations or ()
        if association.account == account or not account
        for name in association.qos
    }
    names = sorted(mine) or [qos.name for qos in slurm.qos]
    if want.qos and names and want.qos not in names:
        near = nearest(want.qos, names)
        hint = f"; the nearest is {near}" if near else ""
        text = f"{where}: {want.qos} is no qos of yours ({listed(names)}){hint}"
        bad: Level = "failure" if slurm.enforces("qos") else "warning"
        yield config_line("qos", bad, text, f"{where}: {near or 'null'}")
        return
    for partition in partitions_of(slurm, want):
        allowed = partition.allow_qos
        if want.qos and ((allowed and want.qos not in allowed) or want.qos in partition.deny_qos):
            fit = [name for name in names if name in allowed] or ["null"]
            text = f"{where}: partition {partition.name} does not take qos {want.qos}"
            yield config_line("qos", "failure", text, f"{where}: {fit[0]}")
    if slurm.enforces("limits"):
        for qos in qos_in_force(slurm, want):
            yield from _limits(qos, f"qos {qos.name}", cluster, config, stage)
        places = {"", *(partition.name for partition in partitions_of(slurm, want))}
        for own in slurm.associations or ():
            if own.limits and own.account == account and own.partition in places:
                yield from _limits(own.limits, own.limits.name, cluster, config, stage)


def qos_in_force(slurm: SlurmFacts, want: Resources) -> list[Qos]:
    """The qos of a job: its own or its account's default, and its partition's."""
    account = want.account or slurm.default_account
    defaults = [
        a.default_qos or (a.qos[0] if len(a.qos) == 1 else "")
        for a in slurm.associations or ()
        if a.account == account
    ]
    names = [want.qos or next(iter(defaults), "")]
    names += [partition.qos or "" for partition in partitions_of(slurm, want)]
    return [qos for qos in slurm.qos if qos.name in names]


def _limits(
    qos: Qos, whose: str, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    want = cluster.resources(stage)
    asked = want.seconds // 60
    if qos.max_minutes is not None and asked > qos.max_minutes:
        where = key(cluster, stage, "time")
        text = f"{where} is {time_text(asked)}, but {whose} allows {time_text(qos.max_minutes)}"
        yield config_line("qos", "failure", text, f"{where}: {time_text(qos.max_minutes)}")
    nodes = want.least_nodes
    limits = []
    told = [(qos.gpus_a_job, qos.typed_a_job), (qos.gpus_a_user, qos.typed_a_user)]
    for total, typed in (*told, (qos.gpus_together, qos.typed_together)):
        if want.gpu_type in typed:
            limits.append(typed[want.gpu_type])
        of_another = want.gpu_type not in (None, *typed) and [total] == list(typed.values())
        if total is not None and not of_another:
            limits.append(total)
    if want.gpus and limits and want.gpus * nodes > min(limits):
        where = key(cluster, stage, "gpus")
        text = f"{where} is {want.gpus} on {nodes} nodes, but {whose} allows {min(limits)}"
        yield config_line("qos", "failure", text, f"{where}: {max(1, min(limits) // nodes)}")
    if (least := qos.least_gpus) and (want.gpus or 0) * nodes < least:
        where = key(cluster, stage, "gpus")
        text = f"{where} is {want.gpus or 0} on {nodes} nodes, but {whose} demands {least} at least"
        yield config_line("qos", "failure", text, f"{where}: {-(-least // nodes)}")
    if config and stage == "infer" and qos.submitted_a_user is not None:
        # the two arrays, and the other four jobs of the chain
        tasks = min(config.infer.shards, cluster.max_array_size)
        asked = tasks * len(config.infer.models) + 4
        room = (qos.submitted_a_user - 4) // len(config.infer.models)
        if asked > qos.submitted_a_user:
            text = f"{asked} jobs would be queued, but {whose} allows {qos.submitted_a_user}"
            yield config_line("qos", "failure", text, f"max_array_size: {max(2, room)}")
