"""`init`: a cluster file and a starter config, written by asking Slurm instead of the user.

`choose` and the two texts are pure; `init` asks and writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yelp_hpc.errors import RequestError, StageError, all_problems, in_shell
from yelp_hpc.jobs.cluster import Resources, time_text
from yelp_hpc.jobs.doctor.accounts import qos_in_force
from yelp_hpc.jobs.doctor.findings import listed
from yelp_hpc.jobs.site.slurm_facts import Node, Partition, SlurmFacts, ask_slurm
from yelp_hpc.progress import as_called
from yelp_hpc.progress import say as tell
from yelp_hpc.rundir.files import write_bytes

DAY = 24 * 60


@dataclass(frozen=True)
class Choice:
    """What the two files are written from; a None partition leaves the site's default."""

    account: str | None
    cpu_partition: Partition | None
    gpu_partition: Partition | None
    gpu_type: str | None
    gpus_a_node: int
    cpu_node: Node | None
    gpu_node: Node | None
    max_array_size: int
    longest_cpu: int
    longest_gpu: int
    """Minutes that a job may run."""


def choose(slurm: SlurmFacts) -> Choice:
    """The account, partitions, GPU type and limits for this user on this cluster.

    Partitions that the user may use are preferred over those that preempt jobs, then the default
    one, then the larger ones.
    """
    mine = [association.account for association in slurm.associations or ()]
    default = slurm.default_account if slurm.default_account in mine else None
    account = default or next(iter(mine), None)

    def size(partition: Partition) -> int:
        return sum(node.usable for node in slurm.nodes_of(partition.name))

    def allowed(partition: Partition) -> bool:
        takes = not partition.allow_accounts or account in partition.allow_accounts
        closed = slurm.closed_to_groups(partition) or account in partition.deny_accounts
        return takes and not closed

    fit = [p for p in slurm.partitions if p.up and not p.hidden and allowed(p) and size(p)]
    fit.sort(key=lambda p: (p.preempted, not p.default, -size(p)))
    gpu = [p for p in fit if slurm.gpus_of(p.name)]
    cpu = [p for p in fit if p not in gpu] or fit
    gpu_partition = next(iter(gpu), None)
    cpu_partition = next(iter(cpu), None)
    kind, count, gpu_node = None, 0, None
    if gpu_partition:
        nodes = [node for node in slurm.nodes_of(gpu_partition.name) if node.usable and node.gpus]
        names = [name for node in nodes for name in node.gpus]
        if names:
            kind = max(dict.fromkeys(names), key=names.count)
            gpu_node = min(
                (node for node in nodes if kind in node.gpus), key=lambda node: node.memory
            )
            count = gpu_node.gpus[kind]
    cpu_nodes = slurm.nodes_of(cpu_partition.name) if cpu_partition else []
    return Choice(
        account=account,
        cpu_partition=cpu_partition,
        gpu_partition=gpu_partition if count else None,
        gpu_type=kind or None,
        gpus_a_node=count,
        cpu_node=min((n for n in cpu_nodes if n.usable), key=lambda n: n.memory, default=None),
        gpu_node=gpu_node,
        max_array_size=max(2, int(slurm.settings.get("MaxArraySize", "") or 1001)),
        longest_cpu=_longest(slurm, cpu_partition, account),
        longest_gpu=_longest(slurm, gpu_partition, account),
    )


def _longest(slurm: SlurmFacts, partition: Partition | None, account: str | None) -> int:
    want = Resources(partition=partition.name if partition else None, account=account)
    limits = [partition.max_minutes if partition else None]
    if slurm.enforces("limits"):
        limits += [qos.max_minutes for qos in qos_in_force(slurm, want)]
        mine = (own for own in slurm.associations or () if own.account == account)
        limits += [own.limits.max_minutes for own in mine if own.limits]
    return min((limit for limit in limits if limit is not None), default=7 * DAY)


def cluster_text(slurm: SlurmFacts, chosen: Choice, cluster: str, config: str, image: bool) -> str:
    """The cluster file: every choice with what else there was to choose from."""
    accounts = listed(a.account for a in slurm.associations or ())
    visible = [p for p in slurm.partitions if not p.hidden]
    cpu = chosen.cpu_partition.name if chosen.cpu_partition else None
    cpus = min(4, chosen.cpu_node.cpus) if chosen.cpu_node else 1
    memory = _memory(chosen.cpu_node, 1, 32_000)
    text = f"""\
# {slurm.settings.get("ClusterName") or "The cluster"}, as Slurm {slurm.version} described it.
#
#   python -m yelp_hpc doctor --cluster {in_shell(cluster)} --config {in_shell(config)}
#   python -m yelp_hpc submit all --config {in_shell(config)} \\
#       --cluster {in_shell(cluster)} --run runs/first --wait
#
# Partitions (longest job; GPUs a node):
{"".join(_partition_line(slurm, p) for p in visible)}# A null leaves the site's default.
defaults:
  partition: {_value(cpu)}
{_line("account", _value(chosen.account), f"yours: {accounts}")}
{_line("qos", "null", _qos_names(slurm))}
  cpus: {cpus}
  memory: {memory}M
  time: "{time_text(min(4 * 60, chosen.longest_cpu))}"
  save_seconds: 120               # a stage saves so long before its limit, and is requeued
"""
    if chosen.gpu_partition:
        share = max(1, chosen.gpu_node.cpus // chosen.gpus_a_node) if chosen.gpu_node else 1
        share = max(share, min(2, chosen.gpu_node.cpus if chosen.gpu_node else 1))
        text += f"""
train:
  partition: {_value(chosen.gpu_partition.name)}
{_line("gpu_type", _value(chosen.gpu_type), _types(slurm, chosen))}
  gpus: 1                         # up to {chosen.gpus_a_node} a node; as many as train.nproc
  nodes: 1
  cpus: {share}
  memory: {_memory(chosen.gpu_node, chosen.gpus_a_node, 10**9)}M
  time: "{time_text(min(12 * 60, chosen.longest_gpu))}"

infer:
  partition: {_value(chosen.gpu_partition.name)}
  gpu_type: {_value(chosen.gpu_type)}
  gpus: 1                         # of each task of the array
  cpus: {share}
  memory: {_memory(chosen.gpu_node, chosen.gpus_a_node, 10**9)}M
  time: "{time_text(min(4 * 60, chosen.longest_gpu))}"
"""
    nv = "true" if chosen.gpu_partition else "false"
    block = f"container:\n  image: yelp_hpc.sif\n  nv: {nv}\n  binds: []\n"
    if image:
        text += f"\n{block}"
    else:
        build = "python -m yelp_hpc image build" + (" --cuda" if chosen.gpu_partition else "")
        commented = "".join(f"# {line}\n" for line in block.splitlines())
        text += (
            "\n# Stages run on the Python that submits. To run them in an image instead, build it "
            f"with\n#   {build}\n# and put these lines in the place of `container: null`:\n"
            f"{commented}container: null\n"
        )
    return (
        text
        + f"""
setup: []                         # shell lines of each job, e.g. "module load apptainer"
array_parallelism: 4
max_array_size: {chosen.max_array_size:<17d} # Slurm's MaxArraySize
requeue_cap: 5                    # restarts in a row without any progress
"""
    )


def config_text(cluster: str, config: str) -> str:
    """The starter config: the demo's model and data, and how to change to one's own."""
    return f"""\
# A first run: SmolLM2-135M and real review sentences, both from PyPI; minutes on any machine.
#
#   python -m yelp_hpc submit all --config {in_shell(config)} \\
#       --cluster {in_shell(cluster)} --run runs/first --wait
name: first
seed: 42

model:
  path: demo:smollm2-135m         # or a folder, or a Hub model: THUDM/chatglm3-6b-base

data:
  source: demo                    # or file: a csv, jsonl or parquet of your own reviews
  # source: file
  # train: reviews.csv            # columns text and label (0 to 4)
  # test_rows: 200
  balanced: true
  train_rows: 1600
  test_rows: 500
  cutoff: 256

train:
  learning_rate: 1e-3
  warmup_steps: 20
  epochs: 1
  global_batch: 8
  max_tokens: 2048
  precision: auto                 # bf16 on GPUs since Ampere, fp16 on older ones, fp32 on a CPU
  nproc: 1                        # ranks a node, one a GPU: train.gpus of {cluster}
  save_every_steps: 50
  save_every_minutes: 2

infer:
  models: [base, tuned]
  shards: 2
"""


def _partition_line(slurm: SlurmFacts, partition: Partition) -> str:
    limit = "no limit" if partition.max_minutes is None else time_text(partition.max_minutes)
    gpus = slurm.gpus_of(partition.name)
    kinds = ", ".join(f"{count} × {kind or 'GPU'}" for kind, count in gpus.items())
    facts = [limit, *([kinds] if kinds else [])]
    facts += ["preempted"] if partition.preempted else []
    facts += ["the default"] if partition.default else []
    return f"#   {partition.name:<16} {'; '.join(facts)}\n"


def _qos_names(slurm: SlurmFacts) -> str:
    names = {name for association in slurm.associations or () for name in association.qos}
    return f"yours: {listed(sorted(names))}" if names else ""


def _types(slurm: SlurmFacts, chosen: Choice) -> str:
    assert chosen.gpu_partition
    kinds = [kind for kind in slurm.gpus_of(chosen.gpu_partition.name) if kind]
    return f"there: {listed(kinds)}" if kinds else "its GPUs have no type"


def _memory(node: Node | None, parts: int, most: int) -> int:
    """MB of a node's share, a tenth left to the system, but enough for a small model."""
    if node is None:
        return 4000
    usable = node.memory * 9 // 10
    return max(1, min(most, max(usable // max(1, parts), min(usable, 8000))))


def _line(key: str, value: str, note: str) -> str:
    """A line of a section, with what else there is to choose from behind it."""
    line = f"  {key}: {value}"
    return f"{line:<33} # {note}" if note and not note.endswith(": none") else line


def _value(text: str | None) -> str:
    """A YAML value that is read as this text."""
    if text is None:
        return "null"
    plain = re.fullmatch(r"[A-Za-z][\w.-]*", text)
    words = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
    return text if plain and text.lower() not in words else json.dumps(text)


def init(
    cluster: Path,
    config: Path,
    force: bool = False,
    say: Callable[[str], None] = tell,
) -> None:
    """Ask Slurm and write both files.

    Raises:
        RequestError: a file is there already, or there is no Slurm here.
        StageError: the controller does not answer, or a file cannot be written.
    """
    there = [f"{path} exists" for path in (cluster, config) if path.exists() and not force]
    if there:
        raise RequestError(all_problems("nothing was written; --force replaces:", there))
    slurm = ask_slurm()
    if not slurm.installed:
        raise RequestError(
            "there is no Slurm on this machine (no scontrol on PATH): run this on the cluster's "
            "login node, or on this machine alone:\n  python -m yelp_hpc demo"
        )
    if slurm.problem:
        raise StageError(f"Slurm does not answer, nothing was written:\n  {slurm.problem}")
    chosen = choose(slurm)
    image = Path("yelp_hpc.sif").is_file()
    text = cluster_text(slurm, chosen, str(cluster), str(config), image)
    write_bytes(cluster, as_called(text).encode())
    write_bytes(config, as_called(config_text(str(cluster), str(config))).encode())
    partition = chosen.gpu_partition or chosen.cpu_partition
    gpu = f", GPUs: {chosen.gpu_type or 'untyped'}" if chosen.gpu_partition else ", no GPUs"
    say(f"{cluster}: partition {partition.name if partition else 'of the site'}{gpu}")
    say(f"{config}: the demo's model and data")
    say(
        f"next: python -m yelp_hpc doctor --cluster {in_shell(cluster)} --config {in_shell(config)}"
    )
