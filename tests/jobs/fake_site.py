"""A site in a folder: its Slurm, Apptainer and driver are small scripts, all else is real.

The scripts answer from text files under `state`, which a test changes to break things; a job is
a real process that runs the real script.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import SIF
from yelp_hpc import __version__
from yelp_hpc.config import Config, load_config
from yelp_hpc.jobs.cluster import ClusterConfig, load_cluster
from yelp_hpc.jobs.doctor.diagnose import diagnose
from yelp_hpc.jobs.doctor.findings import Finding
from yelp_hpc.jobs.site.client import user_name
from yelp_hpc.rundir.manifest import lock_hashes, record_run
from yelp_hpc.settings import parse_value

TOP = Path(__file__).resolve().parents[2]
WEIGHTS = b"\x02" + bytes(7) + b"{}"
"""Safetensors of nothing."""
TOOLS = ("bash", "sh", "env", "cat", "sleep", "setsid", "git", "mkdir", "rm", "chmod", "uname")

SCRIPTS = {
    "scontrol": """
[ -e $S/down ] && { echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1; }
case "$*" in
  --version) cat $S/version;;
  "show config") cat $S/config;;
  *"show partition") cat $S/partitions;;
  *"show node") cat $S/nodes;;
  *"show job"*) cat $S/job;;
esac""",
    "sacctmgr": """
case "$*" in
  *"show assoc"*) cat $S/assoc;;
  *"show user"*) cat $S/account;;
  *"show qos"*) cat $S/qos;;
esac""",
    "sacct": "[ ! -e $S/no-accounting ] || { echo 'accounting is disabled' >&2; exit 1; }",
    "sbatch": """
if [ "$1" = --test-only ]; then [ ! -s $S/refuses ] || { cat $S/refuses >&2; exit 1; }; exit 0; fi
[ -e $S/stuck ] && { echo 4711; exit 0; }
[ -e $S/dies ] && { echo 4711; exit 0; }
. $S/job-environment
setsid bash "$2" >$S/job.out 2>&1 & echo $! >$S/pid
echo 4711""",
    "srun": """
while [[ $1 == -* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@" """,
    "squeue": """
row() { echo "4711|$1|$2|n1|0:01|5:00|0|"; }
if [ -e $S/stuck ]; then row PENDING "$(cat $S/stuck)"
elif [ -e $S/pid ] && kill -0 $(cat $S/pid) 2>/dev/null; then row RUNNING None; fi""",
    "scancel": "rm -f $S/stuck",
    "apptainer": """
case "$*" in
  --version) cat $S/apptainer;;
  buildcfg) echo "LIBEXECDIR=$S";;
  *inspect*) cat $S/labels;;
  *yelp_hpc.ranks.allreduce*) cat $S/allreduce;;
  exec*) [ ! -e $S/image-broken ] || { echo 'FATAL: could not open image' >&2; exit 255; }
    while [ "$1" != python ]; do shift; done; shift
    export APPTAINER_CONTAINER=1; exec $PYTHON "$@";;
esac""",
    "nvidia-smi": 'if [ "$1" = -L ]; then cat $S/gpus; else cat $S/driver; fi',
    "unshare": "[ ! -e $S/no-namespaces ]",
    "quota": "cat $S/quota",
}

PARTITION = (
    "AllowGroups=ALL AllowAccounts={accounts} AllowQos=ALL AllocNodes=ALL Default={default} "
    "QoS=N/A DefaultTime=00:10:00 GraceTime={grace} Hidden=NO MaxNodes=UNLIMITED "
    "MaxTime=1-00:00:00 MinNodes=0 LLN=NO Nodes={nodes} PreemptMode={preempt} State=UP "
    "TotalCPUs=16 TotalNodes=1 DefMemPerCPU=500 TRES=cpu=16,mem=64000M,node=1,billing=16"
)
NODE = (
    "Arch=x86_64 CoresPerSocket=8 CPUAlloc=0 CPUEfctv=16 CPUTot=16 CPULoad=0.10 "
    "AvailableFeatures=(null) Gres={gres} NodeAddr=127.0.0.1 Version=22.05.8 "
    "OS=Linux 6.1.0 #1 SMP PREEMPT_DYNAMIC @0 RealMemory=64000 AllocMem=0 Sockets=2 "
    "State=IDLE Partitions={partitions} BootTime=2026-01-01T00:00:00 CfgTRES=cpu=16,mem=64000M"
)


def partition(name: str, nodes: str, default: str = "NO", **facts: str) -> str:
    facts = {"accounts": "ALL", "grace": "0", "preempt": "OFF", **facts}
    return f"PartitionName={name} " + PARTITION.format(nodes=nodes, default=default, **facts)


def node(name: str, partitions: str, gres: str = "(null)") -> str:
    return f"NodeName={name} " + NODE.format(partitions=partitions, gres=gres)


# what the disk under the tests is like, and how busy the machine is, is not the site's doing
DISK = ("run directory", "cache", "HF_HOME", "scratch")


def complaints(findings: list[Finding]) -> list[Finding]:
    slow = ("shared files", "warning")
    return [
        f
        for f in findings
        if f.level != "ok" and f.check not in DISK and (f.check, f.level) != slow
    ]


class Site:
    """The site, one user's files on it, and the doctor that looks at both."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.state = root, root / "bin", root / "state"
        self.home, self.run = root / "home", root / "runs" / "first"
        self.overrides: list[str] = []
        for folder in (self.bin, self.state, self.home, self.run.parent, root / "cache"):
            folder.mkdir(parents=True)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        for name, script in SCRIPTS.items():
            self.script(name, script)
        self._slurm()
        self._machine()
        self._files()

    def script(self, name: str, text: str) -> None:
        head = f"#!{self.bin}/bash\nS={self.state}\nPYTHON={sys.executable}\n"
        (self.bin / name).write_text(head + text.strip() + "\n")
        (self.bin / name).chmod(0o755)

    def _slurm(self) -> None:
        self.say("version", "slurm-wlm 22.05.8")
        settings = {
            "AccountingStorageEnforce": "associations,limits,qos,safe",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "ClusterName": "lab",
            "JobRequeue": "1",
            "MaxArraySize": "1001",
        }
        self.say("config", "\n".join(f"{k:<23} = {v}" for k, v in settings.items()))
        self.say(
            "partitions",
            partition("cpu", "n1", "YES")
            + "\n"
            + partition("gpu", "g1")
            + "\n"
            + partition("spare", "g1", preempt="REQUEUE"),
        )
        gpu = node("g1", "gpu,spare", "gpu:rtx3090:4(S:0-1)")
        self.say("nodes", node("n1", "cpu") + "\n" + gpu)
        self.say("assoc", "lab||long,normal|normal\nphysics||normal|normal")
        self.say("account", f"{user_name()}|lab")
        self.say("qos", "normal|2-00:00:00||||\nlong|7-00:00:00||gres/gpu=2||")
        self.say("job", "JobId=4711 JobName=yelp-doctor Requeue=1 Restarts=0")
        self.say("job-environment", "")

    def _machine(self) -> None:
        self.say("apptainer", "apptainer version 1.4.5")
        lock = {"lock": "cuda.lock", "lock-sha256": lock_hashes()["cuda.lock"]}
        self.labels(version=__version__, **lock)
        self.say("driver", "| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.8 |")
        names = [f"GPU {i}: NVIDIA GeForce RTX 3090 (UUID: GPU-{i})" for i in range(2)]
        self.say("gpus", "\n".join(names))
        self.reduce()
        self.say("quota", "Filesystem blocks quota limit grace files quota limit grace")

    def labels(self, **labels: str) -> None:
        named = {f"yelp-hpc.{key}": value for key, value in labels.items()}
        self.say("labels", json.dumps({"data": {"attributes": {"labels": named}}}))

    def reduce(self, **facts: Any) -> None:
        good = {"backend": "nccl", "ranks": 2, "devices": ["RTX 3090"] * 2, "torch": "2.13.0"}
        good |= {"cuda": "12.6", "correct": True, "gb_per_s": 9.0}
        self.say("allreduce", json.dumps(good | facts))

    def _files(self) -> None:
        self.image = self.root / "yelp_hpc.sif"
        self.image.write_bytes(SIF)
        self.model = self.root / "models" / "tiny"
        self.model.mkdir(parents=True)
        (self.model / "config.json").write_text('{"model_type": "llama"}')
        (self.model / "model.safetensors").write_bytes(WEIGHTS)
        (self.model / "tokenizer.json").write_text("{}")
        self.data = self.root / "models" / "reviews.csv"
        self.data.write_text("text,label\nfine,4\n")
        self.token = self.root / "token"
        self.token.write_text("good-token\n")
        self.token.chmod(0o600)
        gpu = {"partition": "gpu", "gpu_type": "rtx3090", "gpus": 2}
        self.cluster: dict[str, Any] = {
            "defaults": {"partition": "cpu", "account": "lab", "memory": "8G", "time": "2:00:00"},
            "train": dict(gpu),
            "infer": {**gpu, "gpus": 1},
            "container": {
                "image": str(self.image),
                "nv": True,
                "binds": [str(self.model.parent)],
            },
            "max_array_size": 1001,
        }
        self.config: dict[str, Any] = {
            "model": {"path": str(self.model)},
            "data": {"source": "file", "train": str(self.data), "test_rows": 100},
            "train": {"nproc": 2, "precision": "fp16"},
            "publish": {"repo_id": "me/adapter", "token_file": str(self.token)},
        }

    # changing it

    def say(self, name: str, text: str) -> None:
        (self.state / name).write_text(text + "\n" if text else "")

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.state / name).read_text()
        assert re.search(old, text), f"{name} has no {old}"
        (self.state / name).write_text(re.sub(old, new, text))

    def set(self, dotted: str, value: Any) -> None:
        """Change one value of the cluster file or, where the section is its own, the config."""
        *parents, last = dotted.split(".")
        mine = Config.model_fields if dotted.startswith(("model", "data", "publish")) else {}
        place: Any = self.config if parents and parents[0] in mine else self.cluster
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value

    def apply(self, finding: Finding) -> None:
        """Do what a finding says, as a user would."""
        for line in finding.remedy.splitlines():
            if line.startswith("--set "):
                self.overrides.append(line.removeprefix("--set "))
            elif line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                os.environ[name] = value
            elif finding.kind == "command":
                subprocess.run(shlex.split(line), check=True)
            else:
                key, _, value = line.partition(": ")
                self.set(key, parse_value(value))

    # asking it

    def files(self) -> tuple[Path, Path]:
        cluster, config = self.root / "cluster.yaml", self.root / "config.yaml"
        cluster.write_text(yaml.safe_dump(self.cluster))
        config.write_text(yaml.safe_dump(self.config))
        return cluster, config

    def record(self) -> None:
        """Make the run directory that a submission would."""
        _, config = self.files()
        record_run(self.run, load_config(config, self.overrides), str(config), [])

    def doctor(self, on_node: bool = False, wait_seconds: float = 600) -> list[Finding]:
        cluster, config = self.files()
        loaded: ClusterConfig = load_cluster(cluster)
        return diagnose(
            loaded,
            load_config(config, self.overrides).config,
            self.run,
            config_file=str(config),
            on_node=on_node,
            wait_seconds=wait_seconds,
            say=lambda text: None,
        )
