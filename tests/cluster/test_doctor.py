"""`init` and `doctor` on the real Slurm: content with what is sound, exact about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Cluster, wait_for, yelp_hpc
from tests.tiny import make_model
from yelp_hpc.jobs.cluster import load_cluster


@pytest.fixture
def files(slurm: Cluster, tmp_path: Path) -> Path:
    """A folder with what init wrote, and a model and data of one's own."""
    names = ["--cluster", str(tmp_path / "cluster.yaml"), "--config", str(tmp_path / "config.yaml")]
    yelp_hpc("init", *names)
    make_model(tmp_path / "model")
    (tmp_path / "reviews.csv").write_text("text,label\nfine,4\n")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["model"]["path"] = str(tmp_path / "model")
    config["data"] = {"source": "file", "train": str(tmp_path / "reviews.csv"), "test_rows": 100}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def doctor(files: Path, *more: str) -> tuple[int, list[dict[str, str]]]:
    names = ["--cluster", str(files / "cluster.yaml"), "--config", str(files / "config.yaml")]
    argv = ["doctor", *names, "--run", str(files / "runs" / "first"), "--json", *more]
    done = yelp_hpc(*argv, check=False, HF_HUB_OFFLINE="1")
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]


def test_what_init_writes_is_sound_and_a_job_on_a_node_agrees(files: Path, slurm: Cluster) -> None:
    cluster = load_cluster(files / "cluster.yaml")
    train = cluster.resources("train")
    assert (train.partition, train.gpu_type, train.gpus) == ("gpu", "rtx3090", 1)
    assert cluster.resources("prepare").partition == "cpu"
    code, findings = doctor(files, "--on-node")
    assert code == 0, [f for f in findings if f["level"] == "failure"]
    # the GPUs of this cluster are not real ones, and the doctor is not fooled
    wrong = {f["check"] for f in findings if f["level"] == "warning"}
    slow = {"run directory", "shared files"}  # a busy machine is no fault
    assert wrong - slow == {"driver"}
    node = {f["check"] for f in findings if f["where"].startswith("node")}
    assert {"node job", "requeue", "clock", "shared files", "all-reduce", "files"} <= node
    wait_for(lambda: not slurm.sh("squeue", "-h", "-n", "yelp-doctor"), 30, "the job to end")
    assert not list(files.glob(".doctor*"))


def test_what_is_wrong_is_named_as_slurm_sees_it(files: Path) -> None:
    path = files / "cluster.yaml"
    cluster = yaml.safe_load(path.read_text())
    assert cluster["defaults"]["time"] == "4:00:00"  # however YAML reads it
    cluster["train"] |= {"gpu_type": "rtx4090", "gpus": 1}
    cluster["infer"] |= {"partition": "gpuu"}
    cluster["defaults"] |= {"time": "2-00:00:00"}
    cluster["max_array_size"] = 20_000
    path.write_text(yaml.safe_dump(cluster))
    code, findings = doctor(files)
    assert code == 1
    remedies = {f["remedy"] for f in findings if f["level"] == "failure"}
    assert {
        "train.gpu_type: rtx3090",
        "infer.partition: gpu",
        "defaults.time: 1-00:00:00",
        "max_array_size: 10001",
    } <= remedies
    # Slurm's own word on the same request
    refused = [f["text"] for f in findings if f["check"] == "test-only" and f["level"] != "ok"]
    assert any("train" in text for text in refused)
    assert any("infer" in text for text in refused)


def test_a_job_that_fails_shows_its_last_lines(files: Path) -> None:
    path = files / "cluster.yaml"
    path.write_text(path.read_text().replace("setup: []", 'setup: ["echo no such module", exit 3]'))
    code, findings = doctor(files, "--on-node")
    assert code == 1
    (bad,) = [f for f in findings if f["level"] == "failure"]
    assert bad["check"] == "node job"
    assert "ended without a report" in bad["text"]
    assert "no such module" in bad["text"]


def test_nodes_that_are_drained(files: Path, slurm: Cluster) -> None:
    slurm.sh("scontrol", "update", "nodename=g[1-2]", "state=drain", "reason=test")
    try:
        _, findings = doctor(files)
    finally:
        slurm.sh("scontrol", "update", "nodename=g[1-2]", "state=resume")
    texts = [f["text"] for f in findings if f["check"] == "partition"]
    assert any("no node of partition gpu is up (2 in all)" in text for text in texts)
    states = ("sinfo", "-h", "-p", "gpu", "-o", "%T")
    wait_for(lambda: slurm.sh(*states) == "idle", 60, "the nodes to be back")
    code, findings = doctor(files)
    assert code == 0, [f for f in findings if f["level"] == "failure"]
