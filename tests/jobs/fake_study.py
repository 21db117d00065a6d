"""A study whose stages are played by fake_stage.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.jobs.fake_run import FAKE
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.study.plan import plan_study
from yelp_hpc.jobs.study.submit import submit_study
from yelp_hpc.rundir.study import Study

CONFIG = "model: {path: 'demo:smollm2-135m'}\ndata: {source: demo}\ninfer: {shards: 1}\n"
FILE = "seed: [1, 2]\ntrain.learning_rate: [1e-4, 1e-3]\n"


class FakeStudy:
    """A folder with a config, a study's FILE and a cluster whose stages are played."""

    def __init__(self, folder: Path, cluster: dict[str, Any], file: str = FILE, **plan: Any):
        self.folder, self.out = folder, folder / "study"
        self.out.mkdir(parents=True)
        (folder / "config.yaml").write_text(CONFIG)
        (folder / "vary.yaml").write_text(file)
        self.cluster = ClusterConfig.model_validate(
            {"command": [sys.executable, str(FAKE)], **cluster}
        )
        self.plan(**plan)
        self.said: list[str] = []

    def plan(self, **plan: Any) -> None:
        (self.out / "fake.json").write_text(json.dumps(plan))

    def go(self, executor: str = "local", wait: bool = False) -> Study:
        config, file = self.folder / "config.yaml", self.folder / "vary.yaml"
        self.said.clear()
        study, asked = plan_study(file, str(config), (), self.out)
        submit_study(study, asked, self.cluster, executor, wait, say=self.said.append)
        return study

    def starts(self) -> dict[str, list[str]]:
        """By run, and for the study itself, the stages that were started, in order."""
        found = {}
        for path in sorted(self.out.rglob("trace.jsonl")):
            lines = [json.loads(line)["name"] for line in path.read_text().splitlines()]
            found[str(path.parent.relative_to(self.out))] = lines
        return found
