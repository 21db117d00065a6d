"""Run directories whose stages are played by fake_stage.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig

FAKE = Path(__file__).with_name("fake_stage.py")


class FakeRun:
    """A run directory, its configuration and a cluster whose stages are played."""

    def __init__(self, root: Path, shards: int, cluster: dict[str, Any], **plan: Any) -> None:
        self.root = root
        root.mkdir(parents=True)
        self.plan(**plan)
        values = {
            "model": {"path": "demo:smollm2-135m"},
            "data": {"source": "demo"},
            "infer": {"shards": shards},
        }
        self.config = Config.model_validate(values)
        record = {"shards": shards, "config": {"resolved": self.config.model_dump(mode="json")}}
        (root / "run.json").write_text(json.dumps(record))
        self.cluster = ClusterConfig.model_validate(
            {"command": [sys.executable, str(FAKE)], **cluster}
        )

    def plan(self, **plan: Any) -> None:
        (self.root / "fake.json").write_text(json.dumps(plan))

    def prepared(self) -> FakeRun:
        (self.root / "prepare").mkdir()
        (self.root / "prepare" / "complete.json").write_text('{"files": {}}')
        return self

    def trace(self) -> list[dict[str, Any]]:
        """Every start of a stage, in order."""
        path = self.root / "trace.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def predictions(self, model: str) -> list[str]:
        return sorted(p.name for p in (self.root / "infer" / model).glob("*.parquet"))
