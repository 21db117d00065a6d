"""Metrics against scikit-learn and scipy on random and awkward answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    mean_absolute_error,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from yelp_hpc.evaluation import metrics as m
from yelp_hpc.evaluation.significance import (
    bootstrap_intervals,
    discordant,
    headline,
    headline_intervals,
    joint_table,
    mcnemar,
    paired_statistics,
)

LABELS = [0, 1, 2, 3, 4]


def tally(labels: Iterable[int], answers: Iterable[int | None], classes: int = 5) -> m.Tally:
    """Counted one by one; None is unparsed, an integer that is no class is stray."""
    pairs = list(zip(labels, answers, strict=True))
    stray = sorted({a for _, a in pairs if a is not None and not 0 <= a < classes})
    columns: list[int | None] = [*range(classes), None, *stray]
    counts = np.zeros((classes, len(columns)), dtype=np.int64)
    for label, answer in pairs:
        counts[label, columns.index(answer)] += 1
    return m.Tally(counts, tuple(stray))


def random_answers(seed: int, rows: int, unparsed: float, stray: float, classes: list[int]) -> Any:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, rows)
    answers: list[int | None] = [
        None if rng.random() < unparsed
        else int(rng.choice([-3, 5, 7, 2019])) if rng.random() < stray
        else int(label) if rng.random() < 0.5 else int(rng.choice(classes))
        for label in labels
    ]  # fmt: skip
    return labels.tolist(), answers


CASES = {
    "plain": random_answers(1, 500, 0, 0, LABELS),
    "unparsed": random_answers(2, 500, 0.3, 0, LABELS),
    "stray": random_answers(3, 500, 0.2, 0.1, LABELS),
    "class absent": random_answers(4, 300, 0.1, 0.05, [0, 2, 4]),
    "one class": random_answers(5, 50, 0.1, 0, [3]),
    "never predicted": ([0, 1, 2, 3, 4] * 4, [1] * 20),
    "all unparsed": ([0, 1, 2, 3, 4], [None] * 5),
    "all stray": ([0, 1, 2], [9, 9, -1]),
    "one row right": ([2], [2]),
    "one row wrong": ([2], [4]),
    "one row unparsed": ([2], [None]),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def test_honest_f1_is_scikit_learns_over_the_five_labels(case: Any) -> None:
    labels, answers = case
    coded = [-1 if a is None else a for a in answers]
    found = m.f1_honest(tally(labels, answers).counts)
    for average in m.AVERAGES:
        expected = f1_score(labels, coded, labels=LABELS, average=average, zero_division=0)
        assert float(found[average]) == pytest.approx(expected, abs=1e-12), average


def test_report_f1_is_scikit_learns_over_the_labels_seen_in_parsed_rows(case: Any) -> None:
    labels, answers = case
    parsed = [(y, a) for y, a in zip(labels, answers, strict=True) if a is not None]
    found = m.f1_report(tally(labels, answers).counts)
    for average in m.AVERAGES:
        if not parsed:
            assert math.isnan(found[average])
            continue
        truth, said = zip(*parsed, strict=True)
        expected = f1_score(truth, said, average=average, zero_division=0)
        assert float(found[average]) == pytest.approx(expected, abs=1e-12), average


def test_the_other_point_statistics_are_scikit_learns(case: Any) -> None:
    labels, answers = case
    found = tally(labels, answers)
    coded = [-1 if a is None else a for a in answers]
    assert float(m.accuracy(found.counts)) == pytest.approx(accuracy_score(labels, coded))
    assert (found.counts[:, :5] == confusion_matrix(labels + LABELS, coded + LABELS, labels=LABELS)
            - np.eye(5, dtype=int)).all()  # fmt: skip
    assert found.unparsed == answers.count(None)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, coded, labels=LABELS, zero_division=0
    )
    rows = m.per_class(found.counts)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert [row[name] for row in rows] == pytest.approx(list(expected)), name
    assert [row["support"] for row in rows] == list(support)
    inside = [(y, a) for y, a in zip(labels, coded, strict=True) if 0 <= a <= 4]
    mae = float(m.mean_absolute_error(found.counts))
    if inside:
        assert mae == pytest.approx(mean_absolute_error(*zip(*inside, strict=True)))
    else:
        assert math.isnan(mae)
    near = sum(abs(y - a) <= 1 for y, a in inside) / len(labels)
    assert float(m.within_one_star(found.counts)) == pytest.approx(near)


def test_the_published_figures_come_out_of_stray_labels() -> None:
    labels = np.repeat(LABELS, 10_000)

    def published(right: float, strays: list[int]) -> dict[str, float]:
        # The same count of wrong answers in each class, so that every class has the same F1.
        answers = labels.copy()
        for label in LABELS:
            rows = np.flatnonzero(labels == label)[: round((1 - right) * 10_000)]
            answers[rows] = (label + 1 + np.arange(len(rows)) % 4) % 5
        answers[: len(strays)] = strays
        counts = tally(labels, answers).counts
        honest = {k: float(v) for k, v in m.f1_honest(counts).items()}
        assert honest["macro"] == pytest.approx(honest["micro"], abs=1e-3)
        return {k: round(float(v), 3) for k, v in m.f1_report(counts).items()}

    assert published(0.695, [17]) == {"micro": 0.695, "macro": 0.579, "weighted": 0.695}
    base = published(0.403, [5, 6, 7, 8, 9, 10])
    assert (base["macro"], base["weighted"]) == (0.183, 0.403)


def test_micro_f1_exceeds_accuracy_by_the_unparsed_share() -> None:
    labels, answers = CASES["unparsed"]
    counts = tally(labels, answers).counts
    share = answers.count(None) / len(answers)
    expected = float(m.accuracy(counts)) / (1 - share / 2)
    assert float(m.f1_honest(counts)["micro"]) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 37, 2000])
def test_calibration_is_scikit_learns(rows: int) -> None:
    rng = np.random.default_rng(rows)
    labels = rng.integers(0, 5, rows)
    scores = 2 * rng.normal(size=(rows, 5))
    probabilities = m.softmax(scores)
    assert probabilities == pytest.approx(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
    assert m.softmax(scores + 1000) == pytest.approx(probabilities)  # no overflow
    whole = m.Calibration(10, 5)
    for part in np.array_split(np.arange(rows), 3):
        whole.add(probabilities[part], labels[part])
    found = whole.summary()
    assert found is not None
    confidence = probabilities.max(1)
    right = (probabilities.argmax(1) == labels).astype(int)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    filled = [b for b in found["bins"] if b["rows"]]
    assert [b["accuracy"] for b in filled] == pytest.approx(list(accuracy))
    assert [b["confidence"] for b in filled] == pytest.approx(list(mean))
    weights = np.array([b["rows"] for b in filled]) / rows
    assert found["ece"] == pytest.approx((weights * np.abs(accuracy - mean)).sum())
    expected = brier_score_loss(labels, probabilities, labels=LABELS, scale_by_half=False)
    assert found["brier"] == pytest.approx(expected)
    expectation = np.abs(probabilities @ np.arange(5) - labels).mean()
    assert found["expected_star_error"] == pytest.approx(expectation)


def test_calibration_without_scores_is_undefined() -> None:
    assert m.Calibration(15, 5).summary() is None


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (0, 9), (5, 5), (3, 9), (120, 80), (900, 1100)])
def test_mcnemar_is_scipys(pair: Any) -> None:
    found = mcnemar(*pair)
    total = sum(pair)
    exact = stats.binomtest(pair[0], total).pvalue if total else 1.0
    assert found["exact_p"] == pytest.approx(exact, rel=1e-9)
    assert found["log10_exact_p"] == pytest.approx(math.log10(exact), abs=1e-9)
    chi2 = max(abs(pair[0] - pair[1]) - 1, 0) ** 2 / total if total else 0
    assert found["chi2"] == pytest.approx(chi2)
    assert found["chi2_p"] == pytest.approx(stats.chi2.sf(chi2, 1))


def test_mcnemar_does_not_underflow_in_its_logarithm() -> None:
    assert mcnemar(0, 10_000)["log10_exact_p"] == pytest.approx((1 - 10_000) * math.log10(2))


def test_bootstrap_agrees_with_scipys_and_repeats_with_its_seed() -> None:
    labels, answers = (np.array(part) for part in CASES["plain"])
    counts = tally(labels, answers).counts
    found = bootstrap_intervals(counts, headline, resamples=4000, seed=1)
    assert found == bootstrap_intervals(counts, headline, resamples=4000, seed=1)
    assert found != bootstrap_intervals(counts, headline, resamples=4000, seed=2)

    def macro(truth: Any, said: Any) -> Any:
        return float(m.f1_honest(tally(truth, said).counts)["macro"])

    expected = stats.bootstrap(
        (labels, answers), macro, paired=True, vectorized=False, method="percentile",
        n_resamples=1500, rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert found["f1.macro"] == pytest.approx(list(expected), abs=0.006)
    p = float(m.accuracy(counts))
    half = 1.96 * math.sqrt(p * (1 - p) / len(labels))
    assert found["accuracy"] == pytest.approx([p - half, p + half], abs=0.006)


def test_resamples_are_drawn_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked for, each of all rows, whatever fits at once."""
    counts = np.array([[7, 0], [2, 1]])
    monkeypatch.setattr("yelp_hpc.evaluation.significance._CELLS_AT_ONCE", 4 * 30)
    drawn: list[Any] = []

    def statistics(cells: Any) -> Any:
        drawn.append(cells)
        return {"first": cells[:, 0, 0] / 10, "never": np.full(len(cells), np.nan)}

    found = bootstrap_intervals(counts, statistics, resamples=100, seed=3)
    assert [part.shape for part in drawn] == [(30, 2, 2)] * 3 + [(10, 2, 2)]
    every = np.concatenate(drawn)
    assert (every.sum((1, 2)) == 10).all() and not every[:, 0, 1].any()
    assert every.dtype == np.int64
    ends = np.quantile(every[:, 0, 0] / 10, [0.025, 0.975]).tolist()
    assert found == {"first": pytest.approx(ends), "never": None}
    wide = bootstrap_intervals(counts, statistics, resamples=100, seed=3, level=0.5)["first"]
    assert wide == pytest.approx(np.quantile(every[:, 0, 0] / 10, [0.25, 0.75]).tolist())
    monkeypatch.setattr("yelp_hpc.evaluation.significance._CELLS_AT_ONCE", 3)
    drawn.clear()
    bootstrap_intervals(counts, statistics, resamples=2, seed=3)
    assert [part.shape for part in drawn] == [(1, 2, 2)] * 2
    nothing = np.zeros((2, 2), dtype=np.int64)
    assert bootstrap_intervals(nothing, statistics, resamples=2, seed=3)["first"] == [0.0, 0.0]


def test_intervals_of_undefined_statistics_are_null_and_the_rest_is_json(case: Any) -> None:
    counts = tally(*case).counts
    found = headline_intervals(counts, ordinal=True, resamples=100, seed=0, report=True)
    json.dumps(found, allow_nan=False)
    parsed = any(answer is not None for answer in case[1])
    assert (found["f1_report.macro"] is not None) == parsed
    assert found["accuracy"] is not None


def test_pairs_are_counted_row_by_row() -> None:
    rng = np.random.default_rng(8)
    labels, base, tuned = rng.integers(0, 5, 900), rng.integers(0, 7, 900), rng.integers(0, 7, 900)
    joint = joint_table(labels, base, tuned)
    right = (base == labels), (tuned == labels)
    assert discordant(joint) == {
        "both_right": int((right[0] & right[1]).sum()),
        "only_base_right": int((right[0] & ~right[1]).sum()),
        "only_tuned_right": int((~right[0] & right[1]).sum()),
        "both_wrong": int((~right[0] & ~right[1]).sum()),
    }
    difference = paired_statistics(joint)
    assert float(difference["accuracy"]) == pytest.approx(right[1].mean() - right[0].mean())
    expected = [
        f1_score(labels, said, labels=LABELS, average="macro") for said in (base, tuned)
    ]  # fmt: skip
    assert float(difference["f1.macro"]) == pytest.approx(expected[1] - expected[0])


CLASSES = [2, 3, 20, 150]
Many = tuple[int, list[int], list[int | None], np.ndarray]


@pytest.fixture(params=CLASSES)
def many(request: pytest.FixtureRequest) -> Many:
    """Truth, answers and logits of K classes, a third of which never occur in the truth."""
    count = request.param
    rng = np.random.default_rng(count)
    seen = sorted(rng.choice(count, max(2, 2 * count // 3), replace=False).tolist())
    labels, answers = random_answers(count, 700, 0.1, 0, seen)
    answers = [a if a is None or rng.random() < 0.9 else int(rng.integers(count)) for a in answers]
    return count, labels, answers, 2 * rng.normal(size=(700, count))


def test_every_statistic_of_k_classes_is_scikit_learns(many: Many) -> None:
    count, labels, answers, _ = many
    names = list(range(count))
    coded = [-1 if a is None else a for a in answers]
    table = tally(labels, answers, count).counts
    inside = [(y, a) for y, a in zip(labels, coded, strict=True) if a >= 0]
    truth, said = (list(part) for part in zip(*inside, strict=True))
    for average in m.AVERAGES:
        honest = f1_score(labels, coded, labels=names, average=average, zero_division=0)
        report = f1_score(truth, said, average=average, zero_division=0)
        assert float(m.f1_honest(table)[average]) == pytest.approx(honest, abs=1e-12)
        assert float(m.f1_report(table)[average]) == pytest.approx(report, abs=1e-12)
    each = precision_recall_fscore_support(labels, coded, labels=names, zero_division=0)
    rows = m.per_class(table)
    for key, expected in zip(("precision", "recall", "f1", "support"), each, strict=True):
        assert [row[key] for row in rows] == pytest.approx(list(expected)), key
    assert (table[:, :count] == confusion_matrix(truth, said, labels=names)).all()
    assert float(m.accuracy(table)) == pytest.approx(accuracy_score(labels, coded))
    assert float(m.mean_absolute_error(table)) == pytest.approx(mean_absolute_error(truth, said))
    kappa = cohen_kappa_score(truth, said, labels=names, weights="quadratic")
    assert float(m.quadratic_kappa(table)) == pytest.approx(kappa)
    best = m.majority(table.sum(1))
    constant = [best["label"]] * len(labels)
    assert best["accuracy"] == pytest.approx(accuracy_score(labels, constant))
    macro = f1_score(labels, constant, labels=names, average="macro", zero_division=0)
    assert best["f1_macro"] == pytest.approx(macro)


def test_top_k_and_calibration_of_k_classes_are_scikit_learns(many: Many) -> None:
    count, labels, _, scores = many
    whole = m.Calibration(10, count)
    probabilities = m.softmax(scores)
    for part in np.array_split(np.arange(len(labels)), 4):
        whole.add(probabilities[part], np.array(labels)[part])
    found, summary = whole.top_k(), whole.summary(ordinal=False)
    assert found is not None
    assert summary is not None
    assert list(found) == [str(k) for k in m.TOP if k < count]
    for k, value in found.items():
        expected = top_k_accuracy_score(labels, scores, k=int(k), labels=range(count))
        assert value == pytest.approx(expected)
    brier = np.mean((probabilities - np.eye(count)[labels]) ** 2) * count
    assert summary["brier"] == pytest.approx(brier)
    assert "expected_star_error" not in summary


def test_the_sums_of_occupied_cells_are_those_of_the_whole_table(many: Many) -> None:
    count, labels, answers, _ = many
    for end in ([-7, -7, 9999], [None, None, None]):
        table = tally(labels, [*answers[:-3], *end], count).counts
        truth, column = np.nonzero(table)
        found, expected = m.cell_sums(table[truth, column], truth, column, count), m.sums(table)
        for name, value in vars(expected).items():
            own = getattr(found, name)
            assert np.array_equal(own, value) and own.dtype == value.dtype == np.int64, name
    again = headline_intervals(table, ordinal=True, resamples=150, seed=4)
    assert again == bootstrap_intervals(table, headline, resamples=150, seed=4)


def test_a_class_that_never_occurs_counts_as_zero_in_the_macro(many: Many) -> None:
    count, labels, answers, _ = many
    table = tally(labels, answers, count).counts
    absent = table.sum(1) == 0
    assert absent.any() or count < 3
    assert all(row["f1"] == 0 for row, gone in zip(m.per_class(table), absent, strict=True) if gone)
