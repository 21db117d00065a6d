"""The plan of the data: every row once an epoch, the same batches for any world size."""

import random

import pytest

from yelp_hpc.data.packing import (
    DataPlan,
    deal,
    epoch_order,
    largest_microbatch,
    plan_microbatches,
    shared_prefix,
)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"), [(1, 4, 2), (10, 3, 3), (32, 8, 1), (7, 9, 2)]
)
def test_every_row_once_an_epoch(rows: int, batch: int, epochs: int) -> None:
    plan = DataPlan(rows, batch, epochs, seed=3)
    batches = [plan.batch(step) for step in range(plan.steps)]
    assert plan.steps == epochs * -(-rows // batch)
    for epoch in range(epochs):
        mine = batches[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(row for b in mine for row in b) == list(range(rows))
        assert all(len(b) == batch for b in mine[:-1])
        assert len(mine[-1]) == (rows % batch or batch)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = {epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert epoch_order(50, 0, 1) == epoch_order(50, 0, 1)
    # Fixed for ever: a run resumed under another Python must see the same batches.
    assert epoch_order(8, 42, 0) == ORDER_8_42_0


ORDER_8_42_0 = (6, 3, 5, 0, 1, 4, 7, 2)


def test_order_is_uniform() -> None:
    """Where row 0 lands over many seeds: chi-square with 9 degrees of freedom, far tail."""
    counts = [0] * 10
    for seed in range(2000):
        counts[epoch_order(10, seed, 0).index(0)] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 35


def test_max_steps_and_bounds() -> None:
    plan = DataPlan(100, 10, 3, seed=0, max_steps=12)
    assert plan.steps == 12
    for step in (-1, 12):
        with pytest.raises(IndexError, match=rf"^step {step} is outside 0\.\.11$"):
            plan.batch(step)
    with pytest.raises(ValueError, match="at least 1"):
        DataPlan(0, 10, 1, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_dealing_is_a_partition_with_equal_work(world_size: int) -> None:
    draw = random.Random(world_size)
    for _ in range(50):
        lengths = [draw.randint(1, 900) for _ in range(draw.randint(1, 40))]
        dealt = deal(lengths, world_size)
        assert len(dealt) == world_size
        assert sorted(i for rank in dealt for i in rank) == list(range(len(lengths)))
        loads = [sum(lengths[i] for i in rank) for rank in dealt]
        assert max(loads) - min(loads) <= max(lengths)
    # A batch of the report's size is dealt to within a few percent.
    lengths = [draw.randint(40, 900) for _ in range(32)]
    loads = [sum(lengths[i] for i in rank) for rank in deal(lengths, world_size)]
    assert max(loads) <= 1.1 * sum(lengths) / world_size


def test_shared_prefix_leaves_every_sequence_a_prompt_token() -> None:
    assert shared_prefix([5, 6, 7], shortest=9) == 3
    assert shared_prefix([5, 6, 7], shortest=3) == 2
    assert shared_prefix([], shortest=3) == 0


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("max_tokens", [64, 300, 10_000])
def test_no_microbatch_is_larger_than_foretold(world_size: int, max_tokens: int) -> None:
    draw = random.Random(1)
    lengths = [draw.randint(2, 90) for _ in range(50)]
    plan = DataPlan(50, 8, 1, seed=4)
    largest = 0
    for step in range(plan.steps):
        own = [lengths[row] for row in plan.batch(step)]
        for rank in deal(own, world_size):
            for group in plan_microbatches([own[i] for i in rank], max_tokens, 10):
                largest = max(largest, 10 + sum(own[rank[i]] for i in group))
    foretold = largest_microbatch(plan, lengths, world_size, max_tokens, 10)
    assert largest <= foretold <= max(max_tokens, 100)


def test_deals_and_groups_are_those_of_the_rule_written_out() -> None:
    """Longest first, ties in their order, each to the rank with the fewest tokens so far."""
    lengths = [5, 9, 5, 2, 9, 1]
    assert deal(lengths, 1) == [[1, 4, 0, 2, 3, 5]]
    assert deal(lengths, 2) == [[1, 0, 3], [4, 2, 5]]
    assert deal(lengths, 4) == [[1], [4], [0, 3], [2, 5]]
    assert deal([7], 3) == [[0], [], []]
    with pytest.raises(ValueError, match=r"^world_size must be at least 1$"):
        deal(lengths, 0)
    assert plan_microbatches(lengths, 18, 4) == [[1], [4, 0], [2, 3, 5]]
    assert plan_microbatches(lengths, 17, 4) == [[1], [4], [0, 2, 3, 5]]
    assert plan_microbatches(lengths, 3, 4) == [[1], [4], [0], [2], [3], [5]]
    assert plan_microbatches([], 18, 4) == []


def test_the_largest_microbatch_is_bounded_by_share_budget_and_longest() -> None:
    plan = DataPlan(4, 4, 1, seed=0)
    lengths = [10, 20, 30, 40]
    assert largest_microbatch(plan, lengths, 1, 10_000, 7) == 7 + 100  # all of a step
    assert (
        largest_microbatch(plan, lengths, 2, 10_000, 7) == 7 + 90
    )  # an equal part and the longest
    assert largest_microbatch(plan, lengths, 4, 10_000, 7) == 7 + 65
    assert largest_microbatch(plan, lengths, 3, 10_000, 7) == 7 + 73  # 100 / 3 + 40, cut off
    assert largest_microbatch(plan, lengths, 4, 60, 7) == 60  # the budget
    assert largest_microbatch(plan, lengths, 4, 20, 7) == 7 + 40  # never cuts a sequence
    two = DataPlan(4, 2, 1, seed=0)
    steps = [sum(lengths[row] for row in two.batch(step)) for step in range(2)]
    assert largest_microbatch(two, lengths, 1, 10_000, 7) == 7 + max(steps)
    assert largest_microbatch(DataPlan(4, 2, 1, 0, max_steps=1), lengths, 1, 999, 7) == 7 + max(
        steps[0], 40
    )
