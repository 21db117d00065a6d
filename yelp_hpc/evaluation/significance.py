"""How sure the metrics are: seeded bootstrap intervals and McNemar's test (numpy only).

Resampling n rows with replacement is one multinomial draw over the cells of their confusion
matrix, so a thousand resamples of 50,000 rows are a thousand draws over some thirty cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yelp_hpc.evaluation.metrics import (
    CLASSES,
    UNPARSED,
    Counts,
    Floats,
    accuracy,
    f1_honest,
    f1_report,
    mean_absolute_error,
    within_one_star,
)

Statistics = Mapping[str, Floats]
_CELLS_AT_ONCE = 4_000_000
"""Bound on the size of one batch of resamples (32 MB), whatever the number of stray labels."""


def headline(counts: Counts) -> dict[str, Floats]:
    """The statistics that get an interval, `[..., 5, columns]` -> `[...]`, by dotted name."""
    flat = {
        "accuracy": accuracy(counts),
        "mae": mean_absolute_error(counts),
        "within_one": within_one_star(counts),
    }
    flat |= {f"f1.{name}": value for name, value in f1_honest(counts).items()}
    return flat | {f"f1_report.{name}": value for name, value in f1_report(counts).items()}


def bootstrap_intervals(
    cells: Counts,
    statistics: Callable[[Counts], Statistics],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, list[float] | None]:
    """Percentile bootstrap intervals of functions of a table of counts.

    Args:
        cells: int64 table of any shape, how often each outcome was seen.
        statistics: from `[resamples, *cells.shape]` to named `[resamples]` arrays.
        resamples: number of resamples (1,000 or more for a 95 % interval).
        seed: the same seed gives the same interval.

    Returns:
        `[low, high]` by name, None where the statistic is undefined in every resample. Single
        resamples in which it is undefined (no answer was parsed) are left out of the percentiles.
    """
    total = int(cells.sum())
    occupied = np.flatnonzero(cells)
    share = cells.reshape(-1)[occupied] / max(total, 1)
    generator = np.random.default_rng(seed)
    at_once = max(1, _CELLS_AT_ONCE // max(cells.size, 1))
    drawn: dict[str, list[Floats]] = {}
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        batch = np.zeros((size, cells.size), dtype=np.int64)
        if total:
            batch[:, occupied] = generator.multinomial(total, share, size=size)
        for name, values in statistics(batch.reshape(size, *cells.shape)).items():
            drawn.setdefault(name, []).append(values)
    tail = (1 - level) / 2
    intervals: dict[str, list[float] | None] = {}
    for name, parts in drawn.items():
        values = np.concatenate(parts)
        values = values[~np.isnan(values)]
        ends = np.quantile(values, [tail, 1 - tail]).tolist() if len(values) else None
        intervals[name] = ends
    return intervals


def paired_statistics(joint: Counts) -> dict[str, Floats]:
    """Tuned minus base of the statistics that both models have on the same rows.

    `joint` is `[..., 5, columns, columns]`: truth, base's column, tuned's column.
    """
    base, tuned = headline(joint.sum(axis=-1)), headline(joint.sum(axis=-2))
    return {name: tuned[name] - base[name] for name in tuned if not name.startswith("f1_report")}


def discordant(joint: Counts) -> dict[str, int]:
    """Rows that both, only one or neither model answered right; `joint` is one table."""
    both = sum(int(joint[k, k, k]) for k in range(CLASSES))
    base = sum(int(joint[k, k].sum()) for k in range(CLASSES))
    tuned = sum(int(joint[k, :, k].sum()) for k in range(CLASSES))
    return {
        "both_right": both,
        "only_base_right": base - both,
        "only_tuned_right": tuned - both,
        "both_wrong": int(joint.sum()) - base - tuned + both,
    }


def mcnemar(only_first: int, only_second: int) -> dict[str, Any]:
    """McNemar's test that two models err equally often on the same rows.

    Args:
        only_first, only_second: rows that only the first or only the second model got right.

    Returns:
        The two-sided exact (binomial) p value, with its base-10 logarithm, which does not
        underflow, and the chi-square statistic with continuity correction and its p value. Equal
        counts give statistic 0 and p 1, as R's `mcnemar.test` does.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    log_p = 0.0 if only_first == only_second else _log_tail(fewer, total) + math.log(2)
    log_p = min(log_p, 0.0)
    gap = max(abs(only_first - only_second) - 1, 0)
    chi2 = gap**2 / total if total else 0.0
    return {
        "exact_p": math.exp(log_p),
        "log10_exact_p": log_p / math.log(10),
        "chi2": chi2,
        "chi2_p": math.erfc(math.sqrt(chi2 / 2)),
    }


def _log_tail(successes: int, trials: int) -> float:
    """ln P(X <= successes) for X ~ Binomial(trials, 1/2).

    Sums the terms from the largest down in relative size, until they no longer count.
    """
    log_largest = (
        math.lgamma(trials + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(trials - successes + 1)
        - trials * math.log(2)
    )
    total = term = 1.0
    for k in range(successes, 0, -1):
        term *= k / (trials - k + 1)
        total += term
        if term < 1e-18 * total:
            break
    return log_largest + math.log(total)


def joint_table(labels: Counts, base: NDArray[Any], tuned: NDArray[Any]) -> Counts:
    """`[5, 7, 7]` counts of truth, base's and tuned's column; column 6 is any stray integer."""
    width = UNPARSED + 2
    flat = (labels * width + base) * width + tuned
    cells = np.bincount(flat, minlength=CLASSES * width * width)
    return cells.reshape(CLASSES, width, width).astype(np.int64)
