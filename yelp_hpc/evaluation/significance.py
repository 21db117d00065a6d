"""How sure the metrics are: seeded bootstrap, McNemar's test, Holm's correction (numpy only).

Resampling n rows with replacement is one multinomial draw over the cells of their confusion
matrix, so a thousand resamples of 50,000 rows are a thousand draws over some thirty cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yelp_hpc.evaluation.metrics import (
    Counts,
    Floats,
    Table,
    accuracy,
    cell_sums,
    f1_honest,
    f1_report,
    mean_absolute_error,
    quadratic_kappa,
    within_one_star,
)

Statistics = Mapping[str, Floats]
_CELLS_AT_ONCE = 4_000_000
"""Bound on the size of one batch of resamples (32 MB), whatever the number of stray labels."""


def headline(table: Table, ordinal: bool = True, report: bool = False) -> dict[str, Floats]:
    """The statistics that get an interval, `[..., K, columns]` -> `[...]`, by dotted name.

    Args:
        report: F1 in the report's way, too, which is one model's and no two are compared by.
    """
    flat = {"accuracy": accuracy(table)}
    if ordinal:
        flat |= {
            "mae": mean_absolute_error(table),
            "within_one": within_one_star(table),
            "kappa": quadratic_kappa(table),
        }
    flat |= {f"f1.{name}": value for name, value in f1_honest(table).items()}
    ours = f1_report(table) if report else {}
    return flat | {f"f1_report.{name}": value for name, value in ours.items()}


def headline_intervals(
    counts: Counts, *, ordinal: bool, resamples: int, seed: int, report: bool = False
) -> dict[str, list[float] | None]:
    """Intervals of `headline` for one table `[K, columns]`, over its occupied cells alone."""
    truth, column = np.nonzero(counts)

    def statistics(drawn: Counts) -> Statistics:
        return headline(cell_sums(drawn, truth, column, len(counts)), ordinal, report)

    return bootstrap_intervals(counts[truth, column], statistics, resamples=resamples, seed=seed)


def bootstrap_intervals(
    cells: Counts,
    statistics: Callable[[Counts], Statistics],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, list[float] | None]:
    """Percentile bootstrap intervals of functions of a table of counts.

    Args: as `bootstrap_draws`.

    Returns:
        `[low, high]` by name, None where the statistic is undefined in every resample. Single
        resamples in which it is undefined (no answer was parsed) are left out of the percentiles.
    """
    drawn = bootstrap_draws(cells, statistics, resamples=resamples, seed=seed)
    return {name: percentiles(values, level) for name, values in drawn.items()}


def bootstrap_draws(
    cells: Counts, statistics: Callable[[Counts], Statistics], *, resamples: int, seed: int
) -> dict[str, Floats]:
    """Functions of resamples of a table of counts, `[resamples]` by name.

    Args:
        cells: int64 table of any shape, how often each outcome was seen.
        statistics: from `[resamples, *cells.shape]` to named `[resamples]` arrays.
        resamples: number of resamples (1,000 or more for a 95 % interval).
        seed: the same seed gives the same resamples.
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
    return {name: np.concatenate(parts) for name, parts in drawn.items()}


def percentiles(values: Floats, level: float = 0.95) -> list[float] | None:
    """`[low, high]` of resampled values `[resamples]`, NaN left out; None where all are."""
    values = values[~np.isnan(values)]
    tail = (1 - level) / 2
    ends: list[float] | None = (
        np.quantile(values, [tail, 1 - tail]).tolist() if len(values) else None
    )
    return ends


def bootstrap_p(values: Floats) -> float:
    """Two-sided p value that a difference is 0, from its resamples `[resamples]`.

    Twice the smaller share of resamples on one side of 0, one counted in addition on either side
    (Davison and Hinkley 1997, eq. 4.12), so that it is never 0; 1 where none is defined.
    """
    values = values[~np.isnan(values)]
    below, above = int((values <= 0).sum()), int((values >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of tests, adjusted by Holm's step-down method (Holm 1979), in order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Joint:
    """Two models' answers to the same rows: the outcomes that occurred, and how often.

    All arrays are `[n]`; `base` and `tuned` are columns of a tally (K: unparsed, K + 1: stray).
    """

    classes: int
    truth: Counts
    base: Counts
    tuned: Counts
    counts: Counts

    def statistics(self, drawn: Counts, ordinal: bool = True) -> dict[str, Floats]:
        """Tuned minus base of the statistics that both have, for counts `[..., n]`."""
        base, tuned = (
            headline(cell_sums(drawn, self.truth, column, self.classes), ordinal)
            for column in (self.base, self.tuned)
        )
        return {name: tuned[name] - base[name] for name in tuned}


def joint_table(labels: Counts, base: NDArray[Any], tuned: NDArray[Any], classes: int = 5) -> Joint:
    """Count truth, base's and tuned's column of each row; column K + 1 is any stray integer."""
    width = classes + 2
    flat = (np.asarray(labels, dtype=np.int64) * width + base) * width + tuned
    cells, counts = np.unique(flat, return_counts=True)
    return Joint(classes, cells // width**2, cells // width % width, cells % width, counts)


def paired_statistics(joint: Joint, ordinal: bool = True) -> dict[str, Floats]:
    """Tuned minus base of the statistics that both models have on the same rows."""
    return joint.statistics(joint.counts, ordinal)


def discordant(joint: Joint) -> dict[str, int]:
    """Rows that both, only one or neither model answered right."""
    base, tuned = joint.base == joint.truth, joint.tuned == joint.truth

    def rows(chosen: NDArray[np.bool_]) -> int:
        return int(joint.counts[chosen].sum())

    return {
        "both_right": rows(base & tuned),
        "only_base_right": rows(base & ~tuned),
        "only_tuned_right": rows(~base & tuned),
        "both_wrong": rows(~base & ~tuned),
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
