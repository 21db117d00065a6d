"""Metrics of predictions of K classes, computed from a confusion matrix (numpy only, no files).

Everything but calibration and top-k is a function of a `Tally`: how often each label was answered
with each label, with nothing parseable, or with a stray integer that is no class. Shards add up,
so metrics of any number of rows take the memory of one small matrix.

Two F1 conventions stand side by side, because they answer different questions:

* `f1`, honest: the labels are the task's, an unparsed or stray answer is a wrong answer. Equals
  scikit-learn's `f1_score(..., labels=range(K))` with unparsed answers coded as -1.
* `f1_report`, the report's: unparsed answers are dropped and the average runs over every label
  seen in truth or prediction. Equals `f1_score` without `labels=` on the parsed rows. One
  stray answer adds a class with F1 zero: of five, it takes a sixth off the macro average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

AVERAGES = ("micro", "macro", "weighted")
TOP = (2, 3, 5, 10)
"""The k of top-k accuracy that are given, where they are smaller than the number of classes."""


@dataclass(frozen=True)
class Tally:
    """Answers counted by truth and prediction.

    `counts` is int64 `[K, K + 1 + len(stray)]`: a row for each true class; columns for the
    predicted classes, for unparsed, then for each integer of `stray` (ascending, no class).
    """

    counts: Counts
    stray: tuple[int, ...] = ()

    @property
    def classes(self) -> int:
        """How many classes the task has."""
        return len(self.counts)

    @property
    def rows(self) -> int:
        """All rows, answered or not."""
        return int(self.counts.sum())

    @property
    def unparsed(self) -> int:
        """Rows without an answer that could be read."""
        return int(self.counts[:, self.classes].sum())


@dataclass(frozen=True)
class Sums:
    """The sums over a table of answers that all statistics below are functions of.

    `[..., K]` by class, `[..., S]` by stray integer, `[...]` over all; `labelled` rows are those
    answered with a class.
    """

    right: Counts
    support: Counts
    unparsed: Counts
    labelled: Counts
    predicted: Counts
    stray: Counts
    distance: Counts
    squared: Counts
    near: Counts


Table = Counts | Sums
"""Counts `[..., K, columns]`, or their sums."""


def sums(table: Table) -> Sums:
    """The sums of counts `[..., K, columns]`."""
    if isinstance(table, Sums):
        return table
    classes = table.shape[-2]
    inside = table[..., :classes]
    place = np.arange(classes)
    distance = np.abs(place[:, None] - place)
    return Sums(
        right=np.diagonal(inside, axis1=-2, axis2=-1),
        support=table.sum(-1),
        unparsed=table[..., classes],
        labelled=inside.sum(-1),
        predicted=inside.sum(-2),
        stray=table[..., classes + 1 :].sum(-2),
        distance=(inside * distance).sum((-2, -1)),
        squared=(inside * distance**2).sum((-2, -1)),
        near=(inside * (distance <= 1)).sum((-2, -1)),
    )


def cell_sums(counts: Counts, truth: Counts, column: Counts, classes: int) -> Sums:
    """The sums of tables given by their occupied cells alone.

    Args:
        counts: `[..., n]`, how often each cell was seen.
        truth, column: `[n]`, where each cell stands in a table `[K, columns]`.
    """

    def by(index: Counts, chosen: NDArray[np.bool_], size: int) -> Counts:
        total = np.zeros((*counts.shape[:-1], size), dtype=np.int64)
        kept = np.flatnonzero(chosen)
        kept = kept[np.argsort(index[kept], kind="stable")]
        if len(kept):
            groups, starts = np.unique(index[kept], return_index=True)
            total[..., groups] = np.add.reduceat(counts[..., kept], starts, axis=-1)
        return total

    inside = column < classes
    distance = np.where(inside, np.abs(truth - column), 0)
    strays = max(0, int(column.max(initial=0)) - classes)
    return Sums(
        right=by(truth, truth == column, classes),
        support=by(truth, np.ones_like(inside), classes),
        unparsed=by(truth, column == classes, classes),
        labelled=by(truth, inside, classes),
        predicted=by(column, inside, classes),
        stray=by(column - classes - 1, column > classes, strays),
        distance=counts @ distance,
        squared=counts @ distance**2,
        near=counts @ (inside & (distance <= 1)).astype(np.int64),
    )


def _ratio(numerator: ArrayLike, denominator: ArrayLike, empty: float) -> Floats:
    """Element-wise quotient that is `empty` where the denominator is zero."""
    top, bottom = np.broadcast_arrays(numerator, denominator)
    result: Floats = np.divide(top, bottom, out=np.full(top.shape, empty), where=bottom > 0)
    return result


def accuracy(table: Table) -> Floats:
    """Right answers over all rows, `[..., K, columns]` -> `[...]`."""
    s = sums(table)
    return _ratio(s.right.sum(-1), s.support.sum(-1), np.nan)


def f1_honest(table: Table) -> dict[str, Floats]:
    """Micro, macro and weighted F1 over the task's labels, anything else being wrong.

    `[..., K, columns]` -> `[...]` for each average. A class with neither truth nor prediction
    has F1 zero and counts in the macro average. Micro F1 exceeds accuracy when answers are
    unparsed: they are misses, but no label's false alarm.
    """
    s = sums(table)
    f1 = _ratio(2 * s.right, s.support + s.predicted, 0.0)
    return {
        "micro": _ratio(2 * s.right.sum(-1), s.support.sum(-1) + s.predicted.sum(-1), np.nan),
        "macro": f1.mean(axis=-1),
        "weighted": _ratio((f1 * s.support).sum(-1), s.support.sum(-1), np.nan),
    }


def f1_report(table: Table) -> dict[str, Floats]:
    """Micro, macro and weighted F1 over the parsed rows and the labels seen in them.

    `[..., K, columns]` -> `[...]` for each average, NaN where no answer was parsed.
    """
    s = sums(table)
    support = s.support - s.unparsed
    answered = support.sum(axis=-1)
    f1 = _ratio(2 * s.right, support + s.predicted, 0.0)
    seen = (support + s.predicted > 0).sum(-1) + (s.stray > 0).sum(-1)
    return {
        "micro": _ratio(s.right.sum(-1), answered, np.nan),
        "macro": _ratio(f1.sum(-1), seen, np.nan),
        "weighted": _ratio((f1 * support).sum(-1), answered, np.nan),
    }


def mean_absolute_error(table: Table) -> Floats:
    """Mean distance in classes over the rows answered with one; NaN when there are none."""
    s = sums(table)
    return _ratio(s.distance, s.labelled.sum(-1), np.nan)


def within_one_star(table: Table) -> Floats:
    """Share of *all* rows answered at most one class away; unparsed and stray rows are not."""
    s = sums(table)
    return _ratio(s.near, s.support.sum(-1), np.nan)


def quadratic_kappa(table: Table) -> Floats:
    """Cohen's kappa with quadratic weights (Cohen 1968) over the rows answered with a class.

    1 - observed / expected squared distance; NaN where the expected one is zero.
    """
    s = sums(table)
    place = np.arange(s.right.shape[-1])
    truth, said = s.labelled, s.predicted
    rows = truth.sum(-1)
    # the sum over i, j of (i - j)² truth_i said_j
    expected = (
        (truth @ place**2) * rows
        + (said @ place**2) * rows
        - 2.0 * (truth @ place) * (said @ place)
    )
    return 1 - _ratio(s.squared * rows.astype(np.float64), expected, np.nan)


def per_class(counts: Counts) -> list[dict[str, float | int]]:
    """Precision, recall, F1 and support of each label, the honest way (0 where undefined)."""
    s = sums(counts)
    precision = _ratio(s.right, s.predicted, 0.0)
    recall = _ratio(s.right, s.support, 0.0)
    f1 = _ratio(2 * s.right, s.support + s.predicted, 0.0)
    return [
        {
            "label": label,
            "precision": float(precision[label]),
            "recall": float(recall[label]),
            "f1": float(f1[label]),
            "support": int(s.support[label]),
            "predicted": int(s.predicted[label]),
        }
        for label in range(len(counts))
    ]


def majority(support: Counts) -> dict[str, float | int]:
    """What always answering the most frequent label would get: the least that must be beaten."""
    label = int(support.argmax())
    counts = np.zeros((len(support), len(support) + 1), dtype=np.int64)
    counts[:, label] = support
    return {
        "label": label,
        "accuracy": float(accuracy(counts)),
        "f1_macro": float(f1_honest(counts)["macro"]),
    }


def softmax(scores: Floats) -> Floats:
    """Probabilities of `[n, K]` logits or log-probabilities along the last axis."""
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


class Calibration:
    """How far scores can be trusted, summed up shard by shard.

    Confidence is the probability of the most probable label. The expected calibration error (ECE)
    is the mean over rows of |accuracy - confidence| of the row's bin (Guo et al. 2017, "On
    Calibration of Modern Neural Networks"); bins are equally wide and closed on the right.
    """

    def __init__(self, bins: int, classes: int) -> None:
        self.rows = np.zeros(bins, dtype=np.int64)
        self.right = np.zeros(bins, dtype=np.int64)
        self.confidence = np.zeros(bins)
        self.squared_error = 0.0
        self.star_error = 0.0
        self.ranks = np.zeros(classes, dtype=np.int64)
        """`[K]`: how often so many labels scored higher than the true one (or equal, before it)."""

    def add(self, probabilities: Floats, labels: Counts) -> None:
        """Take in `[n, K]` probabilities and their `[n]` true labels."""
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
        place = np.arange(probabilities.shape[1])
        expected = probabilities @ place
        self.star_error += float(np.abs(expected - labels).sum())
        higher = (probabilities > truth[:, None]).sum(1)
        equal = (probabilities == truth[:, None]) & (place < labels[:, None])
        self.ranks += np.bincount(higher + equal.sum(1), minlength=len(self.ranks))

    def top_k(self) -> dict[str, float] | None:
        """Share of rows whose true label is among the k most probable; None without scores."""
        total = int(self.rows.sum())
        if not total:
            return None
        within = np.cumsum(self.ranks) / total
        return {str(k): float(within[k - 1]) for k in TOP if k < len(self.ranks)}

    def summary(self, ordinal: bool = True) -> dict[str, Any] | None:
        """ECE, Brier score, error of the expected class (where ordinal) and the bins.

        None without scores.
        """
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
            **({"expected_star_error": self.star_error / total} if ordinal else {}),
            "bins": bins,
        }
