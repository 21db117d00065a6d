"""What faults.py strikes, the stages: on the tests' tiny model, at operations drawn by a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faults import Files, Unit, files_of
from yelp_hpc.rundir.paths import RunPaths


def _tiny_model(top: Path) -> Path:
    from tests.tiny import make_model

    folder = top / "model"
    if not folder.exists():
        make_model(folder)
    return folder


class Stages:
    """The stages on a tiny model, everything that they share made once below `top`."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.model = top / "model"
        self.reviews = top / "reviews.csv"

    def make(self) -> None:
        """Make the model and the data; in a process of its own, for it starts threads."""
        import csv

        from tests.tiny import reviews

        _tiny_model(self.top)
        with self.reviews.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", "text"])
            rows.writerows((label, f"{text} {i}") for i, (text, label) in enumerate(reviews(60)))

    def config(self) -> Any:
        """The configuration of every stage."""
        from tests.tiny import tiny_config

        return tiny_config(
            self.model,
            data={"train": str(self.reviews)},
            train={"max_steps": 6, "save_every_steps": 2, "keep_checkpoints": 1, "nproc": 1},
            infer={"shards": 2, "max_tokens": 256},
            collect={"bootstrap": 100},
        )

    def recorded(self, folder: Path) -> None:
        """A run directory before prepare."""
        from yelp_hpc.rundir.files import write_json

        values = self.config().model_dump(mode="json")
        write_json(folder / "run.json", {"config": {"resolved": values}, "data": None})

    def prepare(self, folder: Path) -> None:
        """The stage prepare."""
        from yelp_hpc.stages import prepare

        prepare.run(RunPaths(folder), self.config())

    def prepared(self, folder: Path) -> None:
        """A run directory after prepare."""
        self.recorded(folder)
        self.prepare(folder)

    def train(self, folder: Path) -> None:
        """A rank of the stage train, in this process."""
        from yelp_hpc.ranks.rank import StopRequest
        from yelp_hpc.rundir.files import is_complete, sweep
        from yelp_hpc.stages.train import train_rank, training_fingerprint

        paths, config = RunPaths(folder), self.config()
        sweep(paths.root, paths.train, paths.adapter, paths.checkpoints)
        if is_complete(paths.adapter):
            return
        payload = {
            "run": str(folder),
            "config": config.model_dump(mode="json"),
            "model": str(self.model),
            "fingerprint": training_fingerprint(paths, config),
        }
        train_rank(payload, StopRequest())

    def infer(self, folder: Path) -> None:
        """The stage infer, the base model's two shards."""
        from yelp_hpc.stages import infer

        infer.PROGRESS_SECONDS = infer.PART_SECONDS = 0.0
        infer.run(RunPaths(folder), self.config(), "base")


def _training(folder: Path) -> Files:
    from yelp_hpc.rundir.files import read_jsonl

    paths = RunPaths(folder)
    losses = [(x["step"], x["loss"]) for x in read_jsonl(paths.train_log)]
    kept = {name: b"" for name in files_of(folder) if not name.startswith("train/adapter/")}
    return {**kept, **files_of(paths.adapter), "losses": json.dumps(losses).encode()}


def _predictions(folder: Path) -> Files:
    found = files_of(folder)
    return {k: v if k.endswith(".parquet") else b"" for k, v in found.items()}


def _fabricated(folder: Path) -> None:
    from tests.fabricated import make_run

    make_run(folder, rows=60, shards=2)


def _collect(folder: Path) -> None:
    from tests.fabricated import config_of
    from yelp_hpc.stages import collect

    collect.collect(RunPaths(folder), config_of(shards=2, models=["base", "tuned"]))


def stage_units(stages: Stages) -> list[Unit]:
    """The stages that read and write the run directory alone."""
    return [
        Unit("prepare", stages.recorded, stages.prepare, small=False),
        Unit("train", stages.prepared, stages.train, content=_training, small=False),
        Unit("infer", stages.prepared, stages.infer, content=_predictions, small=False),
        Unit("collect", _fabricated, _collect, small=False),
    ]
