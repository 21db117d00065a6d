"""Training on a cluster that dies, all of it real: Slurm, two ranks, the stages, the faults.

Five runs of the same training are interrupted at the same time, each in its own way; each has to
end by itself with the adapter of the run that nobody interrupted, byte for byte.
"""

from __future__ import annotations

import csv
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import (
    GPU,
    Cluster,
    copy_run,
    processes,
    read,
    wait_ended,
    wait_for,
    yelp_hpc,
)
from tests.hub.server import serving
from tests.hub.state import Hub
from tests.tiny import HEAD, TAIL, make_model, reviews
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt, last_seen
from yelp_hpc.rundir.files import read_jsonl, sha256_file
from yelp_hpc.rundir.paths import RunPaths

pytestmark = pytest.mark.timeout(900)
TOKEN = f"hf_sentinel{secrets.token_hex(16)}"  # a cluster may keep earlier sessions' files
REPO = "me/faults"
CLUSTER_FILES = ("/var/lib/yelp-hpc-cluster", "/var/log/yelp-hpc-cluster")

# fault → where it runs; the GPUs make the preempting jobs want exactly these two nodes
PLACES: dict[str, dict[str, object]] = {
    "time-limit": {"partition": "cpu", "time": "1", "save_seconds": 35, "nodelist": "c1"},
    "requeue": {"partition": "cpu", "nodelist": "c1"},
    "node-failure": {"partition": "cpu", "nodelist": "c2"},
    "grace": {"partition": "low", "nodelist": "g1", "gpus": 4, "gpu_type": "rtx3090"},
    "no-grace": {"partition": "low0", "nodelist": "g2", "gpus": 4, "gpu_type": "rtx3090"},
}


@dataclass
class Outcome:
    reference: RunPaths
    runs: dict[str, RunPaths] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    hub: Hub | None = None
    seen: list[str] = field(default_factory=list)
    """Lines of the process list that held the token at any time."""

    def tried(self, fault: str) -> list[Attempt]:
        return attempts.read(self.runs[fault], "train")


@pytest.fixture(scope="module")
def outcome(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Everything happens here once; the tests look at what came of it."""
    top = tmp_path_factory.mktemp("faults")
    hub = Hub(tmp_path_factory.mktemp("hub"))
    hub.tokens = {TOKEN: {"user": "me", "write": True}}
    with serving(hub), watching() as seen:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        result = interrupted_runs(slurm, top, env)
        result.hub, result.seen = hub, seen
        yield result


@contextmanager
def watching() -> Iterator[list[str]]:
    """Collects every command line of this machine that holds the token, while it lasts."""
    seen: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            seen.extend(line for _, line in processes() if TOKEN in line)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def interrupted_runs(slurm: Cluster, top: Path, env: dict[str, Any]) -> Outcome:
    """Submit with `env`, strike, wait until nothing is queued any more."""
    config = write_config(top)
    reference = RunPaths(top / "reference")
    common = ["--config", str(config)]
    local = ["--executor", "local", "--run", str(reference.root)]
    yelp_hpc("submit", "all", *common, *local, **env)
    result = Outcome(reference)
    token = top.parent / "hub-token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    for fault, where in PLACES.items():
        run = RunPaths(copy_run(reference.root, top / fault))
        stage = "all" if fault == "requeue" else "train"
        cluster = write_cluster(top / f"{fault}.yaml", where)
        place = ["--cluster", str(cluster), "--run", str(run.root)]
        if fault == "requeue":
            # its own word of the token: an environment may not reach a job at every site
            place += ["--set", f"publish.repo_id={REPO}", "--set", f"publish.token_file={token}"]
        yelp_hpc("submit", stage, *common, *place, **env)
        result.runs[fault] = run
        lines = read_jsonl(run.submissions)
        result.jobs[fault] = next(line["job"] for line in lines if line["name"] == "train")
    for fault in ("grace", "no-grace", "node-failure", "requeue"):
        checkpoints = result.runs[fault].checkpoints
        wait_for(partial(written, checkpoints), 240, f"{fault}: a checkpoint")
    slurm.preempt()
    slurm.kill_node("c2", result.jobs["node-failure"])
    slurm.sh("scontrol", "requeue", result.jobs["requeue"])
    wait_for(lambda: "down" in slurm.sh("sinfo", "-hN", "-n", "c2", "-o", "%T"), 60, "c2 down")
    slurm.script("slurm_up.sh")
    every = [line["job"] for run in result.runs.values() for line in read_jsonl(run.submissions)]
    wait_ended(every, 600)
    return result


def write_config(top: Path) -> Path:
    make_model(top / "model")
    with (top / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews(600)])
    values = {
        "name": "faults",
        "model": {"path": str(top / "model")},
        "data": {"source": "file", "train": str(top / "reviews.csv"), "test_rows": 60},
        "prompt": {"template": HEAD + "{review}" + TAIL + "{label}"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {
            **{"nproc": 2, "learning_rate": 5e-3, "warmup_steps": 2, "global_batch": 8},
            **{"max_tokens": 256, "epochs": 5, "save_every_steps": 20, "evaluate_every": 500},
        },
        "infer": {"shards": 1},
        "collect": {"bootstrap": 100},
    }
    path = top / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def written(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob("step-*"))


def write_cluster(path: Path, place: dict[str, object]) -> Path:
    own = {key: value for key, value in place.items() if key != "nodelist"}
    own["sbatch"] = {"nodelist": place["nodelist"]}
    defaults = {"partition": "cpu", "memory": "500M", "time": "10", "save_seconds": 30}
    path.write_text(yaml.safe_dump({"defaults": defaults, "train": own, "requeue_cap": 20}))
    return path


@pytest.mark.parametrize("fault", list(PLACES))
def test_the_adapter_is_that_of_the_uninterrupted_run(outcome: Outcome, fault: str) -> None:
    tried = outcome.tried(fault)
    assert tried[-1].verdict == "done", tried[-1].reason
    assert len(tried) >= 2  # how many limits it takes is a matter of the machine's speed
    name = "adapter_model.safetensors"
    mine = sha256_file(outcome.runs[fault].adapter / name)
    assert mine == sha256_file(outcome.reference.adapter / name)


@pytest.mark.parametrize("fault", list(PLACES))
def test_nothing_ran_twice_at_once_and_no_finished_step_was_lost(
    outcome: Outcome, fault: str
) -> None:
    tried = outcome.tried(fault)
    for before, after in pairwise(tried):
        assert last_seen(before) <= after.started
    steps = [line["step"] for line in read_jsonl(outcome.runs[fault].train_log)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("time-limit", "requeued"),
        ("grace", "requeued"),
        ("requeue", "stopped"),  # Slurm itself requeues
        ("node-failure", "lost"),
    ],
)
def test_the_reason_is_recorded(outcome: Outcome, fault: str, verdict: str) -> None:
    first = outcome.tried(fault)[0]
    assert first.verdict == verdict
    assert first.reason


def test_the_chain_on_slurm_gives_the_figures_of_the_local_one(outcome: Outcome) -> None:
    slurm_made = read(outcome.runs["requeue"].metrics)
    assert slurm_made["models"] == read(outcome.reference.metrics)["models"]


def test_gpu_hours_lost_are_part_of_those_used(outcome: Outcome) -> None:
    tried = outcome.tried("no-grace")
    used, lost = attempts.gpu_hours(tried)
    assert GPU["gpu_type"] == "rtx3090"
    # from the last checkpoint to the last heartbeat, which may have come before it
    assert 0 <= lost < used
    assert lost == pytest.approx(sum(attempt.lost * attempt.gpus for attempt in tried) / 3600)
    assert tried[0].gpus == 4


def test_the_chain_ends_on_the_hub(outcome: Outcome) -> None:
    assert outcome.hub is not None
    run = outcome.runs["requeue"]
    files = outcome.hub.files(REPO)
    name = "adapter_model.safetensors"
    assert files[name] == (run.adapter / name).read_bytes()
    assert read(run.published)["repo_id"] == REPO
    assert "model-index" in files["README.md"].decode()


def test_the_token_is_nowhere(outcome: Outcome) -> None:
    assert outcome.hub is not None
    places = [outcome.reference.root.parent, outcome.hub.root, *map(Path, CLUSTER_FILES)]
    files = [p for place in places for p in place.rglob("*") if p.is_file()]
    assert len(files) > 100
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not outcome.seen
