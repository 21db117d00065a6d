"""Shards cover every row once, in equal shares of tokens; what is missing is named."""

from __future__ import annotations

import random
from array import array

import pytest

from yelp_hpc.inference.shards import missing_shards, plan_shards, plan_windows, spans


def skewed_lengths(rows: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [min(1024, 1 + int(draw.lognormvariate(5, 1))) for _ in range(rows)]


@pytest.mark.parametrize("shards", [1, 2, 7, 64, 999, 1000])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_row_is_in_exactly_one_shard_and_tokens_are_balanced(shards: int, seed: int) -> None:
    lengths = skewed_lengths(1000, seed)
    plan = plan_shards(lengths, shards)
    assert len(plan) == shards
    assert [row for rows in plan for row in rows] == list(range(1000))
    mean = sum(lengths) / shards
    for rows in plan:
        assert abs(sum(lengths[row] for row in rows) - mean) <= max(lengths)


def test_the_order_of_the_rows_by_length_does_not_unbalance_the_shards() -> None:
    lengths = sorted(skewed_lengths(5000, 3))  # equal counts would give the last shard the most
    tokens = [sum(lengths[row] for row in rows) for rows in plan_shards(lengths, 8)]
    assert max(tokens) - min(tokens) <= 2 * max(lengths)


def test_more_shards_than_rows_leaves_some_empty() -> None:
    plan = plan_shards([10, 10, 10], 8)
    assert len(plan) == 8
    assert [row for rows in plan for row in rows] == [0, 1, 2]


def test_no_rows_gives_empty_shards() -> None:
    assert plan_shards([], 3) == [range(0, 0)] * 3


def test_the_plan_is_the_same_for_every_kind_of_sequence() -> None:
    lengths = skewed_lengths(300, 4)
    assert plan_shards(array("q", lengths), 5) == plan_shards(lengths, 5)


@pytest.mark.parametrize(
    ("lengths", "shards", "words"),
    [([1, 2], 0, "shards must be at least 1, not 0"), ([1, 0, 2], 2, "a row has no tokens")],
)
def test_impossible_requests_are_refused(lengths: list[int], shards: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        plan_shards(lengths, shards)


def test_cuts_by_hand() -> None:
    """A row belongs to the shard that holds the middle of its tokens."""
    assert plan_shards([1, 1, 1, 1], 2) == [range(2), range(2, 4)]
    assert plan_shards([4, 1, 1, 2], 2) == [range(1), range(1, 4)]
    assert plan_shards([1, 2, 1], 2) == [range(1), range(1, 3)]  # the middle is the next one's
    assert plan_shards([1, 9], 3) == [range(1), range(1, 2), range(2, 2)]
    assert plan_shards([9, 1], 3) == [range(0), range(1), range(1, 2)]
    assert plan_windows([3, 4, 5, 1, 9, 2], range(6), 8) == [
        range(2), range(2, 4), range(4, 5), range(5, 6)
    ]  # fmt: skip
    assert plan_windows([3, 5, 5], range(3), 8) == [range(2), range(2, 3)]
    assert plan_windows([5, 4, 4], range(3), 8) == [range(1), range(1, 3)]


@pytest.mark.parametrize("tokens", [1, 50, 1000, 10**9])
def test_windows_cover_the_shard_within_their_budget(tokens: int) -> None:
    lengths = skewed_lengths(400, 5)
    rows = range(37, 391)
    windows = plan_windows(lengths, rows, tokens)
    assert [row for window in windows for row in window] == list(rows)
    for window in windows:
        assert len(window) == 1 or sum(lengths[row] for row in window) <= tokens
    assert plan_windows(lengths, range(5, 5), tokens) == []


def test_what_is_missing_is_named() -> None:
    assert missing_shards([3, 0, 1], 6) == [2, 4, 5]
    assert missing_shards(range(4), 4) == []
    assert spans([5, 0, 2, 1, 9, 8, 2]) == "0-2, 5, 8-9"
    assert spans([]) == ""
    assert spans([7]) == "7"
    assert spans([0, 1]) == "0-1"
