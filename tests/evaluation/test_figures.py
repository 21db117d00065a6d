"""The metrics of two fabricated runs to the last digit: a change is seen in `figures.json`.

`python -m tests.evaluation.test_figures` writes the file anew. What the figures mean is held
against scikit-learn and scipy in test_metrics.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fabricated import config_of, make_run, write_shards, write_test_set
from tests.forecast.test_figures import flat
from yelp_hpc.config import Config
from yelp_hpc.evaluation.measure import measure
from yelp_hpc.rundir.paths import RunPaths

FIGURES = Path(__file__).with_name("figures.json")


def generated(folder: Path) -> tuple[RunPaths, Config]:
    """Answers that were written: some not read, some no class, one class absent."""
    run, config = RunPaths(folder), config_of(shards=2)
    dice = np.random.default_rng(11)
    labels = dice.integers(0, 4, 150).tolist()
    write_test_set(run, labels)
    for model, right in (("base", 0.3), ("tuned", 0.8)):
        answers: list[int | None] = [
            label if dice.random() < right else (None, 7, 2019, -1, int(dice.integers(5)))[i % 5]
            for i, label in enumerate(labels)
        ]
        write_shards(run, model, labels, answers, 2)
    return run, config


def figures(folder: Path) -> dict[str, Any]:
    made = {
        "scored": measure(*make_run(folder / "scored", rows=180))[0],
        "generated": measure(*generated(folder / "generated"))[0],
    }
    return dict(json.loads(json.dumps(made)))


def test_figures_are_those_of_the_file(tmp_path: Path) -> None:
    stand = flat(json.loads(FIGURES.read_text(encoding="utf-8")))
    made = flat(figures(tmp_path))
    assert made.keys() == stand.keys()
    for key, value in stand.items():
        if isinstance(value, float):
            assert made[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
        else:
            assert made[key] == value, key


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        text = json.dumps(figures(Path(name)), indent=1) + "\n"
    FIGURES.write_text(text, encoding="utf-8")
