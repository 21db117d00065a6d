"""The names of a run directory: a contract with other tools."""

from __future__ import annotations

from pathlib import Path

from yelp_hpc.rundir.paths import RunPaths, shard_of, step_of

PATHS = RunPaths(Path("r"))


def names() -> dict[Path, str]:
    return {
        PATHS.run_json: "run.json",
        PATHS.submissions: "submissions.jsonl",
        PATHS.logs: "logs",
        PATHS.attempts: "logs/attempts",
        PATHS.code: "code",
        PATHS.stage_log("train"): "logs/train.log",
        PATHS.stage_log("infer-base", (7, 8)): "logs/infer-base-0007.log",
        PATHS.prepare: "prepare",
        PATHS.split("test"): "prepare/test.parquet",
        PATHS.alpaca("train"): "prepare/alpaca_train.json",
        PATHS.dataset_info: "prepare/dataset_info.json",
        PATHS.tokens: "prepare/tokens.json",
        PATHS.train: "train",
        PATHS.checkpoints: "train/checkpoints",
        PATHS.checkpoint(12): "train/checkpoints/step-000012",
        PATHS.adapter: "train/adapter",
        PATHS.train_log: "train/log.jsonl",
        PATHS.loss_png: "train/loss.png",
        PATHS.predictions("tuned"): "infer/tuned",
        PATHS.shard("base", 3, 16): "infer/base/shard-0003-of-0016.parquet",
        PATHS.partial("base", 3, 16): "infer/.partial/base/shard-0003-of-0016",
        PATHS.shard_progress("base", 3, 16): "infer/.progress/base/shard-0003-of-0016.json",
        PATHS.metrics: "metrics.json",
        PATHS.report: "report.html",
        PATHS.published: "published.json",
    }


def test_every_name_is_the_documented_one() -> None:
    assert {str(path): name for path, name in names().items()} == {
        f"r/{name}": name for name in names().values()
    }
    assert len(names()) == 25


def test_shards_and_checkpoints_are_known_by_their_names() -> None:
    assert shard_of(PATHS.shard("base", 3, 16)) == (3, 16)
    assert step_of(PATHS.checkpoint(1_234_567)) == 1_234_567
    for name in ("shard-of-16.parquet", "shard-0003-of-0016.json", ".shard-0003-of-0016.parquet"):
        assert shard_of(Path(name)) is None
    for name in (".step-000012.tmp", "step-", "step-000012.bak", "last"):
        assert step_of(Path(name)) is None
