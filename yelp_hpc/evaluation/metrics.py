"""Metrics of five-class predictions, computed from a confusion matrix (numpy only, no files).

Everything but calibration is a function of a `Tally`: how often each label was answered with each
label, with nothing parseable, or with a stray integer outside 0-4 (which generation can produce).
Shards add up, so metrics of any number of rows take the memory of one small matrix.

Two F1 conventions stand side by side, because they answer different questions:

* `f1`, honest: the labels are 0-4, an unparsed or stray answer is a wrong answer. Equals
  scikit-learn's `f1_score(..., labels=[0, 1, 2, 3, 4])` with unparsed answers coded as -1.
* `f1_report`, the report's: unparsed answers are dropped and the average runs over every label
  seen in truth or prediction. Equals `f1_score` without `labels=` on the parsed rows. One
  stray answer adds a sixth class with F1 zero and so takes a sixth off the macro average.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

CLASSES = 5
UNPARSED = CLASSES
"""Column of a tally that counts answers in which no label was found."""
AVERAGES = ("micro", "macro", "weighted")


@dataclass(frozen=True)
class Tally:
    """Answers counted by truth and prediction.

    `counts` is int64 `[5, 6 + len(stray)]`: a row for each true label; columns for the
    predictions 0-4, for unparsed, then for each integer of `stray` (ascending, outside 0-4).
    """

    counts: Counts
    stray: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """All rows, answered or not."""
        return int(self.counts.sum())

    @property
    def unparsed(self) -> int:
        """Rows without an answer that could be read."""
        return int(self.counts[:, UNPARSED].sum())


def tally(labels: ArrayLike, predictions: Iterable[int | None] | NDArray[Any]) -> Tally:
    """Count `[n]` labels (0-4) against `[n]` predictions (integers, None where unparsed).

    Raises:
        ValueError: lengths differ, or a label lies outside 0-4.
    """
    listed = list(predictions)
    missing = np.array([p is None for p in listed], dtype=bool)
    values = np.array([0 if p is None else int(p) for p in listed], dtype=np.int64)
    return tally_arrays(np.asarray(labels, dtype=np.int64), values, missing)


def tally_arrays(labels: Counts, predictions: Counts, unparsed: NDArray[np.bool_]) -> Tally:
    """`tally` of arrays: `unparsed` marks the rows whose `predictions` value means nothing."""
    if not len(labels) == len(predictions) == len(unparsed):
        raise ValueError(f"{len(labels)} labels, {len(predictions)} predictions")
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES:
        raise ValueError(f"labels must lie in 0-4, found {labels.min()} to {labels.max()}")
    outside = ~unparsed & ((predictions < 0) | (predictions >= CLASSES))
    stray = np.unique(predictions[outside])
    columns = np.where(unparsed, UNPARSED, predictions)
    columns[outside] = UNPARSED + 1 + np.searchsorted(stray, predictions[outside])
    width = UNPARSED + 1 + len(stray)
    cells = np.bincount(labels * width + columns, minlength=CLASSES * width)
    return Tally(cells.reshape(CLASSES, width).astype(np.int64), tuple(stray.tolist()))


def add_tallies(first: Tally, second: Tally) -> Tally:
    """The tally of both sets of rows together."""
    stray = tuple(sorted({*first.stray, *second.stray}))
    counts = np.zeros((CLASSES, UNPARSED + 1 + len(stray)), dtype=np.int64)
    for part in (first, second):
        columns = [*range(UNPARSED + 1), *(UNPARSED + 1 + stray.index(s) for s in part.stray)]
        counts[:, columns] += part.counts
    return Tally(counts, stray)


def _ratio(numerator: ArrayLike, denominator: ArrayLike, empty: float) -> Floats:
    """Element-wise quotient that is `empty` where the denominator is zero."""
    top, bottom = np.broadcast_arrays(
        np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    )
    result: Floats = np.divide(top, bottom, out=np.full(top.shape, empty), where=bottom > 0)
    return result


def accuracy(counts: Counts) -> Floats:
    """Right answers over all rows, `[..., 5, columns]` -> `[...]`."""
    right = np.trace(counts[..., :CLASSES], axis1=-2, axis2=-1)
    return _ratio(right, counts.sum(axis=(-2, -1)), np.nan)


def f1_honest(counts: Counts) -> dict[str, Floats]:
    """Micro, macro and weighted F1 over the labels 0-4, anything else being wrong.

    `[..., 5, columns]` -> `[...]` for each average. A class with neither truth nor prediction
    has F1 zero and counts in the macro average. Micro F1 exceeds accuracy when answers are
    unparsed: they are misses, but no label's false alarm.
    """
    right = np.diagonal(counts[..., :CLASSES], axis1=-2, axis2=-1)
    support = counts.sum(axis=-1)
    predicted = counts[..., :CLASSES].sum(axis=-2)
    f1 = _ratio(2 * right, support + predicted, 0.0)
    return {
        "micro": _ratio(2 * right.sum(-1), support.sum(-1) + predicted.sum(-1), np.nan),
        "macro": f1.mean(axis=-1),
        "weighted": _ratio((f1 * support).sum(-1), support.sum(-1), np.nan),
    }


def f1_report(counts: Counts) -> dict[str, Floats]:
    """Micro, macro and weighted F1 over the parsed rows and the labels seen in them.

    `[..., 5, columns]` -> `[...]` for each average, NaN where no answer was parsed.
    """
    parsed = np.delete(counts, UNPARSED, axis=-1)
    right = np.diagonal(parsed[..., :CLASSES], axis1=-2, axis2=-1)
    support = parsed.sum(axis=-1)
    predicted = parsed.sum(axis=-2)
    answered = support.sum(axis=-1)
    f1 = _ratio(2 * right, support + predicted[..., :CLASSES], 0.0)
    seen = (support + predicted[..., :CLASSES] > 0).sum(-1) + (predicted[..., CLASSES:] > 0).sum(-1)
    return {
        "micro": _ratio(right.sum(-1), answered, np.nan),
        "macro": _ratio(f1.sum(-1), seen, np.nan),
        "weighted": _ratio((f1 * support).sum(-1), answered, np.nan),
    }


def _distance() -> Counts:
    stars = np.arange(CLASSES)
    distance: Counts = np.abs(stars[:, None] - stars[None, :])
    return distance


def mean_absolute_error(counts: Counts) -> Floats:
    """Mean distance in stars over the rows answered with a label 0-4; NaN when there are none."""
    labelled = counts[..., :CLASSES]
    return _ratio((labelled * _distance()).sum((-2, -1)), labelled.sum((-2, -1)), np.nan)


def within_one_star(counts: Counts) -> Floats:
    """Share of *all* rows answered at most one star away; unparsed and stray rows are not."""
    near = (counts[..., :CLASSES] * (_distance() <= 1)).sum((-2, -1))
    return _ratio(near, counts.sum((-2, -1)), np.nan)


def per_class(counts: Counts) -> list[dict[str, float | int]]:
    """Precision, recall, F1 and support of each label, the honest way (0 where undefined)."""
    right = np.diagonal(counts[:, :CLASSES])
    support = counts.sum(axis=1)
    predicted = counts[:, :CLASSES].sum(axis=0)
    precision = _ratio(right, predicted, 0.0)
    recall = _ratio(right, support, 0.0)
    f1 = _ratio(2 * right, support + predicted, 0.0)
    return [
        {
            "label": label,
            "stars": label + 1,
            "precision": float(precision[label]),
            "recall": float(recall[label]),
            "f1": float(f1[label]),
            "support": int(support[label]),
            "predicted": int(predicted[label]),
        }
        for label in range(CLASSES)
    ]


def softmax(scores: Floats) -> Floats:
    """Probabilities of `[n, 5]` logits along the last axis."""
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


class Calibration:
    """How far confidence can be trusted, summed up shard by shard.

    Confidence is the probability of the most probable label. The expected calibration error (ECE)
    is the mean over rows of |accuracy - confidence| of the row's bin (Guo et al. 2017, "On
    Calibration of Modern Neural Networks"); bins are equally wide and closed on the right.
    """

    def __init__(self, bins: int = 15) -> None:
        self.rows = np.zeros(bins, dtype=np.int64)
        self.right = np.zeros(bins, dtype=np.int64)
        self.confidence = np.zeros(bins)
        self.squared_error = 0.0
        self.star_error = 0.0

    def add(self, probabilities: Floats, labels: Counts) -> None:
        """Take in `[n, 5]` probabilities and their `[n]` true labels."""
        if not len(labels):
            return
        bins = len(self.rows)
        confidence = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == labels
        index = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
        self.rows += np.bincount(index, minlength=bins)
        self.right += np.bincount(index[right], minlength=bins)
        self.confidence += np.bincount(index, weights=confidence, minlength=bins)
        truth = probabilities[np.arange(len(labels)), labels]
        self.squared_error += float(((probabilities**2).sum(axis=1) - 2 * truth + 1).sum())
        expected = probabilities @ np.arange(CLASSES)
        self.star_error += float(np.abs(expected - labels).sum())

    def summary(self) -> dict[str, Any] | None:
        """ECE, Brier score, error of the expected stars and the bins; None without scores."""
        total = int(self.rows.sum())
        if total == 0:
            return None
        edges = np.linspace(0, 1, len(self.rows) + 1)
        bins = [
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "rows": int(self.rows[i]),
                "confidence": float(self.confidence[i] / self.rows[i]) if self.rows[i] else None,
                "accuracy": float(self.right[i] / self.rows[i]) if self.rows[i] else None,
            }
            for i in range(len(self.rows))
        ]
        return {
            "rows": total,
            "ece": float(np.abs(self.right - self.confidence).sum() / total),
            "brier": self.squared_error / total,
            "expected_star_error": self.star_error / total,
            "bins": bins,
        }
