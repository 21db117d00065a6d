"""run.json under two writers at once, and under a killed one."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from yelp_hpc.config import load_config
from yelp_hpc.errors import RequestError
from yelp_hpc.rundir.files import read_json, write_json, write_marker
from yelp_hpc.rundir.manifest import (
    Asked,
    check_asked,
    load_run,
    record_run,
    recorded_config,
    update_run,
)
from yelp_hpc.rundir.paths import RunPaths


def test_sections_that_several_write_at_once_are_all_kept(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    write_json(run.run_json, {"seed": 1})

    def write(name: str) -> None:
        for i in range(25):
            update_run(run, **{f"{name}{i}": i})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_json(run.run_json)) == 76


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A finished run of a version in which a default was another and two keys were not there."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("model: {path: m}\ndata: {source: demo}\ntrain: {epochs: 2}\n")
    run = record_run("run", load_config("c.yaml"), "c.yaml", [])
    record = json.loads(run.run_json.read_text())
    record["config"]["resolved"]["train"]["warmup_steps"] = 20
    del record["config"]["resolved"]["task"], record["config"]["resolved"]["data"]["seed"]
    write_json(run.run_json, record)
    for folder in (run.prepare, run.adapter):
        folder.mkdir(parents=True)
        write_marker(folder, [])
    return run


def test_a_run_keeps_the_defaults_that_it_was_made_with(old: RunPaths) -> None:
    assert check_asked(old.root, Asked(load_config("c.yaml"), "c.yaml")) == []
    record_run(old.root, load_config("c.yaml"), "c.yaml", [])
    changed = ("collect.bootstrap=300",)
    asked = Asked(load_config("c.yaml", changed), "c.yaml", changed)
    assert check_asked(old.root, asked) == [("collect.bootstrap", 2000, 300)]
    asked.record(old.root)
    _, config = load_run(old.root)
    assert (config.train.warmup_steps, config.collect.bootstrap) == (20, 300)


@pytest.mark.parametrize(
    "given", ["train.warmup_steps=auto", "train.epochs=1", "task.labels=[a, b]", "data.seed=3"]
)
def test_what_is_given_is_another_configuration_still(old: RunPaths, given: str) -> None:
    asked = Asked(load_config("c.yaml", (given,)), "c.yaml")
    with pytest.raises(RequestError, match="was made with another configuration"):
        check_asked(old.root, asked)


def test_a_record_of_before_train_compile_went_is_read(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "data": {"source": "demo"}, "train": {"compile": False}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": {"resolved": values}}))
    assert recorded_config(path).train.epochs == 1
    path.write_text(json.dumps({"config": {"resolved": {**values, "train": {"compile": True}}}}))
    with pytest.raises(RequestError, match=r"train\.compile"):
        recorded_config(path)
