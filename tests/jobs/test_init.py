"""`init` on sites of several kinds: what it writes loads, and the doctor is content with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs.fake_site import SCRIPTS, Site, complaints, node, partition
from yelp_hpc.config import load_config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs.cluster import load_cluster
from yelp_hpc.jobs.doctor.diagnose import diagnose
from yelp_hpc.jobs.site.init import choose, cluster_text, config_text, init
from yelp_hpc.jobs.site.slurm_facts import (
    SlurmFacts,
    parse_associations,
    parse_gres,
    parse_nodes,
    parse_partitions,
    parse_qos,
    parse_settings,
    time_limit,
    usable,
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin))
    monkeypatch.setenv("HOME", str(made.home))
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return made


def quiet(text: str) -> None:
    pass


def test_the_files_load_and_the_doctor_is_content(site: Site) -> None:
    init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    cluster, config = load_cluster("c.yaml"), load_config("first.yaml").config
    train = cluster.resources("train")
    assert (train.partition, train.gpu_type, train.gpus) == ("gpu", "rtx3090", config.train.nproc)
    assert train.account == "lab"
    assert cluster.resources("prepare").partition == "cpu"
    assert cluster.resources("prepare").gpus is None
    assert cluster.max_array_size == 1001
    # the image that is there is used
    assert cluster.container
    assert cluster.container.nv
    findings = diagnose(cluster, None, "runs/new")
    assert complaints(findings) == []
    text = Path("c.yaml").read_text()
    assert "spare" in text  # what else there is
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_banner_before_every_answer_is_no_account(site: Site) -> None:
    init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    quietly = Path("c.yaml").read_text()
    banner = "printf '\\033[1mWelcome to lab\\033[0m\\nhelp | desk\\n42\\n'\n"
    for name in ("scontrol", "sacctmgr", "sacct"):
        site.script(name, banner + SCRIPTS[name])
    init(Path("c.yaml"), Path("first.yaml"), force=True, say=quiet)
    assert Path("c.yaml").read_text() == quietly
    site.script("scontrol", banner)
    with pytest.raises(StageError, match="printed something else than was asked for: Welcome"):
        init(Path("c.yaml"), Path("first.yaml"), force=True, say=quiet)


def test_without_an_image_stages_run_on_the_host(site: Site) -> None:
    site.image.unlink()
    init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    assert load_cluster("c.yaml").container is None
    findings = diagnose(load_cluster("c.yaml"), load_config("first.yaml").config, "runs/new")
    assert complaints(findings) == []
    # the commented lines are the ones to use
    text = Path("c.yaml").read_text().replace("container: null\n", "")
    Path("c.yaml").write_text(text.replace("# container:\n#   ", "container:\n  ").replace(
        "\n#   nv:", "\n  nv:").replace("\n#   binds:", "\n  binds:"))  # fmt: skip
    assert load_cluster("c.yaml").container


def test_nothing_is_overwritten_unless_forced(site: Site) -> None:
    Path("c.yaml").write_text("mine")
    Path("first.yaml").write_text("mine")
    with pytest.raises(RequestError, match=r"c\.yaml exists[\s\S]*first\.yaml exists"):
        init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    assert Path("c.yaml").read_text() == Path("first.yaml").read_text() == "mine"
    init(Path("c.yaml"), Path("first.yaml"), force=True, say=quiet)
    assert load_cluster("c.yaml").resources("train").gpus == 1


def test_without_slurm_there_is_one_message(site: Site) -> None:
    (site.bin / "scontrol").unlink()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", "yelp_hpc", "init"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "no Slurm on this machine" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("cluster.yaml").exists()


def test_a_controller_that_is_down(site: Site) -> None:
    site.say("down", "")
    with pytest.raises(StageError, match="connect failure"):
        init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    assert not Path("c.yaml").exists()


SITES = {
    "no GPUs": ([partition("batch", "n1", "YES")], [node("n1", "batch")]),
    "no default partition": ([partition("batch", "n1")], [node("n1", "batch")]),
    "one partition with GPUs": (
        [partition("all", "g1", "YES")],
        [node("g1", "all", "gpu:nvidia_a100-sxm4-80gb:8(S:0-1)")],
    ),
    "untyped GPUs": ([partition("g", "g1", "YES")], [node("g1", "g", "gpu:2")]),
    "names that YAML reads otherwise": (
        [partition("3090", "g1"), partition("no", "n1", "YES")],
        [node("g1", "3090", "gpu:3090:2"), node("n1", "no")],
    ),
    "MIG slices": (
        [partition("g", "g1", "YES")],
        [node("g1", "g", "gpu:a100_3g.20gb:2(S:0),gpu:a100:1(S:1)")],
    ),
    "only a preempted partition has GPUs": (
        [partition("cpu", "n1", "YES"), partition("low", "g1", preempt="REQUEUE", grace="60")],
        [node("n1", "cpu"), node("g1", "low", "gpu:v100:4")],
    ),
    "a small node": (
        [partition("cpu", "n1", "YES")],
        [node("n1", "cpu").replace("64000", "3000").replace("=16", "=1")],
    ),
}


@pytest.mark.parametrize("name", list(SITES))
def test_other_sites(site: Site, name: str) -> None:
    partitions, nodes = SITES[name]
    site.image.unlink()
    site.say("partitions", "\n".join(partitions))
    site.say("nodes", "\n".join(nodes))
    init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    cluster, config = load_cluster("c.yaml"), load_config("first.yaml").config
    findings = diagnose(cluster, config, "runs/new")
    assert complaints(findings) == []
    gpus = "gpu:" in nodes[0] + nodes[-1]
    assert bool(cluster.resources("train").gpus) == gpus


def test_limits_are_within_those_of_the_partition_and_the_qos(site: Site) -> None:
    site.edit("partitions", "(=gpu .*?)MaxTime=1-00:00:00", r"\1MaxTime=06:00:00")
    site.edit("qos", r"normal\|2-00:00:00", "normal|03:00:00")
    init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    assert load_cluster("c.yaml").resources("train").time == "3:00:00"


def test_a_partition_of_another_account_is_not_chosen(site: Site) -> None:
    site.edit("partitions", "(=gpu .*?)AllowAccounts=ALL", r"\1AllowAccounts=theirs")
    init(Path("c.yaml"), Path("first.yaml"), say=quiet)
    assert load_cluster("c.yaml").resources("train").partition == "spare"


def test_a_slurm_that_says_nothing_about_accounts() -> None:
    facts = SlurmFacts(
        version="23.11.4",
        partitions=parse_partitions(partition("batch", "n1", "YES")),
        nodes=parse_nodes(node("n1", "batch")),
    )
    chosen = choose(facts)
    assert chosen.account is None
    text = cluster_text(facts, chosen, "c.yaml", "f.yaml", image=False)
    assert yaml.safe_load(text)["defaults"]["account"] is None
    assert yaml.safe_load(config_text("c.yaml", "f.yaml"))["name"] == "first"


# Slurm's text, of several releases


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:4", {"": 4}),
        ("gpu:rtx3090:4", {"rtx3090": 4}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:4(S:0,2),mps:400,nvme:1", {"a100": 4}),
        ("craynetwork:4,gpu:a100_3g.20gb:2(S:0),gpu:a100:1", {"a100_3g.20gb": 2, "a100": 1}),
        ("gpu:tesla:no_consume:2", {"tesla": 2}),
        ("gpu:3090:2", {"3090": 2}),
    ],
)
def test_gres(gres: str, gpus: dict[str, int]) -> None:
    assert parse_gres(gres) == gpus


@pytest.mark.parametrize(
    ("state", "takes_jobs"),
    [
        ("IDLE", True),
        ("MIXED+PLANNED", True),
        ("ALLOCATED", True),
        ("IDLE+CLOUD+POWERED_DOWN", True),
        ("DOWN*", False),
        ("IDLE*", False),
        ("IDLE+DRAIN", False),
        ("MIXED+DRAIN", False),
        ("DOWN+NOT_RESPONDING", False),
        ("RESERVED+MAINTENANCE", False),
    ],
)
def test_node_states(state: str, takes_jobs: bool) -> None:
    assert usable(state) == takes_jobs


def test_values_with_spaces_and_missing_ones() -> None:
    text = (
        "NodeName=g1 Arch=x86_64 CPUTot=64 Gres=gpu:h100:8 OS=Linux 5.14.0 #1 SMP Tue Jan 2 "
        "RealMemory=1000000 State=MIXED Partitions=a,b AllocTRES= Comment=rack=7 State=odd "
        "Reason=mended [root@2024]"
    )
    (found,) = parse_nodes(text)
    assert (found.cpus, found.memory, found.partitions) == (64, 1_000_000, ("a", "b"))
    assert found.usable
    old = "PartitionName=p MaxTime=INFINITE State=UP DenyAccounts=x,y QoS=big GraceTime=30"
    (part,) = parse_partitions(old)
    assert (part.max_minutes, part.deny_accounts, part.qos) == (None, ("x", "y"), "big")
    assert parse_settings("MaxArraySize            = 1001\nSlurmctld(primary) at h is UP\n") == {
        "MaxArraySize": "1001"
    }


def test_accounts_and_qos() -> None:
    (first, second) = parse_associations("lab||normal,+long|normal\nlab|gpu||\n\n")
    assert first.qos == ("normal", "long")
    assert second.partition == "gpu"
    (qos,) = parse_qos("big|1-00:00:00|cpu=4,gres/gpu=2|gres/gpu:a100=8|50\n")
    assert (qos.max_minutes, qos.gpus_a_job, qos.gpus_a_user, qos.submitted_a_user) == (
        1440,
        2,
        8,
        50,
    )


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("UNLIMITED", None), ("INFINITE", None), ("", None), ("02:00:00", 120), ("7-00:00:00", 10080)],
)
def test_limits(text: str, minutes: int | None) -> None:
    assert time_limit(text) == minutes
