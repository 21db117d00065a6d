"""submit from Python on the real Slurm: a handle's state, end, result and cancellation."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster
from tests.tiny import make_model, reviews, tiny_config
from yelp_hpc import submit
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs.cluster import ClusterConfig

pytestmark = pytest.mark.timeout(600)


def test_a_handle_follows_its_jobs_and_cancels_them(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    model = make_model(tmp_path / "model")
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews(60)])
    config = tiny_config(model, data={"train": str(tmp_path / "reviews.csv")})
    defaults = {"partition": "cpu", "memory": "500M", "time": "10", "save_seconds": 30}
    cluster = ClusterConfig.model_validate({"defaults": defaults})
    handle = submit(config, tmp_path / "run", "prepare", cluster=cluster)
    (job,) = handle.jobs
    assert job.job.isdigit() and f"prepare {job.job}" in repr(handle)
    first = handle.status().stages[0]
    assert first.job == job.job and first.state in ("waiting", "running")
    with pytest.raises(RequestError, match="already submitted"):
        submit(config, tmp_path / "run", "prepare", cluster=cluster)
    assert handle.result().record["data"]["rows"]["test"] == 10

    other = submit(config, tmp_path / "other", "prepare", cluster=cluster)
    assert other.cancel() == [other.jobs[0].job]
    with pytest.raises(StageError, match="prepare"):
        other.result()
