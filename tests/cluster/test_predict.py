"""predict on a cluster that dies: a thousand rows without labels, answered as they are here."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Cluster, processes, wait_ended, wait_for, yelp_hpc
from tests.hub.finished import finish_run
from tests.tiny import reviews
from yelp_hpc import Classifier
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import read_json, read_jsonl, write_json
from yelp_hpc.rundir.paths import RunPaths

pytestmark = pytest.mark.timeout(900)
ROWS, SHARDS = 1000, 4
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}


def begun(folder: RunPaths, shard: int) -> bool:
    return any(folder.partial("tuned", shard, SHARDS).glob("part-*"))


def submitted(folder: RunPaths) -> list[dict[str, str]]:
    return [line for line in read_jsonl(folder.submissions) if line["executor"] == "slurm"]


def test_a_thousand_rows_under_kills_are_those_of_this_machine(
    slurm: Cluster, tmp_path: Path
) -> None:
    run = finish_run(tmp_path / "run", tmp_path / "model", str(tmp_path / "model"), **SIZES)
    record = read_json(run.run_json)
    record["config"]["resolved"]["infer"]["max_tokens"] = 64  # small batches: there is time to die
    write_json(run.run_json, record)
    shutil.copytree(run.root, tmp_path / "here" / "run")
    source = tmp_path / "new.csv"
    with source.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows((i, text) for i, (text, _) in enumerate(reviews(ROWS, seed=11)))
    cluster = tmp_path / "cluster.yaml"
    defaults = {"partition": "cpu", "memory": "500M", "time": "10", "save_seconds": 30}
    cluster.write_text(yaml.safe_dump({"defaults": defaults, "requeue_cap": 20}))
    asked = ["predict", "--run", str(run.root), "--input", str(source), "--shards", str(SHARDS)]
    asked += ["--out", str(tmp_path / "there.csv"), "--executor", "slurm"]
    asked += ["--cluster", str(cluster)]
    yelp_hpc(*asked)
    (root,) = run.predict.iterdir()
    folder = RunPaths(root)
    job = next(line["job"] for line in submitted(folder) if line["name"] == "infer-tuned")
    struck = {"requeued": 0, "killed": 1, "node": 2}
    for how, shard in struck.items():
        wait_for(lambda k=shard: begun(folder, k), 240, f"shard {shard} to begin")  # type: ignore[misc]
        if how == "requeued":
            slurm.sh("scontrol", "requeue", f"{job}_{shard}")
        elif how == "killed":  # the stage alone: its supervisor calls that a failure
            for pid, line in processes():
                if f"run infer --run {root} --model tuned --shard {shard}" in line:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        else:
            node = slurm.sh("squeue", "-h", "-j", f"{job}_{shard}", "-o", "%N")
            number = slurm.sh("squeue", "-h", "-j", f"{job}_{shard}", "-o", "%A")
            slurm.kill_node(node, number)
            wait_for(
                # not sinfo's: of a node that died while a task completed it says "completing*"
                lambda n=node: "State=DOWN" in slurm.sh("scontrol", "show", "node", n),  # type: ignore[misc]
                60,
                f"{node} down",
            )
            slurm.script("slurm_up.sh")
    wait_ended([line["job"] for line in submitted(folder)], 480)
    starts = attempts.read(folder, "infer-tuned")
    tried = {k: [a for a in starts if a.task == (k,)] for k in range(SHARDS)}
    assert all(len(tried[struck[how]]) >= 2 for how in ("requeued", "node"))
    assert tried[struck["killed"]][-1].verdict == "failed"
    assert not (tmp_path / "there.csv").exists()  # a shard is missing: collect refused

    again = yelp_hpc(*asked, "--wait")
    assert "infer-tuned: job" in again.stderr and "array" not in again.stderr  # that shard alone
    asked[2], asked[8] = str(tmp_path / "here" / "run"), str(tmp_path / "here.csv")
    yelp_hpc(*asked[:9], "--executor", "local")
    there, here = (tmp_path / name for name in ("there.csv", "here.csv"))
    assert there.read_bytes() == here.read_bytes()
    assert len(there.read_text().splitlines()) >= ROWS + 1
    last = yelp_hpc(*asked[:2], str(run.root), *asked[3:8], str(there), *asked[9:])
    assert "nothing to do, everything is there" in last.stderr


def test_in_the_image_the_answers_are_those_of_this_machine(
    slurm: Cluster, image_sif: Path, open_folder: Path
) -> None:
    """Four shards on a site whose arrays hold two tasks: each loads the model once for two."""
    top = open_folder / "predict"
    run = finish_run(top / "run", top / "model", str(top / "model"))
    (top / "in").mkdir()
    (top / "out").mkdir()
    source = top / "in" / "new.jsonl"
    lines = [{"id": i, "text": text} for i, (text, _) in enumerate(reviews(40, seed=12))]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cluster = top / "cluster.yaml"
    values = {
        "defaults": {"partition": "cpu", "memory": "500M", "time": "10"},
        "container": {"image": str(image_sif), "cache": str(top / "cache")},
        "max_array_size": 2,
    }
    cluster.write_text(yaml.safe_dump(values))
    asked = ["predict", "--run", str(run.root), "--input", str(source), "--shards", "4"]
    where = ["--executor", "slurm", "--cluster", str(cluster), "--wait"]
    yelp_hpc(*asked, "--out", str(top / "out" / "there.csv"), *where)
    (root,) = run.predict.iterdir()
    tasks = [log.stem for log in sorted(RunPaths(root).logs.glob("infer-tuned-*.log"))]
    assert tasks == ["infer-tuned-0000", "infer-tuned-0002"]
    for name in ("prepare", *tasks, "collect"):
        log = RunPaths(root).stage_log(name).read_text()
        assert "apptainer exec" in log
        assert log.count("loading ") == (1 if name in tasks else 0), log
    there = (top / "out" / "there.csv").read_text()
    answers = [one.label for one in Classifier(run.root).predict([str(x["text"]) for x in lines])]
    assert [row["answer"] for row in csv.DictReader(there.splitlines())] == answers
