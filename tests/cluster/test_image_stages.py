"""The five stages in a real image on the real Slurm, and training in it that is interrupted.

The image knows no Slurm: the supervisor on the host asks for the requeue. On Slurm the image is
mounted by root; as a user squashfuse mounts it, and only the apptainer process may be signalled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from tests.cluster.conftest import Cluster, copy_run, read, wait_ended, wait_for, yelp_hpc
from tests.cluster.test_interruptions import write_config
from tests.hub.server import serving
from tests.hub.state import Hub
from tests.test_task import predictions, write_task
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import with_inputs
from yelp_hpc.jobs.executor import freeze_cluster
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import read_jsonl, sha256_file
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.paths import RunPaths

pytestmark = pytest.mark.timeout(1500)

REPO = "me/stars"
TOKEN = "good-token"  # of the local Hub
PLACES = {
    "reference": {"partition": "cpu"},
    "time-limit": {"partition": "cpu", "time": "1", "save_seconds": 30},
    "preemption": {"partition": "low", "gpus": 4, "gpu_type": "rtx3090"},
}


@dataclass
class Outcome:
    folder: Path
    image: Path
    hub: Hub
    runs: dict[str, RunPaths] = field(default_factory=dict)

    def adapter(self, name: str) -> str:
        return sha256_file(self.runs[name].adapter / "adapter_model.safetensors")

    def cluster(self, name: str) -> Path:
        """A cluster file whose training runs in one of the PLACES."""
        values = {
            "defaults": {"partition": "cpu", "memory": "500M", "time": "10", "save_seconds": 30},
            "train": PLACES[name],
            "requeue_cap": 20,
            "container": {
                "image": str(self.image),
                "cache": str(self.folder / "cache"),
                "env": ["HF_HUB_DISABLE_XET"],  # the local Hub speaks the older protocol
            },
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def jobs(self, name: str) -> list[str]:
        return [line["job"] for line in read_jsonl(self.runs[name].submissions)]


@pytest.fixture(scope="module")
def outcome(slurm: Cluster, image_sif: Path, open_folder: Path) -> Iterator[Outcome]:
    """Everything happens here once; the tests look at what came of it."""
    top = open_folder / "stages"
    top.mkdir()
    config = write_config(top)
    token = top / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    values = yaml.safe_load(config.read_text())
    values["publish"] = {"repo_id": REPO, "token_file": str(token)}
    config.write_text(yaml.safe_dump(values))
    with serving(Hub(top / "hub")) as hub:
        env: dict[str, Any] = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        made = Outcome(top, image_sif, hub)

        def submit(stage: str, name: str, run: Path) -> None:
            argv = ["--config", str(config), "--cluster", str(made.cluster(name))]
            yelp_hpc("submit", stage, *argv, "--run", str(run), **env)
            made.runs[name] = RunPaths(run)

        submit("all", "reference", top / "reference")
        reference = made.runs["reference"]
        wait_for(lambda: (reference.prepare / "complete.json").exists(), 600, "prepare")
        for name in ("preemption", "time-limit"):
            submit("train", name, copy_run(reference.root, top / name))
        begun = made.runs["preemption"].checkpoints
        wait_for(lambda: list(begun.glob("step-*")), 600, "a checkpoint to be preempted after")
        slurm.preempt()
        late = made.runs["time-limit"]
        wait_for(lambda: len(attempts.read(late, "train")) > 1, 300, "the limit to be reached")
        # once is enough: on a busy machine the rest would take many starts
        slurm.sh("scontrol", "update", f"jobid={made.jobs('time-limit')[0]}", "timelimit=10")
        for name in PLACES:
            wait_ended(made.jobs(name), 900)
        yield made


def test_all_five_stages_run_in_the_image(outcome: Outcome) -> None:
    run = outcome.runs["reference"]
    reasons = {path: json.loads(path.read_text()) for path in run.attempts.rglob("*.json")}
    assert {attempt["verdict"] for attempt in reasons.values()} == {"done"}, reasons
    names = ("prepare", "train", "infer-base-0000", "infer-tuned-0000", "collect", "publish")
    for name in names:
        assert "apptainer exec --cleanenv" in run.stage_log(name).read_text()
    assert set(read(run.metrics)["models"]) == {"base", "tuned"}
    files = outcome.hub.files(REPO)
    assert (
        files["adapter_model.safetensors"]
        == (run.adapter / "adapter_model.safetensors").read_bytes()
    )
    assert read(run.run_json)["image"]["sha256"] == sha256_file(outcome.image)


def test_a_task_of_twenty_labels_gives_in_the_image_what_it_gives_here(outcome: Outcome) -> None:
    """Labels of several tokens, through every stage on Slurm and beside it."""
    folder = outcome.folder / "topics"
    folder.mkdir()
    config = str(write_task(folder))
    on_slurm, here = RunPaths(folder / "slurm"), RunPaths(folder / "here")
    place = ["--cluster", str(outcome.cluster("reference")), "--wait"]
    yelp_hpc("submit", "all", "--config", config, *place, "--run", str(on_slurm.root))
    yelp_hpc("submit", "all", "--config", config, "--executor", "local", "--run", str(here.root))
    assert "apptainer exec" in on_slurm.stage_log("train").read_text()
    made = read(on_slurm.metrics)
    assert len(made["models"]["tuned"]["confusion"]) == 20
    assert made["models"] == read(here.metrics)["models"]

    given, alone = folder / "new.csv", folder / "alone.csv"
    pa.csv.write_csv(pq.read_table(on_slurm.split("test"), columns=["row", "text"]), given)
    asked = ["--input", str(given), "--text-column", "text", "--out", str(alone)]
    asked += ["--answers-only", "--shards", "2"]
    yelp_hpc("predict", "--run", str(on_slurm.root), *asked, "--executor", "slurm", *place)
    scored = {row["row"]: row["prediction"] for row in predictions(on_slurm, "tuned")}
    labels = read(on_slurm.tokens)["labels"]
    found = {row["row"]: row["answer"] for row in pa.csv.read_csv(alone).to_pylist()}
    assert found == {row: labels[best] for row, best in scored.items()}


def test_the_token_is_written_nowhere(outcome: Outcome) -> None:
    for path in outcome.runs["reference"].root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["time-limit", "preemption"])
def test_interrupted_training_in_the_image_ends_with_the_same_adapter(
    outcome: Outcome, name: str
) -> None:
    tried = attempts.read(outcome.runs[name], "train")
    assert [attempt.verdict for attempt in tried[:-1]] == ["requeued"] * (len(tried) - 1)
    assert len(tried) >= 2
    assert tried[-1].verdict == "done", tried[-1].reason
    steps = [line["step"] for line in read_jsonl(outcome.runs[name].train_log)]
    assert steps == sorted(set(steps))
    assert outcome.adapter(name) == outcome.adapter("reference")


# Everything is imported while the process is still root: a user may not read root's Python.
AS_USER = """
import os, sys
import submitit  # now: nobody else may read root's Python
import yelp_hpc.jobs.supervisor
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.environ.update(HOME="/", OMP_NUM_THREADS="1")
os.chdir("/")
yelp_hpc.jobs.supervisor.supervise("train", sys.argv[1], sys.argv[2])
"""


def test_as_a_user_only_apptainer_is_signalled_and_training_resumes(outcome: Outcome) -> None:
    run = RunPaths(copy_run(outcome.runs["reference"].root, outcome.folder / "user"))
    outcome.runs["user"] = run
    settings = yaml.safe_load(outcome.cluster("reference").read_text())
    settings["container"]["cache"] = str(run.root / "cache")
    cluster = with_inputs(ClusterConfig.model_validate(settings), load_run(run.root)[1], run.root)
    frozen = freeze_cluster(run, cluster)
    for path in [run.root, *run.root.rglob("*")]:
        os.chown(path, 65534, 65534)
    for path in (outcome.folder / "model").iterdir():
        path.chmod(0o644)
    argv = [sys.executable, "-c", AS_USER, str(run.root), str(frozen)]
    first = subprocess.Popen(argv)
    saved = run.checkpoints
    wait_for(lambda: list(saved.glob("step-*")) or first.poll(), 600, "a checkpoint")
    mounted = subprocess.run(["pgrep", "-u", "65534", "squashfuse"], check=False)
    assert mounted.returncode == 0
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 75
    assert subprocess.run(argv, check=False).returncode == 0
    assert [a.verdict for a in attempts.read(run, "train")] == ["stopped", "done"]
    assert outcome.adapter("user") == outcome.adapter("reference")
