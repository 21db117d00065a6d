"""The plan of the data: every row once an epoch, the same batches for any world size."""

import random

import pytest

from yelp_hpc.data.packing import (
    DataPlan,
    cut_batch,
    deal,
    default_pieces,
    epoch_order,
    microbatch_tokens,
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
    for wrong in ((0, 10, 1), (10, 0, 1), (10, 10, 0)):
        with pytest.raises(ValueError, match=r"^rows, global_batch and epochs must be at least 1$"):
            DataPlan(*wrong, seed=0)
    assert DataPlan(1, 1, 1, seed=0).batch(0) == (0,)
    assert DataPlan(100, 10, 3, seed=0, max_steps=99).steps == 30


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
    assert shared_prefix([5], shortest=0) == 0


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [64, 300, 10_000])
def test_a_cut_batch_fits_its_budget_in_equal_pieces(pieces: int, max_tokens: int) -> None:
    draw = random.Random(1)
    for _ in range(50):
        lengths = [draw.randint(2, 90) for _ in range(draw.randint(1, 24))]
        cut = cut_batch(lengths, pieces, max_tokens, 10)
        assert sorted(i for piece in cut for i in piece) == list(range(len(lengths)))
        loads = [sum(lengths[i] for i in piece) for piece in cut]
        assert all(
            len(piece) == 1 or 10 + load <= max_tokens
            for piece, load in zip(cut, loads, strict=True)
        )
        assert max(loads) - min(loads) <= max(lengths)
        assert len(cut) % pieces == 0 or len(cut) == len(lengths)


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize("max_tokens", [100, 101, 180, 260, 5000])
def test_a_batch_is_cut_into_the_fewest_pieces_that_fit(
    pieces: int, more: int, max_tokens: int
) -> None:
    draw = random.Random(max_tokens)
    for _ in range(30):
        lengths = [draw.randint(2, 90) for _ in range(draw.randint(8, 24))]

        def fits(cut: list[list[int]], lengths: list[int] = lengths) -> bool:
            loads = [sum(lengths[i] for i in piece) for piece in cut]
            return all(
                len(piece) < 2 or 10 + load <= max_tokens
                for piece, load in zip(cut, loads, strict=True)
            )

        counts = range(pieces, 10 * len(lengths), more or pieces)
        count = next(n for n in counts if fits(deal(lengths, n)))
        expected = [piece for piece in deal(lengths, count) if piece]
        assert cut_batch(lengths, pieces, max_tokens, 10, more) == expected


def test_cuts_at_the_edge_of_the_budget() -> None:
    assert cut_batch([30, 30, 30], 1, 100, 10) == [[0, 1, 2]]
    assert cut_batch([30, 30, 30], 1, 99, 10) == [[0, 2], [1]]
    assert cut_batch([30, 30, 30], 2, 10, 10) == [[0], [1], [2]]  # no room but for the prefix
    assert cut_batch([30, 1], 1, 20, 10) == [[0], [1]]  # longer than the budget: alone
    assert cut_batch([5], 4, 100, 10) == [[0]]
    assert cut_batch([], 4, 100, 10) == []


def test_pieces_cost_two_percent_of_a_step_at_most() -> None:
    for prefix, price in ((31, 31), (0, 16), (16, 16), (4, 16)):
        for pieces in (2, 4, 8):
            tokens = (pieces - 1) * 50 * price - prefix  # of which further prefixes are 2 %
            assert default_pieces(tokens, prefix, 64) == pieces
            assert default_pieces(tokens - 0.1, prefix, 64) == pieces // 2
            assert default_pieces(1e9, prefix, pieces) == pieces
            assert default_pieces(1e9, prefix, pieces - 1) == max(1, pieces // 2)
    assert default_pieces(32 * 169, 31, 32) == 4  # the report's run
    assert default_pieces(8 * 40, 31, 8) == 1
    assert default_pieces(1e6, 0, 64) == 8
    assert default_pieces(1e6, 0, 2) == 2


def test_tokens_of_micro_batches_are_those_of_the_steps() -> None:
    lengths = [5 + 3 * i % 40 for i in range(50)]
    plan = DataPlan(50, 8, 2, seed=4)
    steps = list(microbatch_tokens(plan, lengths, 2, 100, 10))
    assert len(steps) == plan.steps
    for step, work in enumerate(steps):
        own = [lengths[row] for row in plan.batch(step)]
        assert sum(work) == sum(own) + 10 * len(work)
        assert len(work) == len(cut_batch(own, 2, 100, 10))


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
