"""Every F1 a second time: by scikit-learn, from the rows themselves.

`measure` adds up a confusion matrix and takes F1 from it. Here the same definitions are asked of a
library that has never seen our counts. Reads the shards' `label` and `prediction`; writes nothing.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.rundir.paths import RunPaths

AVERAGES = ("micro", "macro", "weighted")
TOLERANCE = 1e-9
"""Of a figure; both take sums of up to millions of rows."""
UNPARSED = -1


def available() -> bool:
    """Whether scikit-learn is installed; it belongs to what the jobs run on."""
    return importlib.util.find_spec("sklearn") is not None


def second_opinion(
    paths: RunPaths, config: Config, metrics: Mapping[str, Any]
) -> Iterator[tuple[str, float | None, Any]]:
    """Each F1 of `metrics` that scikit-learn does not find: key, scikit-learn's, what stands.

    Raises:
        KeyError: `metrics` lacks a model.
    """
    for model in config.infer.models:
        shards = [paths.shard(model, k, config.infer.shards) for k in range(config.infer.shards)]
        stands = metrics["models"][model]
        for key, value in f1_scores(*answers(shards), len(config.task.labels)).items():
            found: Any = stands
            for part in key.split("."):
                found = found[int(part)] if isinstance(found, list) else found.get(part)
            if not _equal(value, found):
                yield f"models.{model}.{key}", value, found


def answers(shards: Sequence[Path]) -> tuple[list[int], list[int]]:
    """Labels and predictions of all rows, `[rows]` each; what was not parsed is -1."""
    import pyarrow.parquet as pq

    labels: list[int] = []
    predictions: list[int] = []
    for path in shards:
        table = pq.read_table(path, columns=["label", "prediction"])
        labels += table["label"].to_pylist()
        predictions += table["prediction"].fill_null(UNPARSED).to_pylist()
    return labels, predictions


def f1_scores(
    labels: Sequence[int], predictions: Sequence[int], classes: int
) -> dict[str, float | None]:
    """F1 in both conventions and of each class, by its key in metrics.json."""
    from sklearn.metrics import f1_score

    own = list(range(classes))
    parsed = [i for i, answer in enumerate(predictions) if answer != UNPARSED]
    truth, answer = [labels[i] for i in parsed], [predictions[i] for i in parsed]
    found: dict[str, float | None] = {}
    for average in AVERAGES:
        chosen: Any = {"average": average, "zero_division": 0.0}
        found[f"f1.{average}"] = float(f1_score(labels, predictions, labels=own, **chosen))
        found[f"f1_report.{average}"] = float(f1_score(truth, answer, **chosen)) if parsed else None
    each = f1_score(labels, predictions, labels=own, average=None, zero_division=0.0)
    return found | {f"per_class.{k}.f1": float(value) for k, value in enumerate(each)}


def _equal(one: float | None, other: Any) -> bool:
    if one is None or not isinstance(other, int | float):
        return one is None and other is None
    return math.isclose(one, other, rel_tol=0, abs_tol=TOLERANCE)
