"""The doctor on broken sites: each fault is named, and what it says to do mends it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub.server import serving
from tests.hub.state import Hub
from tests.jobs.fake_site import DISK, WEIGHTS, Site, complaints, partition
from tests.tiny import SIF, make_model
from yelp_hpc.cache import model_problem
from yelp_hpc.config import Config
from yelp_hpc.errors import nearest
from yelp_hpc.jobs import executor, slurm
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.doctor import node
from yelp_hpc.jobs.doctor.facts import Folder, Machine, NodeReport, NodeVisit
from yelp_hpc.jobs.doctor.findings import Finding, command, lines, ok
from yelp_hpc.jobs.doctor.machine import check_machine
from yelp_hpc.jobs.doctor.probes import data_columns, folder, quotas, seen
from yelp_hpc.jobs.doctor.request import DataFile, Inputs, Request
from yelp_hpc.jobs.doctor.run import binds_line, check_inputs, check_visit
from yelp_hpc.rundir.files import MARKER, write_json
from yelp_hpc.rundir.paths import RunPaths

Change = Callable[[Site], object]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Hub that knows one token."""
    with serving(Hub(tmp_path_factory.mktemp("hub"))) as made:
        yield made.url


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: str) -> Site:
    made = Site(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH", "HF_", "HUGGING", "APPTAINER", "SINGULARITY")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(made.bin))
    monkeypatch.setenv("HOME", str(made.home))
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # changed by a remedy: put back afterwards
    monkeypatch.setenv("HF_HOME", str(made.home))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub)
    return made


@dataclass(frozen=True)
class Case:
    """A fault, what is said of it, and what mends it where the remedy is not a line to apply."""

    name: str
    break_: Change
    check: str
    level: str
    says: str
    remedy: str = ""
    mend: Change | None = None
    """None: the remedy itself, typed as it stands."""
    on_node: bool = False


def edit(name: str, old: str, new: str) -> Change:
    return lambda site: site.edit(name, old, new)


def put(**values: object) -> Change:
    """Set dotted keys (`__` for the dot) of the cluster file or the config."""

    def change(site: Site) -> None:
        for key, value in values.items():
            site.set(key.replace("__", "."), value)

    return change


def touch(name: str, text: str = "") -> Change:
    return lambda site: site.say(name, text)


def drop(name: str) -> Change:
    return lambda site: (site.state / name).unlink()


def without(command_name: str) -> Change:
    return lambda site: (site.bin / command_name).rename(site.bin / f".{command_name}")


def again(command_name: str) -> Change:
    return lambda site: (site.bin / f".{command_name}").rename(site.bin / command_name)


def both(*changes: Change) -> Change:
    def change(site: Site) -> None:
        for one in changes:
            one(site)

    return change


def trained(site: Site) -> None:
    write_json(RunPaths(site.run).adapter / MARKER, {"files": {}})


def nproc(count: int) -> Change:
    return lambda site: site.overrides.append(f"train.nproc={count}")


def shards(count: int) -> Change:
    return lambda site: site.overrides.append(f"infer.shards={count}")


def skewed(seconds: int) -> Change:
    """The job's clock is wrong: a sitecustomize that shifts time.time."""

    def change(site: Site) -> None:
        shim = site.root / "shim"
        shim.mkdir()
        text = f"import time; real = time.time; time.time = lambda: real() + {seconds}\n"
        (shim / "sitecustomize.py").write_text(text)
        site.say("job-environment", f"export PYTHONPATH={shim}")

    return change


def record_then(*changes: Change) -> Change:
    return both(lambda site: site.record(), *changes)


def recorded_image(digest: str) -> Change:
    def change(site: Site) -> None:
        path = site.run / "run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image": {"sha256": digest}}))

    return change


def locked(path: str, mode: int) -> Change:
    return lambda site: (site.root / path).chmod(mode)


def _break_python(site: Site) -> None:
    site.script("python", "echo 'ModuleNotFoundError: No module named submitit' >&2; exit 1")
    site.cluster["python"] = str(site.bin / "python")


def _grow_quota(site: Site) -> None:
    from yelp_hpc.jobs.doctor.probes import mount

    _, source = mount(site.root)
    site.say("quota", f"Filesystem blocks quota limit\n{source} 990* 1000 1100 0 10 0 0 0")


SLURM = [
    Case("no client", without("scontrol"), "slurm", "failure", "no Slurm client", "module load",
         again("scontrol")),
    Case("controller down", touch("down"), "slurm", "failure", "connect failure", "scontrol ping",
         drop("down")),
    Case("old Slurm", touch("version", "slurm 19.05.5"), "slurm", "warning", "older than 22.05",
         "demo.yaml", touch("version", "slurm 24.11.5")),
    Case("partition misspelt", put(train__partition="gpus"), "partition", "failure",
         "no partition gpus .*nearest is gpu", "train.partition: gpu"),
    Case("no default partition",
         both(edit("partitions", "Default=YES", "Default=NO"), put(defaults__partition=None)),
         "partition", "failure", "no default partition", "defaults.partition: cpu"),
    Case("partition closed", edit("partitions", r"(=gpu .*?)State=UP", r"\1State=DOWN"),
         "partition", "failure", "gpu is not up", "train.partition: spare"),
    Case("nodes drained",
         both(edit("nodes", r"(=n1 .*?)State=IDLE", r"\1State=IDLE+DRAIN"),
              put(defaults__partition="cpu")),
         "partition", "failure", r"no node of partition cpu is up \(1 in all\)",
         "defaults.partition: gpu"),
    Case("GPU type misspelt", put(train__gpu_type="rtx_3090"), "GPUs", "failure",
         "no GPU of type rtx_3090.*nearest is rtx3090", "train.gpu_type: rtx3090"),
    Case("GPUs have no type", edit("nodes", "gpu:rtx3090:4", "gpu:4"), "GPUs", "failure",
         "its GPUs have no type", "train.gpu_type: null",
         put(train__gpu_type=None, infer__gpu_type=None)),
    Case("partition without GPUs", put(train__partition="cpu"), "GPUs", "failure",
         "partition cpu has no GPUs", "train.partition: gpu"),
    Case("GPUs of another partition",
         both(edit("nodes", "$", "\nNodeName=h1 CPUTot=16 RealMemory=64000 State=IDLE "
                   "Gres=gpu:h100:8 Partitions=cpu"), put(train__gpu_type="h100")),
         "GPUs", "failure", "partition cpu has", "train.partition: cpu"),
    Case("more GPUs than a node has", both(put(train__gpus=8), nproc(8)), "GPUs", "failure",
         "a node of gpu has at most 4", "train.gpus: 4", both(put(train__gpus=4), nproc(4))),
    Case("more ranks than GPUs", nproc(4), "GPUs", "failure", "one rank needs one GPU",
         "train.gpus: 4"),
    Case("idle GPUs", nproc(1), "GPUs", "warning", "1 would idle", "--set train.nproc=2"),
    Case("type without a count", put(train__gpus=None), "GPUs", "warning", "no GPU is asked for",
         "train.gpus: 2"),
    Case("driver not handed in", put(container__nv=False), "GPUs", "failure",
         "container.nv is off", "container.nv: true"),
    Case("time over the partition's", put(train__time="3-00:00:00"), "time limit", "failure",
         "ends jobs after 1-00:00:00", "train.time: 1-00:00:00"),
    Case("too many nodes", put(train__nodes=3), "size", "failure", "at most 1", "train.nodes: 1"),
    Case("too many CPUs", put(infer__cpus=64), "size", "failure", "fits has 16", "infer.cpus: 16"),
    Case("too much memory", put(train__memory="256G"), "size", "failure", "fits has 64000M",
         "train.memory: 64000M"),
    Case("account misspelt", put(defaults__account="fysics"), "account", "failure",
         "nearest is physics", "defaults.account: physics"),
    Case("no account at all", touch("assoc"), "account", "failure", "has no account in Slurm",
         "ask the site", touch("assoc", "lab||normal|normal")),
    Case("partition of another account",
         edit("partitions", r"(=gpu .*?)AllowAccounts=ALL", r"\1AllowAccounts=physics"),
         "account", "failure", "gpu does not take account lab", "defaults.account: physics"),
    Case("partition of a group's", edit("partitions", r"(=gpu .*?)AllowGroups=ALL",
                                        r"\1AllowGroups=gpuclub"),
         "account", "warning", "gpu takes the groups gpuclub", "another partition",
         put(train__partition="spare", infer__partition="spare")),
    Case("GPUs under the qos's least",
         both(edit("qos", r"(long.*)\n", r"\1|gres/gpu=2\n"), put(infer__qos="long")),
         "qos", "failure", "demands 2 at least", "infer.gpus: 2"),
    Case("GPUs over those of all jobs",
         edit("qos", r"(normal.*)\n", r"\1gres/gpu=1|\n"),
         "qos", "failure", "qos normal allows 1", "train.gpus: 1",
         both(put(train__gpus=1), nproc(1))),
    Case("qos misspelt", put(train__qos="lnog"), "qos", "failure", "nearest is long",
         "train.qos: long"),
    Case("qos that the partition refuses",
         both(put(train__qos="long"),
              edit("partitions", r"(=gpu .*?)AllowQos=ALL", r"\1AllowQos=normal")),
         "qos", "failure", "does not take qos long", "train.qos: normal"),
    Case("time over the qos's", edit("qos", "normal.2-00", "normal|0-01"), "qos", "failure",
         "qos normal allows 1:00:00", "defaults.time: 1:00:00"),
    Case("GPUs over the qos's",
         both(put(train__qos="long", train__gpus=4), nproc(4)), "qos", "failure",
         "long allows 2", "train.gpus: 2", both(put(train__gpus=2), nproc(2))),
    Case("jobs over the qos's", both(edit("qos", r"(normal.*)\|\n", r"\g<1>50\n"), shards(40)),
         "qos", "failure", "84 jobs would be queued", "max_array_size: 23"),
    Case("GPUs of a type over the qos's",
         both(edit("qos", r"gres/gpu=2", "gres/gpu:a100=1,gres/gpu:rtx3090=2,gres/gpu=4"),
              put(train__qos="long", train__gpus=3), nproc(3)), "qos", "failure",
         "qos long allows 2", "train.gpus: 2", both(put(train__gpus=2), nproc(2))),
    Case("time over the account's",
         edit("assoc", r"\|normal\nphysics", "|normal|01:00:00\nphysics"),
         "qos", "failure", "account lab allows 1:00:00", "defaults.time: 1:00:00"),
    Case("GPUs over the account's",
         both(edit("assoc", r"\|normal\nphysics", "|normal||gres/gpu=1|gres/gpu=8|\nphysics")),
         "qos", "failure", "account lab allows 1", "train.gpus: 1",
         both(put(train__gpus=1), nproc(1))),
    Case("preempted without warning", put(train__partition="spare"), "preemption", "warning",
         "preempts without warning", "--set train.save_every_minutes=5"),
    Case("cancelled when preempted",
         both(put(train__partition="spare"), edit("partitions", "=REQUEUE", "=CANCEL")),
         "preemption", "warning", "spare cancels the jobs", "another partition",
         edit("partitions", "GraceTime=0(.*)=CANCEL", r"GraceTime=60\1=CANCEL")),
    Case("suspended when preempted",
         both(put(train__partition="spare"), edit("partitions", "=REQUEUE", "=GANG,SUSPEND")),
         "preemption", "warning", "goes on later", "nothing to do", put(train__partition="gpu")),
    Case("a partition of the shell's that is not there",
         both(put(defaults__partition=None), lambda site: os.environ.update(SBATCH_PARTITION="x")),
         "partition", "failure", "no partition x", "prepare.partition",
         lambda site: os.environ.pop("SBATCH_PARTITION") and None),
    Case("a site without requeue", edit("config", r"JobRequeue( +)= 1", r"JobRequeue\1= 0"),
         "requeue", "warning", "JobRequeue is 0", "--on-node", put(requeue=False)),
    Case("sbatch refuses", touch("refuses", "allocation failure: Invalid feature specification"),
         "test-only", "failure", "sbatch refuses prepare, train.*Invalid feature", "constraint",
         touch("refuses")),
    Case("arrays too large", put(max_array_size=5000), "array size", "failure",
         "MaxArraySize is 1001", "max_array_size: 1001"),
    Case("no requeue by default", edit("config", r"(JobRequeue +)= 1", r"\1= 0"), "requeue",
         "warning", "JobRequeue is 0", "doctor --on-node",
         edit("config", r"(JobRequeue +)= 0", r"\1= 1")),
    Case("no accounting", touch("no-accounting"), "accounting", "warning", "no accounting",
         "nothing to do", drop("no-accounting")),
]  # fmt: skip

HOST = [
    Case("Python without submitit", _break_python, "python", "failure", "No module named submitit",
         "python: null"),
    Case("no apptainer", without("apptainer"), "apptainer", "warning", "not on PATH",
         "module load apptainer", again("apptainer")),
    Case("old apptainer", touch("apptainer", "apptainer version 1.0.3"), "apptainer", "warning",
         "1.0.3 is older", "apptainer/1.4", touch("apptainer", "apptainer version 1.4.5-1.el9")),
    Case("image missing", lambda site: site.image.rename(site.root / "kept"), "image", "failure",
         "does not exist", "image build", lambda site: (site.root / "kept").rename(site.image)),
    Case("image is none", lambda site: site.image.write_bytes(b"x" * 99) and None, "image",
         "failure", "no SIF image", "image build", lambda site: site.image.write_bytes(
             SIF) and None),
    Case("image of another run", record_then(recorded_image("0" * 64)), "image", "failure",
         "not the image of this run", "submit all", lambda site: shutil.rmtree(site.run)),
    Case("image of an older lock", lambda site: site.labels(lock="cuda.lock", version="0.1.0",
                                                            **{"lock-sha256": "0" * 64}),
         "image", "failure", "another cuda.lock", "--cuda", lambda site: site._machine()),
    Case("image of another version", lambda site: site.labels(version="0.0.1"), "image",
         "failure", "yelp_hpc 0.0.1", "image build", lambda site: site._machine()),
    Case("CPU image for GPUs", lambda site: site.labels(lock="cpu.lock"), "image", "failure",
         "torch is for the CPU", "--cuda", lambda site: site._machine()),
    Case("HF_HOME is missing", lambda site: os.environ.update(HF_HOME=str(site.root / "hf")),
         "HF_HOME", "failure", "does not exist", "mkdir -p"),
    Case("quota nearly used up", _grow_quota, "run directory", "warning", "quota", "remove",
         touch("quota")),
    Case("run's name", lambda site: setattr(site, "run", site.root / "a:b"), "run", "failure",
         "holds ':'", "runs/NAME", lambda site: setattr(site, "run", site.root / "ab")),
    Case("run of another config",
         record_then(both(trained, lambda site: site.overrides.append("lora.rank=4"))),
         "run", "failure", "lora.rank 8, the config says 4", "--set lora.rank=8"),
    Case("packages have changed", both(put(container=None), record_then(
        lambda site: (site.run / "run.json").write_text(json.dumps({
            **json.loads((site.run / "run.json").read_text()), "packages": {"torch": "1.0"}})) and
        None)), "packages", "warning", "begun with torch 1.0", "pip install torch==1.0",
        lambda site: shutil.rmtree(site.run)),
    Case("model misspelt", lambda site: site.set("model.path", str(site.model) + "y"), "model",
         "failure", "no such folder; did you mean .*tiny", "model.path"),
    Case("model without weights", lambda site: (site.model / "model.safetensors").unlink(),
         "model", "failure", "no weights", "fetch",
         lambda site: (site.model / "model.safetensors").write_bytes(WEIGHTS) and None),
    Case("model half copied", lambda site: (site.model / "m.index.json").write_text(
        '{"weight_map": {"a": "part-2.safetensors"}}') and None, "model", "failure",
        "missing or empty: part-2", "fetch",
        lambda site: (site.model / "part-2.safetensors").write_bytes(WEIGHTS) and None),
    Case("model is on the Hub only", put(model__path="me/model"), "model", "warning",
         "not in the cache", "fetch", lambda site: site.set("model.path", str(site.model))),
    Case("data misspelt", lambda site: site.set("data.train", str(site.data)[:-5] + ".csv"),
         "data", "failure", "missing; did you mean", "data.train"),
    Case("data without the column", lambda site: site.data.write_text("review,label\n") and None,
         "data", "failure", "no column text", "data.text_column: review"),
    Case("bind is missing", put(container__binds=["/no/such/folder"]), "binds", "failure",
         "which does not exist", "container.binds: []",
         lambda site: site.set("container.binds", [str(site.model.parent)])),
    Case("token is open", locked("token", 0o644), "token", "failure", "read by others",
         "chmod 600"),
    Case("token is missing", put(publish__token_file=None), "token", "failure", "no Hub token",
         "hf auth login", lambda site: shutil.copy(site.token, site.home / "token") and None),
    Case("token is refused", lambda site: site.token.write_text("bad-token") and None, "token",
         "failure", "refuses the token", "hf auth login",
         lambda site: site.token.write_text("good-token") and None),
    Case("login is open", both(put(publish__token_file=None), lambda site: shutil.copy(
        site.token, site.home / "token") and None, locked("home/token", 0o644)), "token",
        "failure", "read by others", "chmod 600"),
]  # fmt: skip

NODE = [
    Case("never starts", touch("stuck", "QOSMaxGRESPerUser"), "node job", "failure",
         "as many GPUs as the qos allows", "scontrol show job 4711", lambda site: None, True),
    Case("dies at once", touch("dies"), "node job", "failure", "ended without a report",
         "scontrol show job", drop("dies"), True),
    Case("requeue is refused", touch("job", "JobId=4711 Requeue=0"), "requeue", "failure",
         "would not requeue", "defaults.time", touch("job", "JobId=4711 Requeue=1"), True),
    Case("clock is wrong", skewed(300), "clock", "failure", "300.* s ahead", "chronyd",
         touch("job-environment"), True),
    Case("fewer GPUs than asked", touch("gpus", "GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-0)"),
         "driver", "failure", "asked for: 2, nvidia-smi shows 1", "scontrol show node",
         lambda site: site._machine(), True),
    Case("no driver", without("nvidia-smi"), "driver", "failure", "no driver on this node",
         "defaults.exclude", again("nvidia-smi"), True),
    Case("driver too old", touch("driver", "Driver Version: 470.1 CUDA Version: 11.4"), "CUDA",
         "failure", "needs CUDA 12.6; this node's driver supports 11.4", "--cuda",
         lambda site: site._machine(), True),
    Case("GPUs do not talk", lambda site: site.reduce(problem="rank 1: NCCL error"), "all-reduce",
         "failure", "NCCL error", "NCCL_DEBUG", lambda site: site._machine(), True),
    Case("GPUs add up wrongly", lambda site: site.reduce(correct=False), "all-reduce", "failure",
         "sum over 2 ranks is wrong", "NCCL_P2P_DISABLE", lambda site: site._machine(), True),
    Case("image does not start", touch("image-broken"), "image", "failure",
         "could not open image", "image check", drop("image-broken"), True),
]  # fmt: skip


def found(findings: list[Finding], case: Case) -> list[Finding]:
    return [f for f in findings if f.check == case.check and f.level != "ok"]


@pytest.mark.parametrize("case", SLURM + HOST + NODE, ids=lambda case: case.name)
def test_a_fault_is_named_and_its_remedy_mends_it(site: Site, case: Case) -> None:
    case.break_(site)
    wait = 4 if "stuck" in str(list(site.state.iterdir())) else 600
    bad = found(site.doctor(case.on_node, wait), case)
    assert bad, f"{case.check} finds nothing"
    texts = [f for f in bad if re.search(case.says, f.text, re.DOTALL)]
    assert texts, [f.text for f in bad]
    assert {f.level for f in texts} == {case.level}
    assert case.remedy in texts[0].remedy
    if case.mend:
        case.mend(site)
    else:
        for finding in bad:
            site.apply(finding)
    left = found(site.doctor(case.on_node), case)
    assert not [f for f in left if f.check not in DISK or re.search(case.says, f.text)]


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("Invalid qos specification", r"Slurm refuses train:.*Change train\.qos"),
        ("Unable to contact slurm controller", "does not answer, so train was not submitted"),
    ],
)
def test_a_job_on_a_node_that_is_refused_names_the_key(
    site: Site, said: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "PATIENCE", 0.0)
    error = f"echo 'sbatch: error: Batch job submission failed: {said}' >&2; exit 1"
    site.script("sbatch", f'[ "$1" = --test-only ] && exit 0\n{error}')
    (bad,) = [f for f in site.doctor(on_node=True) if f.check == "node job"]
    assert bad.level == "failure" and re.search(says, bad.text, re.DOTALL)


def test_a_sound_site_has_no_complaint(site: Site) -> None:
    findings = site.doctor(on_node=True)
    assert complaints(findings) == []
    assert {"host", f"node {os.uname().nodename}"} <= {f.where for f in findings}
    assert not list(site.run.parent.glob(".doctor*"))
    assert len({f.check for f in findings}) >= 24
    assert "good-token" not in json.dumps([f.__dict__ for f in findings])


def test_the_command_prints_lines_that_fit_and_ends_with_1(site: Site) -> None:
    make_model(site.model)  # a child of the command looks into it
    cluster, config = site.files()

    def doctor(*more: str) -> subprocess.CompletedProcess[str]:
        argv = ["-m", "yelp_hpc", "doctor", "--cluster", str(cluster), "--config", str(config)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, *argv, *more], capture_output=True, text=True, env=env
        )

    good = doctor()
    assert good.returncode == 0, good.stdout + good.stderr
    assert "\x1b" not in good.stdout
    site.set("train.gpu_type", "a100")
    site.files()
    bad = doctor()
    assert bad.returncode == 1
    for line in bad.stdout.splitlines():
        assert len(line) <= 80 or len(line.split()[-1]) > 40  # a path is never broken
    told = json.loads(doctor("--json").stdout)
    assert told["counts"]["failure"] == 1
    wrong = [f for f in told["findings"] if f["level"] == "failure"]
    assert wrong[0]["remedy"] == "train.gpu_type: rtx3090"
    (site.bin / "scontrol").unlink()
    torn = site.root / "torn"
    torn.mkdir()
    for text in ('{"config": ', "[]", '{"config": []}'):
        (torn / "run.json").write_text(text)
        refused = doctor("--run", str(torn))
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "run.json" in refused.stderr
    for more, says in [
        (["--on-node"], "--on-node needs Slurm"),
        (["--set", "nonsense=1"], "unknown key nonsense"),
        (["--wait-seconds", "0"], "--wait-seconds"),
    ]:
        refused = doctor(*more)
        assert refused.returncode == 2
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr


def test_inside_the_image_it_looks_at_what_is_there(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINER_CONTAINER", str(site.image))
    (site.bin / "scontrol").unlink()
    findings = site.doctor()
    assert {f.where for f in findings} == {"image"}
    assert "slurm" not in {f.check for f in findings}
    # a real sum of two real processes, the driver being a played one
    assert any(f.check == "all-reduce" for f in findings if f.level == "ok"), findings
    (site.bin / "nvidia-smi").unlink()
    shutil.rmtree(site.model)
    site.config["model"]["path"] = str(site.model.parent / "gone")
    bad = {f.check for f in site.doctor() if f.level == "failure"}
    assert {"driver", "model"} <= bad


# What cannot be broken for real without a broken disk: the facts are made up, the checks are not.

SOUND = Folder(path="/data", kind="nfs4", source="server:/data", free=2**40, inodes=10**6)


@pytest.mark.parametrize(
    ("facts", "level", "says"),
    [
        ({"free": 2**30}, "warning", "1.0 GiB free"),
        ({"free": 2**20}, "failure", "0.0 GiB free"),
        ({"inodes": 12}, "warning", "12 more files"),
        ({"torn": 3}, "failure", "missing or half"),
        ({"locks": False}, "warning", "no file locks"),
        ({"milliseconds": 900.0}, "warning", "900 ms"),
        ({"kind": "tmpfs"}, "warning", "lies in memory"),
        ({"problem": "Read-only file system"}, "failure", "read-only"),
    ],
)
def test_folders_that_do_not_hold(facts: dict[str, object], level: str, says: str) -> None:
    def look(folder: Folder) -> list[Finding]:
        machine = Machine(place="host", name="n", python="3.11.2", folders={"run": folder})
        findings = check_machine(machine, Request(ClusterConfig()))
        return [f for f in findings if f.check == "run directory"]

    assert [f.level for f in look(SOUND)] == ["ok"]
    bad = look(SOUND.model_copy(update=facts))
    assert [f.level for f in bad] == [level]
    assert says in bad[0].text
    assert "--run DIR" in bad[0].remedy


@pytest.mark.parametrize(("place", "level"), [("host", "warning"), ("node", "failure")])
def test_user_namespaces(place: str, level: str) -> None:
    cluster = ClusterConfig.model_validate({"container": {"image": "x.sif"}})
    machine = Machine.model_validate(
        {"place": place, "name": "n", "python": "3.11.2", "apptainer": "1.3.0"}
    )

    def look(**facts: bool) -> list[str]:
        changed = machine.model_copy(update=facts)
        findings = check_machine(changed, Request(cluster))
        return [f.level for f in findings if f.check == "namespaces"]

    assert look(user_namespaces=False) == [level]
    assert look(user_namespaces=False, starter_suid=True) == ["ok"]
    assert look(user_namespaces=False, root=True) == ["ok"]
    assert look(user_namespaces=True) == ["ok"]


def test_what_is_not_bound_is_named_with_the_line_that_binds_it() -> None:
    config = Config.model_validate(
        {"model": {"path": "x"}, "data": {"source": "file", "train": "r.csv", "test_rows": 1}}
    )
    data = DataFile(key="data.train", path="/usr/lib/reviews.csv", state="file")
    found = Inputs(model=Path("/usr/share"), data=(data,))

    def look(*binds: str) -> list[Finding]:
        cluster = ClusterConfig.model_validate({"container": {"image": "x.sif", "binds": binds}})
        findings = check_inputs(found, Request(cluster, config, Path("/data/runs/a")))
        return [f for f in findings if f.check == "binds"]

    (bad,) = look("/usr/bin:/bin")
    assert bad.level == "failure"
    assert "/usr/share (the model) and /usr/lib/reviews.csv (data.train)" in bad.text
    assert bad.remedy == "container.binds: [/usr/bin:/bin, /usr/share, /usr/lib]"
    assert [f.level for f in look("/usr/bin:/bin", "/usr/share", "/usr/lib")] == ["ok"]
    # bound, but to another place
    assert [f.level for f in look("/usr/share:/else", "/usr/lib")] == ["failure"]
    empty = Request(ClusterConfig())
    assert binds_line(empty, ["/m/llama-3.1", "/m"]) == "container.binds: [/m]"
    files = ["/a/r.tsv", "/b/r.csv.gz", "/c/R.NDJSON"]
    assert binds_line(empty, files) == "container.binds: [/a, /b, /c]"


def test_the_columns_of_lines_of_json_are_looked_at_by_either_ending(tmp_path: Path) -> None:
    for name in ("r.jsonl", "r.ndjson"):
        (tmp_path / name).write_text('{"review": "fine", "stars": 4}\n')
        assert data_columns(tmp_path / name, header=True) == ["review", "stars"]


@pytest.mark.parametrize(
    ("unfit", "remedy"),
    [
        ("lora.target nope matches no linear module", "lora.target: VALUE"),
        ("its weights are quantised (gptq)", "model.path: OWNER/NAME of another model"),
    ],
)
def test_what_the_model_cannot_do_is_mended_where_it_is_asked_for(unfit: str, remedy: str) -> None:
    config = Config.model_validate({"model": {"path": "m"}, "data": {"source": "demo"}})
    found = Inputs(model=Path("m"), unfit=unfit)
    (finding,) = check_inputs(found, Request(ClusterConfig(), config))
    assert (finding.text, finding.remedy) == (unfit, remedy)


def test_packages_that_are_not_those_of_the_lock() -> None:
    machine = Machine(
        place="host", name="n", python="3.11.2", packages={"click": "1.0"}, lock="click==8.5.1 \\\n"
    )
    findings = check_machine(machine, Request(ClusterConfig()))
    (bad,) = [f for f in findings if f.check == "packages"]
    assert "click is 1.0 here, the lock says 8.5.1" in bad.text
    assert bad.remedy == "python -m pip install click==8.5.1"
    same = machine.model_copy(update={"packages": {"click": "8.5.1"}})
    findings = check_machine(same, Request(ClusterConfig()))
    assert [f.level for f in findings if f.check == "packages"] == ["ok"]


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_colours_on_a_terminal_unless_told_not_to(no_colour: str) -> None:
    code = "from yelp_hpc.jobs.doctor.findings import *; print_findings([ok('a', 'b')])"
    leader, follower = os.openpty()
    env = {**os.environ, "NO_COLOR": no_colour, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], stdout=follower, env=env, check=True)
    os.close(follower)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert ("\x1b[32mok" in shown) == (not no_colour)
    assert "1 ok, 0 warnings, 0 failures" in shown


def test_a_node_that_never_sees_the_hosts_file_is_a_failure() -> None:
    machine = Machine(place="node", name="n1", python="3.11.2")
    good = NodeReport.model_validate(
        {
            "machine": machine,
            "sent": 100.0,
            "answered": 100.4,
            "allreduce": {"ranks": 2, "correct": True},
        }
    )
    request = Request(ClusterConfig())

    def look(report: NodeReport, **facts: object) -> set[tuple[str, str]]:
        seen = NodeVisit(job="1", report=report, answered=100.2)
        findings = check_visit(seen.model_copy(update=facts), request)
        return {(f.check, f.level) for f in findings if f.level != "ok"}

    assert look(good) == set()
    assert look(good, torn=2) == {("shared files", "failure")}
    assert look(good.model_copy(update={"answered": None})) == {("shared files", "failure")}
    late = good.model_copy(update={"answered": 120.0})
    assert look(late, answered=110.0) == {("shared files", "warning")}


def test_a_rename_that_copies_is_seen_and_a_real_one_is_sound(tmp_path: Path) -> None:
    def copying(source: Path, target: Path) -> None:
        content = source.read_bytes()
        with target.open("wb") as file:
            file.write(content[:100])
            file.flush()
            time.sleep(0.002)  # a reader has the time to look
            file.write(content[100:])
        source.unlink()

    assert folder(tmp_path, replace=copying).torn > 0
    sound = folder(tmp_path)
    assert sound.torn == 0
    assert sound.locks
    assert sound.milliseconds > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files() -> None:
    assert folder(Path("/sys")).problem  # not even root may


def test_without_slurm_a_machine_can_still_be_sound(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.bin / "scontrol").unlink()
    assert [f.level for f in site.doctor() if f.check == "slurm"] == ["failure"]
    site.cluster = {"container": None}
    findings = site.doctor()
    assert [(f.check, f.remedy) for f in complaints(findings)] == [
        ("slurm", "submit with --executor local")
    ]


def test_paths_that_cannot_be_looked_at_are_unreadable_and_no_traceback(site: Site) -> None:
    long = site.root / ("x" * 300)
    assert seen(long) == "unreadable"
    site.set("model.path", str(long))
    site.set("data.train", str(long / "reviews.csv"))
    bad = {f.check for f in site.doctor() if f.level == "failure"}
    assert {"model", "data"} <= bad


def test_quota_lines() -> None:
    text = (
        "Disk quotas for user me (uid 1):\n"
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
        "server:/home    120000* 100000  200000   6days    1234       0       0       0\n"
        "     /dev/sda1      50       0       0       0      10       0       0       0\n"
    )
    found = quotas(text)
    assert [(q.source, q.used, q.limit) for q in found] == [("server:/home", 120000, 100000)]


def test_a_model_folder_that_lacks_its_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "config.json" in model_problem(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert model_problem(tmp_path) == ""


def test_long_commands_can_be_copied_as_they_are_printed() -> None:
    long = "python -m yelp_hpc fetch " + " ".join(f"--set train.key_{i}={i}" for i in range(9))
    entry = lines([command("hub", "failure", "words " * 40, long), ok("a", "b")])
    assert all(len(line) <= 80 for line in entry)
    start = next(i for i, line in enumerate(entry) if "$ python" in line)
    shown = "\n".join(entry[start:]).partition("\n  ok")[0].replace("$ ", "", 1)
    assert " ".join(shown.replace("\\\n", " ").split()) == long
    coloured = lines([replace(ok("a", "b"), level="failure")], colour=True)
    assert "\x1b[31mfailure\x1b[0m" in coloured[1]


def test_nearest_ignores_case_and_knows_when_nothing_is_near() -> None:
    assert nearest("RTX3090", ["a100", "rtx3090"]) == "rtx3090"
    assert nearest("xyz", ["gpu", "cpu"]) is None


def test_the_default_partition_is_the_one_that_a_stage_gets(site: Site) -> None:
    site.set("defaults.partition", None)
    site.say("partitions", partition("gpu", "g1", "YES"))
    assert not [f for f in site.doctor() if f.check == "partition" and f.level != "ok"]


@pytest.mark.parametrize("held", [True, False])
def test_a_job_that_squeue_does_not_show_is_asked_of_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None, time=time.time)
    monkeypatch.setattr(node, "time", clock)
    answers = {"queue": [], "held": held, "cancel": None, "facts_of": {}}
    for name, answer in answers.items():
        monkeypatch.setattr(slurm, name, lambda *_, answer=answer: answer)
    made = node._wait(node._Exchange(tmp_path), "7", 60, lambda _: None)
    assert ("ended without a report" in made.problem) is not held
    assert ("has not reported within 60 s" in made.problem) is held
