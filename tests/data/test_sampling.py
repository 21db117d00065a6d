"""Sampling: uniform, disjoint, the same for the same seed; too few rows are said."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from yelp_hpc.config import DataConfig
from yelp_hpc.data.sampling import Splits, conflicting, duplicates, split_rows, text_keys
from yelp_hpc.errors import RequestError


def data(**values: object) -> DataConfig:
    return DataConfig.model_validate(
        {"source": "file", "train": "a.csv", "test": "b.csv", **values}
    )


def test_splits_are_disjoint_and_of_the_asked_sizes() -> None:
    labels = [i % 5 for i in range(1000)]
    splits = split_rows(labels, None, data(test=None, train_rows=500, test_rows=100), seed=1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (470, 30, 100)
    assert len({*splits.train, *splits.validation, *splits.test}) == 600
    assert splits == split_rows(
        labels, None, data(test=None, train_rows=500, test_rows=100), seed=1
    )
    assert splits != split_rows(
        labels, None, data(test=None, train_rows=500, test_rows=100), seed=2
    )


def test_without_limits_every_row_is_used() -> None:
    labels = [i % 5 for i in range(103)]
    splits = split_rows(labels, labels[:40], data(), seed=0)
    assert sorted([*splits.train, *splits.validation]) == list(range(103))
    assert splits.test == list(range(40))


def test_the_draw_is_uniform() -> None:
    labels = [i % 5 for i in range(20)]
    counts: Counter[int] = Counter()
    for seed in range(2000):
        splits = split_rows(labels, labels, data(train_rows=5, validation_share=0), seed)
        counts.update(splits.train)
    # 2,000 draws of 5 out of 20: 500 each, standard deviation below 20
    assert all(abs(counts[row] - 500) < 100 for row in range(20))


def test_balanced_draws_equal_shares() -> None:
    labels = [0] * 500 + [1, 2, 3, 4] * 50
    splits = split_rows(
        labels, None, data(test=None, balanced=True, train_rows=100, test_rows=52), seed=3
    )
    assert Counter(labels[row] for row in splits.test) == {0: 11, 1: 11, 2: 10, 3: 10, 4: 10}
    drawn = Counter(labels[row] for row in [*splits.train, *splits.validation])
    assert set(drawn.values()) == {20}


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        ([0, 1] * 5, {"train_rows": 11}, "^data.train_rows asks for 11 rows, .* only 10$"),
        ([3] * 10, {}, "^the training set holds label 3 only; a classifier needs two or more$"),
        ([0, 1] * 20, {"balanced": True, "train_rows": 20}, "^data.balanced .* label 2, but"),
        (
            [0, 1] * 5,
            {"test": None, "test_rows": 10},
            "^the training set is empty; give more rows or lower data.test_rows$",
        ),
    ],
)
def test_too_little_data_is_said(
    labels: list[int], values: dict[str, object], expected: str
) -> None:
    config = data(**values)
    with pytest.raises(RequestError, match=expected):
        split_rows(labels, labels if config.test else None, config, seed=0)


def test_an_empty_test_set_is_said_and_one_class_in_it_is_none_of_our_business() -> None:
    labels = [0, 1] * 5
    with pytest.raises(RequestError, match=r"^the test set is empty; give more rows"):
        split_rows(labels, [], data(), seed=0)
    assert split_rows(labels, [3, 3], data(), seed=0).test == [0, 1]
    with pytest.raises(RequestError, match=r"^the training set holds label bad only;"):
        split_rows([1, 1, 1], labels, data(), seed=0, names=("good", "bad"))


def test_the_shares_of_the_sets_are_rounded_and_drawn_by_the_seed() -> None:
    labels = [i % 2 for i in range(10)]
    for share, validation in ((0.0, 0), (0.04, 0), (0.06, 1), (0.26, 3), (0.5, 5)):
        splits = split_rows(labels, labels, data(validation_share=share), seed=0)
        assert (len(splits.validation), len(splits.train)) == (validation, 10 - validation)
        assert splits.train == sorted(splits.train)
        assert splits.validation == sorted(splits.validation)
    # fixed for ever: a run is prepared again in another image
    splits = split_rows(labels, None, data(test=None, test_rows=3, validation_share=0.3), seed=7)
    assert splits == Splits(FIXED[0], FIXED[1], FIXED[2])


FIXED = ([0, 1, 7, 8, 9], [3, 4], [2, 5, 6])


def test_duplicates_ignore_case_and_spacing() -> None:
    keys = text_keys(["Good food", "bad"]), text_keys(["good  FOOD ", "fine", "bad"])
    assert duplicates(*keys) == 2


def test_equal_texts_with_two_labels_are_found() -> None:
    keys = text_keys(["a", "b", "A ", "b", "c"])
    found = conflicting(keys, np.array([0, 1, 2, 1, 1]))
    assert found.tolist() == [True, False, True, False, False]


def test_the_splits_seed_is_its_own() -> None:
    labels = [i % 5 for i in range(100)]
    drawn = [
        split_rows(labels, None, data(test=None, test_rows=20, seed=own), seed)
        for own, seed in ((None, 1), (1, 2), (None, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_unusable_rows_leave_training_and_not_the_test_set() -> None:
    labels = [i % 5 for i in range(100)]
    settings = data(test=None, test_rows=20)
    plain = split_rows(labels, None, settings, 3)
    out = np.arange(100) < 30
    fewer = split_rows(labels, None, settings, 3, unusable=lambda test: out)
    assert fewer.test == plain.test
    kept = {*range(30, 100)} - {*plain.test}
    assert {*fewer.train, *fewer.validation} == kept


def test_what_is_missing_is_said_in_numbers() -> None:
    labels = [0, 1, 2, 3, 4] * 4

    def said(test_labels: list[int] | None, **values: object) -> str:
        with pytest.raises(RequestError) as error:
            split_rows(labels, test_labels, data(**values), seed=0)
        return str(error.value)

    there = "but there are only"
    beside = f"data.train_rows asks for 18 rows, {there} 15 left beside the test set"
    assert said(None, test=None, test_rows=5, train_rows=18) == beside
    assert said(labels, train_rows=21) == f"data.train_rows asks for 21 rows, {there} 20"
    assert said(labels[:3], test_rows=4) == f"data.test_rows asks for 4 rows, {there} 3"
    assert said(None, test=None, test_rows=21) == f"data.test_rows asks for 21 rows, {there} 20"
    uneven = said([0] * 30 + [1, 2, 3, 4] * 3, balanced=True, test_rows=18)
    few = f"data.balanced with data.test_rows=18 needs 4 rows of label 1, {there} 3"
    assert uneven == few


def test_a_test_file_is_drawn_by_its_own_labels() -> None:
    labels, own = [0, 1, 2, 3, 4] * 10, [4] * 20 + [3] * 20 + [0, 1, 2] * 4
    splits = split_rows(labels, own, data(balanced=True, test_rows=20, train_rows=25), seed=1)
    assert Counter(own[row] for row in splits.test) == dict.fromkeys(range(5), 4)
    assert len(splits.train) + len(splits.validation) == 25
