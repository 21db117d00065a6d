"""Run directories with made-up predictions, in the files' real formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.config import Config
from yelp_hpc.inference.shard_files import SCHEMA
from yelp_hpc.inference.shards import plan_shards
from yelp_hpc.rundir.paths import RunPaths


def config_of(**infer: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "some/model"},
            "data": {"source": "demo"},
            "infer": infer,
            "collect": {"bootstrap": 200},
        }
    )


def write_test_set(run: RunPaths, labels: Sequence[int], rows: Sequence[int] | None = None) -> None:
    count = len(labels)
    table = pa.table(
        {
            "row": pa.array(range(count) if rows is None else rows, pa.int64()),
            "label": pa.array(labels, pa.int8()),
            "text": [f"review {i} <b>&amp; so on</b>" for i in range(count)],
            "length": pa.array([10] * count, pa.int32()),
        }
    )
    run.prepare.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, run.split("test"), row_group_size=64)


def shard_table(
    rows: Sequence[int],
    labels: Sequence[int],
    predictions: Sequence[int | None],
    scores: Sequence[Sequence[float]] | None = None,
    texts: Sequence[str] | None = None,
) -> pa.Table:
    nothing = [None] * len(rows)
    schema = SCHEMA.set(2, pa.field("prediction", pa.int64()))
    columns = [rows, labels, predictions, scores or nothing, texts or nothing]
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_shards(
    run: RunPaths,
    model: str,
    labels: Sequence[int],
    predictions: Sequence[int | None],
    shards: int = 1,
    scores: Sequence[Sequence[float]] | None = None,
    rows: Sequence[int] | None = None,
) -> list[Path]:
    ids = range(len(labels)) if rows is None else rows
    paths = []
    for shard, part in enumerate(plan_shards([1] * len(labels), shards)):
        path = run.shard(model, shard, shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        table = shard_table(
            [ids[i] for i in part],
            [labels[i] for i in part],
            [predictions[i] for i in part],
            None if scores is None else [scores[i] for i in part],
        )
        pq.write_table(table, path)
        paths.append(path)
    return paths


def logits(labels: Sequence[int], seed: int, strength: float) -> np.ndarray:
    """`[n, 5]` random logits that favour the true label by `strength`."""
    noise = np.random.default_rng(seed).normal(size=(len(labels), 5))
    noise[np.arange(len(labels)), list(labels)] += strength
    return noise.astype(np.float32)


def make_run(
    folder: Path, rows: int = 400, shards: int = 3, models: Sequence[str] = ("base", "tuned")
) -> tuple[RunPaths, Config]:
    """A whole run in score mode: prepared, trained, predicted, with a history of jobs."""
    run, config = RunPaths(folder), config_of(shards=shards, models=list(models))
    labels = np.random.default_rng(5).integers(0, 5, rows).tolist()
    write_test_set(run, labels)
    for model in models:
        scores = logits(labels, len(model), 0.4 if model == "base" else 2.0)
        answers = scores.argmax(axis=1).tolist()
        write_shards(run, model, labels, answers, shards, scores.tolist())
    run.run_json.write_text(
        json.dumps(
            {
                "created": "2026-01-01T00:00:00Z",
                "config": {"file": "c.yaml", "resolved": config.model_dump(mode="json")},
                "packages": {"torch": "2.0"},
                "code": {"git_sha": "0" * 40, "dirty": False},
            }
        )
    )
    run.train.mkdir()
    with run.train_log.open("w") as log:
        for step in range(1, 81):
            line = {"step": step, "loss": 1.6 / step**0.3, "learning_rate": 1e-3 * (1 - step / 80),
                    "seconds": 2.0, "tokens_per_second": 900.0 + 40 * (step % 7),
                    "examples_per_second": 9.0}  # fmt: skip
            if step % 20 == 0:
                line["validation_loss"] = 1.5 / step**0.28
            log.write(json.dumps(line) + "\n")
    start = 1_760_000_000.0
    history = [
        ("prepare", 0, 200, "done", ""),
        ("train", 200, 2000, "requeued", "the time limit came near"),
        ("train", 2120, 3500, "done", ""),
        ("infer-base", 210, 900, "done", ""),
        ("infer-tuned", 3510, 3700, "failed", "out of memory <script>"),
        ("infer-tuned", 3800, 4400, "done", ""),
    ]
    for i, (name, begin, end, verdict, reason) in enumerate(history):
        path = run.attempts / name / f"{100 + i}-0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"name": name, "job": str(100 + i), "restart": 0, "gpus": 1,
                        "started": start + begin, "ended": start + end, "verdict": verdict,
                        "reason": reason, "lost": 0.0})
        )  # fmt: skip
    run.submissions.write_text(
        json.dumps({"time": start, "name": "train", "job": "101", "executor": "slurm",
                    "command": "python -m yelp_hpc run train"}) + "\n"
    )  # fmt: skip
    return run, config
