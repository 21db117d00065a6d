"""The cluster config against what Slurm has: every name, number and limit, with the nearest.

Pure: settings and facts in, findings out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from yelp_hpc.config import Config
from yelp_hpc.errors import nearest
from yelp_hpc.jobs.cluster import ClusterConfig, Resources, time_text
from yelp_hpc.jobs.doctor.accounts import check_account, check_qos, key, partitions_of
from yelp_hpc.jobs.doctor.findings import Finding, advice, command, config_line, listed, ok
from yelp_hpc.jobs.site.slurm_facts import Node, SlurmFacts
from yelp_hpc.rundir.paths import STAGES

OLDEST = (22, 5)
_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "": 1}


def check_slurm(slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None) -> list[Finding]:
    """All findings about Slurm; only the first when it cannot be asked."""
    if not slurm.installed and not any(cluster.resources(s) != Resources() for s in STAGES):
        text = "no Slurm client on PATH: stages can be run on this machine only"
        return [advice("slurm", "warning", text, "submit with --executor local")]
    if slurm.problem:
        return [_reachable(slurm)]
    found = [_reachable(slurm)]
    for check, title in _STAGE_CHECKS.items():
        bad: dict[Finding, None] = {}
        for stage in STAGES:
            for finding in check(slurm, cluster, config, stage):
                bad[finding] = None
        found += list(bad) or [ok(*title)]
    found += _limits_of_the_site(slurm, cluster)
    return found


def _reachable(slurm: SlurmFacts) -> Finding:
    if not slurm.installed:
        return advice(
            "slurm",
            "failure",
            "no Slurm client on this machine's PATH",
            "log in to a node of the cluster (or: module load slurm); on this machine alone: "
            "--executor local",
        )
    if slurm.problem:
        text = slurm.problem.strip().splitlines()[-1]
        return command("slurm", "failure", f"Slurm does not answer: {text}", "scontrol ping")
    number = tuple(int(part) for part in re.findall(r"\d+", slurm.version)[:2])
    if number < OLDEST:
        return advice(
            "slurm",
            "warning",
            f"Slurm {slurm.version} answers; older than 22.05, the oldest that this was tested on",
            "try a short run first: --config configs/demo.yaml",
        )
    name = slurm.settings.get("ClusterName", "")
    return ok("slurm", f"Slurm {slurm.version} answers, cluster {name or 'without a name'}")


def _partition(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    want = cluster.resources(stage)
    where = key(cluster, stage, "partition")
    visible = [p.name for p in slurm.partitions if not p.hidden]
    if not want.partition and not any(p.default for p in slurm.partitions):
        first = next(iter(visible), "NAME")
        text = f"{where} is not set and Slurm has no default partition ({listed(visible)})"
        yield config_line("partition", "failure", text, f"defaults.partition: {first}")
    for name in (want.partition or "").split(","):
        if name and not slurm.partition(name):
            near = nearest(name, visible)
            hint = f"; the nearest is {near}" if near else ""
            text = f"{where}: Slurm has no partition {name} (it has {listed(visible)}){hint}"
            yield config_line("partition", "failure", text, f"{where}: {near or 'null'}")
    for partition in partitions_of(slurm, want):
        others = [
            p.name
            for p in slurm.partitions
            if p.up and p != partition and any(node.usable for node in slurm.nodes_of(p.name))
        ]
        fit = [
            name for name in others if not want.gpus or _fits_gpus(slurm.gpus_of(name), want) > 0
        ]
        if not partition.up:
            text = f"{where}: partition {partition.name} is not up"
        elif not any(node.usable for node in slurm.nodes_of(partition.name)):
            count = len(slurm.nodes_of(partition.name))
            text = f"{where}: no node of partition {partition.name} is up ({count} in all)"
        else:
            continue
        if fit:
            yield config_line("partition", "failure", text, f"{where}: {fit[0]}")
        else:
            reason = f"sinfo --list-reasons --partition={partition.name}"
            yield command("partition", "failure", text, reason)


def _fits_gpus(gpus: dict[str, int], want: Resources) -> int:
    return gpus.get(want.gpu_type, 0) if want.gpu_type else max(gpus.values(), default=0)


def _gpus(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    want = cluster.resources(stage)
    where = key(cluster, stage, "gpus")
    asked = config.train.nproc if config and stage == "train" else "auto"
    nproc = None if asked == "auto" else asked
    if not want.gpus:
        if want.gpu_type:
            kind = key(cluster, stage, "gpu_type")
            text = f"{kind} is set, but {where} is not: no GPU is asked for"
            yield config_line("GPUs", "warning", text, f"{stage}.gpus: {nproc or 1}")
        return
    partitions = partitions_of(slurm, want)
    if not partitions:
        return
    have: dict[str, int] = {}
    for partition in partitions:
        have = {**have, **slurm.gpus_of(partition.name)}
    name = ",".join(partition.name for partition in partitions)
    if not have:
        fit = [p.name for p in slurm.partitions if _fits_gpus(slurm.gpus_of(p.name), want)]
        remedy = f"{stage}.partition: {fit[0]}" if fit else f"{where}: 0"
        text = f"{where} is {want.gpus}, but partition {name} has no GPUs"
        text += f" (some are in {listed(fit)})" if fit else ""
        yield config_line("GPUs", "failure", text, remedy)
        return
    if want.gpu_type and want.gpu_type not in have:
        yield _wrong_type(slurm, cluster, stage, name, have)
        return
    most = _fits_gpus(have, want)
    if want.gpus > most:
        text = f"{where} is {want.gpus}, but a node of {name} has at most {most}"
        yield config_line("GPUs", "failure", text, f"{where}: {most}")
    elif nproc and nproc > want.gpus:
        text = f"train.nproc is {nproc}, but {where} is {want.gpus}: one rank needs one GPU"
        fit_nproc = min(nproc, most)
        remedy = f"train.gpus: {nproc}" if fit_nproc == nproc else f"--set train.nproc={want.gpus}"
        yield config_line("GPUs", "failure", text, remedy)
    elif nproc and nproc < want.gpus:
        text = f"train.nproc is {nproc}, {where} is {want.gpus}: {want.gpus - nproc} would idle"
        yield config_line("GPUs", "warning", text, f"--set train.nproc={want.gpus}")
    elif cluster.container and not cluster.container.nv:
        text = f"{where} is {want.gpus}, but container.nv is off: the image would see no GPU"
        yield config_line("GPUs", "failure", text, "container.nv: true")


def _wrong_type(
    slurm: SlurmFacts, cluster: ClusterConfig, stage: str, name: str, have: dict[str, int]
) -> Finding:
    want = cluster.resources(stage)
    where = key(cluster, stage, "gpu_type")
    assert want.gpu_type is not None
    kinds = [kind for kind in have if kind]
    near = nearest(want.gpu_type, kinds)
    elsewhere = [p.name for p in slurm.partitions if want.gpu_type in slurm.gpus_of(p.name)]
    text = f"{where}: partition {name} has no GPU of type {want.gpu_type}"
    if elsewhere:
        text += f"; partition {elsewhere[0]} has"
        return config_line("GPUs", "failure", text, f"{stage}.partition: {elsewhere[0]}")
    if not kinds:
        text += "; its GPUs have no type"
        return config_line("GPUs", "failure", text, f"{where}: null")
    text += f" (it has {listed(kinds)})" + (f"; the nearest is {near}" if near else "")
    return config_line("GPUs", "failure", text, f"{where}: {near or kinds[0]}")


def _time(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    want = cluster.resources(stage)
    where = key(cluster, stage, "time")
    asked = want.seconds // 60
    limits = [p.max_minutes for p in partitions_of(slurm, want)]
    numbers = [limit for limit in limits if limit is not None]
    if numbers and len(numbers) == len(limits) and asked > max(numbers):
        most = max(numbers)
        text = (
            f"{where} is {time_text(asked)}, but the partition ends jobs after {time_text(most)} "
            "(a stage saves before its limit and is requeued, so a lower one does no harm)"
        )
        yield config_line("time limit", "failure", text, f"{where}: {time_text(most)}")


def _size(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    want = cluster.resources(stage)
    partitions = partitions_of(slurm, want)
    fit = [node for p in partitions for node in slurm.nodes_of(p.name) if _has_gpus(node, want)]
    if not fit:
        return
    nodes = max(
        min(p.max_nodes or p.total_nodes, p.total_nodes) if p.total_nodes else (p.max_nodes or 1)
        for p in partitions
    )
    if want.least_nodes > nodes:
        where = key(cluster, stage, "nodes")
        text = f"{where} is {want.nodes}, but the partition gives a job at most {nodes}"
        yield config_line("size", "failure", text, f"{where}: {nodes}")
    cpus, memory = max(node.cpus for node in fit), max(node.memory for node in fit)
    if (want.cpus or 1) > cpus:
        where = key(cluster, stage, "cpus")
        text = f"{where} is {want.cpus}, but the largest node that fits has {cpus}"
        yield config_line("size", "failure", text, f"{where}: {cpus}")
    if want.memory and megabytes(want.memory) > memory:
        where = key(cluster, stage, "memory")
        text = f"{where} is {want.memory}, but the largest node that fits has {memory}M"
        yield config_line("size", "failure", text, f"{where}: {memory}M")


def _has_gpus(node: Node, want: Resources) -> bool:
    return not want.gpus or _fits_gpus(node.gpus, want) >= want.gpus


def _verdict(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    from yelp_hpc.jobs.job import Job
    from yelp_hpc.jobs.site.refusals import refusal

    said = slurm.refusals.get(stage)
    stages = [name for name, text in slurm.refusals.items() if text == said]
    if said and stage == stages[0]:  # the same for all of them
        lines = str(refusal(Job(stage), said)).split("\n")
        text = f"sbatch refuses {', '.join(stages)}: {' '.join(lines[1].split())}"
        yield advice("test-only", "failure", text, lines[-1])


def _preemption(
    slurm: SlurmFacts, cluster: ClusterConfig, config: Config | None, stage: str
) -> Iterator[Finding]:
    for partition in partitions_of(slurm, cluster.resources(stage)):
        warned = bool(partition.grace_seconds)  # who saves in time asks for a requeue
        if partition.preempt_mode == "CANCEL" and not warned:
            text = (
                f"partition {partition.name} cancels the jobs that it preempts, without warning: "
                f"{stage} then goes on from its last save, after the same `submit` again"
            )
            yield advice("preemption", "warning", text, "name another partition, or submit again")
        elif partition.preempt_mode == "SUSPEND":
            text = (
                f"partition {partition.name} suspends the jobs that it preempts: {stage} goes on "
                "later, its time limit stands still meanwhile"
            )
            yield advice("preemption", "warning", text, "nothing to do; `status` says suspended")
        elif partition.preempted and not warned and stage in ("train", "infer"):
            every = config.train.save_every_minutes if config else 10
            if every > 5:
                text = (
                    f"partition {partition.name} preempts without warning: up to {every:g} min "
                    "of training are lost each time"
                )
                yield config_line("preemption", "warning", text, "--set train.save_every_minutes=5")


def _limits_of_the_site(slurm: SlurmFacts, cluster: ClusterConfig) -> Iterator[Finding]:
    most = int(slurm.settings.get("MaxArraySize", "1001") or 0)
    if cluster.max_array_size > most:
        text = f"max_array_size is {cluster.max_array_size}, but Slurm's MaxArraySize is {most}"
        yield config_line("array size", "failure", text, f"max_array_size: {most}")
    else:
        yield ok("array size", f"arrays of up to {cluster.max_array_size}, Slurm takes {most}")
    if not cluster.requeue:
        yield ok("requeue", "not asked for (requeue: false): submit again after each time limit")
    elif slurm.settings.get("JobRequeue", "1") == "0":
        yield command(
            "requeue",
            "warning",
            "JobRequeue is 0 here; jobs ask for requeues themselves. See whether that is granted:",
            "python -m yelp_hpc doctor --on-node",
        )
    else:
        yield ok("requeue", "JobRequeue is on")
    kind = slurm.settings.get("AccountingStorageType", "").lower()
    if slurm.accounting_problem or not kind or kind.endswith("none"):
        text = "Slurm keeps no accounting; how a job ended is read from the run directory alone"
        remedy = "nothing to do; `status` says so where it cannot know more"
        yield advice("accounting", "warning", text, remedy)
    else:
        yield ok("accounting", "sacct answers")


def megabytes(memory: str) -> float:
    """Slurm's memory (`64G`; without a unit megabytes) in MB."""
    unit = memory[-1] if memory[-1].isalpha() else ""
    return float(memory.removesuffix(unit)) * _UNITS[unit]


_STAGE_CHECKS = {
    _partition: ("partition", "every partition exists, is up and has nodes"),
    _gpus: ("GPUs", "the GPUs that are asked for exist"),
    _time: ("time limit", "every time limit is within its partition's"),
    _size: ("size", "nodes, CPUs and memory fit"),
    check_account: ("account", "the accounts are yours and their partitions take them"),
    check_qos: ("qos", "within what the qos allows"),
    _preemption: ("preemption", "no stage is preempted without warning"),
    _verdict: ("test-only", "sbatch --test-only accepts every stage"),
}
