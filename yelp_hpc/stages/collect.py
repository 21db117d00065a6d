"""collect: every prediction checked and counted, then metrics.json and report.html.

Reads `prepare/test.parquet`, `infer/{base,tuned}/shard-*.parquet`, and for the report page
`train/log.jsonl`, `submissions.jsonl`, `logs/attempts/` and `run.json`. Refuses to compute anything
before every test row is there exactly once for each model that the config names. No torch here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from yelp_hpc.config import YELP, Config, TaskConfig
from yelp_hpc.evaluation.coverage import (
    Answers,
    Coverage,
    integers,
    read_test_set,
    refuse_unless_complete,
)
from yelp_hpc.evaluation.metrics import (
    AVERAGES,
    Calibration,
    Tally,
    majority,
    per_class,
    softmax,
)
from yelp_hpc.evaluation.outcome import print_outcome
from yelp_hpc.evaluation.significance import (
    bootstrap_intervals,
    discordant,
    headline,
    headline_intervals,
    joint_table,
    mcnemar,
    paired_statistics,
)
from yelp_hpc.progress import say
from yelp_hpc.rundir.collected import write_collected
from yelp_hpc.rundir.files import sweep
from yelp_hpc.rundir.paths import RunPaths

PUBLISHED = {
    "base": {"f1": {"micro": 0.406, "macro": 0.183, "weighted": 0.403}},
    "tuned": {"f1": {"micro": 0.695, "macro": 0.579, "weighted": 0.695}},
}
"""The study's published figures (ChatGLM3-6B, 50,000 balanced test reviews), in its convention."""
_CHUNK = 1_000_000


@dataclass(frozen=True)
class Mistake:
    """A wrong or unparsed answer, before its texts are fetched."""

    severity: float
    position: int
    label: int
    prediction: int | None
    confidence: float | None
    path: Path


class Counting:
    """What is kept of one model's answers while its shards stream by."""

    def __init__(self, coverage: Coverage, config: Config) -> None:
        self.coverage = coverage
        self.classes = len(config.task.labels)
        self.ordinal = config.task.ordinal
        self.calibration = Calibration(config.collect.calibration_bins, self.classes)
        self.limit = config.collect.mistakes
        self.stray: Counter[tuple[int, int]] = Counter()
        self.mistakes: list[Mistake] = []
        self.unparsed: list[Mistake] = []

    def read(self) -> None:
        """Read every shard once."""
        for answers in self.coverage.read():
            self._take(answers)

    def _take(self, answers: Answers) -> None:
        outside = answers.codes == self.classes + 1
        if outside.any():
            pairs = zip(answers.labels[outside], answers.predictions[outside], strict=True)
            self.stray.update((int(label), int(value)) for label, value in pairs)
        confidence = np.zeros(len(answers.labels))
        if answers.scores is not None:
            probabilities = softmax(answers.scores)
            self.calibration.add(probabilities, answers.labels)
            confidence = probabilities.max(axis=1)
        distance = np.abs(answers.predictions - answers.labels)
        if not self.ordinal:
            distance = np.minimum(distance, 1)
        severity = np.where(answers.codes < self.classes, distance + confidence, 0.0)
        severity[distance == 0] = 0.0
        self.mistakes += self._worst(answers, severity, confidence)
        self.mistakes.sort(key=lambda mistake: (-mistake.severity, mistake.position))
        del self.mistakes[self.limit :]
        unparsed = np.flatnonzero(answers.codes == self.classes)
        first = unparsed[: max(0, 5 - len(self.unparsed))]
        self.unparsed += [self._mistake(answers, i, 0.0, None) for i in first]

    def _worst(self, answers: Answers, severity: Any, confidence: Any) -> list[Mistake]:
        count = min(self.limit, int((severity > 0).sum()))
        if not count:
            return []
        order = np.lexsort((answers.positions, -severity))[:count]
        scored = answers.scores is not None
        return [
            self._mistake(answers, i, float(severity[i]), float(confidence[i]) if scored else None)
            for i in order
        ]

    def _mistake(
        self, answers: Answers, i: Any, severity: float, confidence: float | None
    ) -> Mistake:
        unparsed = answers.codes[i] == self.classes
        prediction = None if unparsed else int(answers.predictions[i])
        position, label = int(answers.positions[i]), int(answers.labels[i])
        return Mistake(severity, position, label, prediction, confidence, answers.path)

    def tally(self) -> Tally:
        """The confusion counts of what was read."""
        values = tuple(sorted({value for _, value in self.stray}))
        own = self.classes + 1
        counts = np.zeros((self.classes, own + len(values)), dtype=np.int64)
        labels, codes = self.coverage.test.labels, self.coverage.codes
        for start in range(0, len(labels), _CHUNK):
            part = slice(start, start + _CHUNK)
            flat = labels[part].astype(np.int64) * (own + 1) + codes[part]
            cells = np.bincount(flat, minlength=self.classes * (own + 1))
            counts[:, :own] += cells.reshape(self.classes, -1)[:, :own]
        column = {value: own + i for i, value in enumerate(values)}
        for (label, value), count in self.stray.items():
            counts[label, column[value]] = count
        return Tally(counts, values)


def run(paths: RunPaths, config: Config) -> None:
    """Collect and print the table of base against tuned."""
    print_outcome(collect(paths, config))
    say(f"wrote {paths.metrics} and {paths.report}")


def collect(paths: RunPaths, config: Config) -> dict[str, Any]:
    """Check coverage, compute every statistic, write metrics.json and report.html.

    Returns:
        The content of metrics.json. It depends on predictions and config alone, so that computing
        it again from the same shards gives the same bytes.

    Raises:
        StageError: a test row is missing or doubled, a shard is torn or of another test set; the
            message names them and the commands that mend it. Nothing is written then.
    """
    from yelp_hpc.evaluation.report import report_page

    sweep(paths.root)
    metrics, counted = measure(paths, config)
    examples = {name: examples_of(paths, counting) for name, counting in counted.items()}
    page = report_page(paths, metrics, examples)
    write_collected(paths, metrics, page)
    return metrics


def measure(paths: RunPaths, config: Config) -> tuple[dict[str, Any], dict[str, Counting]]:
    """The content of metrics.json from the shards; writes nothing. Raises as `collect` does."""
    task = config.task
    test = read_test_set(paths.split("test"), len(task.labels))
    counted: dict[str, Counting] = {}
    for name in sorted(config.infer.models):
        counted[name] = Counting(Coverage(paths, name, config.infer.shards, test), config)
        counted[name].read()
    refuse_unless_complete([counting.coverage for counting in counted.values()])
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
    values = {name: _number(value) for name, value in headline(tally.counts, task.ordinal).items()}
    outside = tally.counts[:, tally.classes + 1 :]
    confusion = tally.counts[:, : tally.classes + 1]
    columns = [*task.labels, "unparsed"]
    if tally.stray:
        confusion = np.column_stack([confusion, outside.sum(axis=1)])
        columns.append(f"outside 0-{tally.classes - 1}")
    calibration = counting.calibration.summary(task.ordinal)
    stars = task.stars
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
            name: {"value": _number(value), "ci95": ends[name]}
            for name, value in paired_statistics(joint, ordinal).items()
        },
    }


def examples_of(paths: RunPaths, counting: Counting) -> dict[str, list[dict[str, Any]]]:
    """The worst mistakes and the first unparsed answers, with the review and what was generated."""
    chosen = {"mistakes": counting.mistakes, "unparsed": counting.unparsed}
    test = counting.coverage.test
    places = np.array([m.position for kind in chosen.values() for m in kind], dtype=np.int64)
    reviews = _texts_at(paths.split("test"), sorted(set(places.tolist())))
    ids = dict(zip(places.tolist(), test.row_ids(places), strict=True))
    return {
        kind: [
            {
                "row": ids[m.position],
                "label": m.label,
                "prediction": m.prediction,
                "confidence": m.confidence,
                "review": reviews.get(m.position, ""),
                "answer": _generated(m.path, ids[m.position]),
            }
            for m in found
        ]
        for kind, found in chosen.items()
    }


def _texts_at(test: Path, positions: list[int]) -> dict[int, str]:
    """The reviews at some positions of the test set; only their row groups are read."""
    file = pq.ParquetFile(test)
    if "text" not in file.schema_arrow.names:
        return {}
    texts: dict[int, str] = {}
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        inside = [place for place in positions if start <= place < stop]
        if inside:
            column = file.read_row_group(group, columns=["text"])["text"]
            texts |= {place: str(column[place - start].as_py()) for place in inside}
        start = stop
    return texts


def _generated(path: Path, row: int) -> str | None:
    """What the model wrote for a row; None in score mode."""
    file = pq.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        return None
    for batch in file.iter_batches(columns=["row", "text"]):
        places = np.flatnonzero(integers(batch.column("row")) == row)
        if len(places):
            text: str | None = batch.column("text")[int(places[0])].as_py()
            return text
    return None


def _number(value: Any) -> float | None:
    """A float for JSON, null where it is undefined."""
    number = float(value)
    return None if np.isnan(number) else number
