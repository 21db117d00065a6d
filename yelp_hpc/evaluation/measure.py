"""The content of metrics.json, from the shards and the configuration alone.

Every prediction is checked and counted, then every statistic computed: `collect` writes them,
`verify` computes them again. Reads `prepare/test.parquet` and `infer/*/`; writes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yelp_hpc.config import Config
from yelp_hpc.evaluation.counting import Counting
from yelp_hpc.evaluation.coverage import coverages_of, refuse_unless_complete
from yelp_hpc.evaluation.metrics import AVERAGES, majority, per_class
from yelp_hpc.evaluation.significance import (
    bootstrap_intervals,
    discordant,
    headline,
    headline_intervals,
    joint_table,
    mcnemar,
    paired_statistics,
)
from yelp_hpc.rundir.changes import settings_of
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.task import YELP, TaskConfig

PUBLISHED = {
    "base": {"f1": {"micro": 0.406, "macro": 0.183, "weighted": 0.403}},
    "tuned": {"f1": {"micro": 0.695, "macro": 0.579, "weighted": 0.695}},
}
"""The study's published figures (ChatGLM3-6B, 50,000 balanced test reviews), in its convention."""


def measure(paths: RunPaths, config: Config) -> tuple[dict[str, Any], dict[str, Counting]]:
    """The content of metrics.json from the shards; writes nothing.

    Raises:
        StageError: a test row is missing or doubled, a shard is torn or of another test set, model,
            adapter or setting, the adapter is another run's; the message names them and the
            commands that mend it.
    """
    task = config.task
    coverages = sorted(coverages_of(paths, config), key=lambda coverage: coverage.model)
    counted = {coverage.model: Counting(coverage, config) for coverage in coverages}
    for counting in counted.values():
        counting.read()
    refuse_unless_complete(coverages)
    test = coverages[0].test
    metrics: dict[str, Any] = {
        "models": {name: model_metrics(counting, config) for name, counting in counted.items()}
    }
    if len(counted) == 2:
        metrics["comparison"] = comparison(counted["base"], counted["tuned"], config)
    support = np.bincount(test.labels, minlength=len(task.labels))
    metrics["test"] = {
        "support": support.tolist(),
        "absent": [task.labels[i] for i in np.flatnonzero(support == 0)],
        "majority": majority(support),
    }
    metrics["task"] = {**task.model_dump(mode="json", exclude={"values"}), "names": [*task.shown]}
    metrics["report"] = {
        **(PUBLISHED if task == YELP else {}),
        "why_conventions_differ": why_conventions_differ(task),
    }
    metrics["method"] = {
        "interval": "percentile bootstrap over test rows, 95 %",
        "resamples": config.collect.bootstrap,
        "seed": config.seed,
        "calibration_bins": config.collect.calibration_bins,
        "settings": settings_of(config, "collect"),
    }
    return metrics, counted


def why_conventions_differ(task: TaskConfig) -> str:
    """The two F1 conventions, in the task's own numbers."""
    count = len(task.labels)
    example = (
        "and a macro of 0.695 becomes 0.695 × 5/6 = 0.579."
        if task == YELP
        else f"and multiplies the macro by {count}/{count + 1}."
    )
    which = f"labels 0-{count - 1}" if task == YELP else f"{count} labels of the task"
    return (
        f"`f1` averages over the {which} and counts an unparsed or stray answer as wrong; "
        "`f1_report` drops unparsed answers and averages over every label seen in truth or "
        f"prediction, so that one stray answer adds a class with F1 zero {example}"
    )


def model_metrics(counting: Counting, config: Config) -> dict[str, Any]:
    """One model's part of metrics.json."""
    tally, task = counting.tally(), config.task
    found = headline(tally.counts, task.ordinal, report=True)
    values = {name: number(value) for name, value in found.items()}
    outside = tally.counts[:, tally.classes + 1 :]
    confusion = tally.counts[:, : tally.classes + 1]
    columns = [*task.labels, "unparsed"]
    if tally.stray:
        confusion = np.column_stack([confusion, outside.sum(axis=1)])
        columns.append(f"outside 0-{tally.classes - 1}")
    calibration = counting.calibration.summary(task.ordinal)
    stars = task.stars if task.unit == "star" else None
    classes = [
        {**row, "name": task.shown[i], **({"stars": stars[i]} if stars else {})}
        for i, row in enumerate(per_class(tally.counts))
    ]
    return {
        "rows": tally.rows,
        "answered": tally.rows - tally.unparsed,
        "unparsed": tally.unparsed,
        "outside": int(outside.sum()),
        "accuracy": values["accuracy"],
        "f1": {average: values[f"f1.{average}"] for average in AVERAGES},
        "f1_report": {average: values[f"f1_report.{average}"] for average in AVERAGES},
        "top_k": counting.calibration.top_k(),
        **{name: values[name] for name in ("mae", "within_one", "kappa") if name in values},
        "ece": calibration["ece"] if calibration else None,
        "per_class": classes,
        "confusion": confusion.tolist(),
        "confusion_columns": columns,
        "stray_labels": {
            str(value): int(outside[:, i].sum()) for i, value in enumerate(tally.stray[:50])
        },
        "calibration": calibration,
        "ci95": headline_intervals(
            tally.counts,
            ordinal=task.ordinal,
            resamples=config.collect.bootstrap,
            seed=config.seed,
            report=True,
        ),
    }


def comparison(base: Counting, tuned: Counting, config: Config) -> dict[str, Any]:
    """Tuned against base on the same rows: differences with intervals, and McNemar's test."""
    test = base.coverage.test
    ordinal = config.task.ordinal
    joint = joint_table(
        test.labels.astype(np.int64), base.coverage.codes, tuned.coverage.codes, test.classes
    )
    ends = bootstrap_intervals(
        joint.counts,
        lambda drawn: joint.statistics(drawn, ordinal),
        resamples=config.collect.bootstrap,
        seed=config.seed,
    )
    pairs = discordant(joint)
    return {
        **pairs,
        "mcnemar": mcnemar(pairs["only_base_right"], pairs["only_tuned_right"]),
        "difference": {
            name: {"value": number(value), "ci95": ends[name]}
            for name, value in paired_statistics(joint, ordinal).items()
        },
    }


def number(value: Any) -> float | None:
    """A float for JSON, null where it is undefined."""
    number = float(value)
    return None if np.isnan(number) else number
