"""The plan of the training data: rows of each step, their ranks and their micro-batches.

A pure function of (seed, epoch, step): nothing is stored, so a resumed run finds its place in the
data by its step number alone. The sequence of global batches never depends on the world size or on
how sequences are packed. Reads and writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

# What repeating the shared prefix in each micro-batch may cost, of a step's tokens …
PIECES_COST = 0.02
# … and what a further micro-batch costs at least: its kernels' starts, in tokens.
_PIECE_TOKENS = 16


@dataclass(frozen=True)
class DataPlan:
    """`rows` training rows, shuffled anew each epoch, cut into global batches of `global_batch`.

    The last batch of an epoch may be smaller. Steps count from 0 over all epochs.
    """

    rows: int
    global_batch: int
    epochs: int
    seed: int
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.global_batch < 1 or self.epochs < 1:
            raise ValueError("rows, global_batch and epochs must be at least 1")

    @property
    def steps_per_epoch(self) -> int:
        """The last global batch of an epoch may be smaller."""
        return -(-self.rows // self.global_batch)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.steps_per_epoch * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def batch(self, step: int) -> tuple[int, ...]:
        """The rows (0 to rows-1) of step `step`'s global batch.

        Raises:
            IndexError: a step outside the run.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside 0..{self.steps - 1}")
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.global_batch
        return epoch_order(self.rows, self.seed, epoch)[first : first + self.global_batch]


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of `range(rows)`: rows in the order of a hash of (seed, epoch, row).

    A hash and not a library's generator: the order then is the same under every version of
    Python and numpy, so a run may be resumed in another image.
    """
    key = f"{seed}/{epoch}".encode()

    def rank_of(row: int) -> bytes:
        return hashlib.blake2b(row.to_bytes(8, "little"), digest_size=16, key=key).digest()

    return tuple(sorted(range(rows), key=rank_of))


def deal(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal sequences (by index) to ranks so that every rank has nearly equal tokens.

    Longest first, each to the rank with the fewest tokens so far (Graham 1969, "Bounds on
    multiprocessing timing anomalies": the largest load is at most 4/3 of the best possible). Two
    loads differ by at most the longest sequence. With fewer sequences than ranks some get none.
    """
    if world_size < 1:
        raise ValueError("world_size must be at least 1")
    loads = [0] * world_size
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        dealt[rank].append(i)
        loads[rank] += lengths[i]
    return dealt


def plan_microbatches(
    lengths: Sequence[int], max_tokens: int, prefix_length: int
) -> list[list[int]]:
    """Group sequences so that the shared prefix and their remainders fit `max_tokens`.

    `lengths` are those of the remainders; the groups hold indices into them. Longest first,
    neighbours in length together, so that a group needs little padding inside attention. A sequence
    over the budget is a group of its own. Deterministic: ties keep their order.
    """
    groups: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and used + lengths[i] <= max_tokens:
            groups[-1].append(i)
            used += lengths[i]
        else:
            groups.append([i])
            used = prefix_length + lengths[i]
    return groups


def cut_batch(
    lengths: Sequence[int], pieces: int, max_tokens: int, prefix_length: int, more: int = 0
) -> list[list[int]]:
    """The micro-batches of a global batch (by index; `lengths` without the prefix).

    They are the same for any number of ranks, which is why every number of them trains the same
    bytes: `pieces` of nearly equal tokens, then `more` and `more` until each fits `max_tokens`. 0:
    as many again, so that ranks that share them evenly once share them evenly always. A sequence
    over the budget is a micro-batch of its own.
    """
    most, more = max(max_tokens - prefix_length, 1), more or pieces
    # more pieces than sequences are empty ones
    least = pieces + more * max(0, (sum(lengths) // most - pieces) // more)
    count = min(least, max(pieces, len(lengths)))
    while True:
        cut = [piece for piece in deal(lengths, count) if piece]
        if all(len(piece) == 1 or sum(lengths[i] for i in piece) <= most for piece in cut):
            return cut
        count += more


def default_pieces(batch_tokens: float, prefix_length: int, global_batch: int) -> int:
    """Pieces of a global batch that so many ranks can share: 1, 2, 4 or 8.

    Each further piece computes the shared prefix once more: as many as cost 2 % at most.
    `batch_tokens`: of a global batch on average, without the prefix.
    """
    price = max(prefix_length, _PIECE_TOKENS)
    allowed = 1 + PIECES_COST * (batch_tokens + prefix_length) / price
    return next(n for n in (8, 4, 2, 1) if n == 1 or n <= min(allowed, global_batch))


def more_pieces(cuda: bool) -> int:
    """`more` of `cut_batch`: GPUs share micro-batches evenly, a CPU, mostly alone, has few."""
    return 0 if cuda else 1


def microbatch_tokens(
    plan: DataPlan,
    lengths: Sequence[int],
    pieces: int,
    max_tokens: int,
    prefix_length: int,
    more: int = 0,
) -> Iterator[list[int]]:
    """Tokens of each micro-batch, the shared prefix included, of step after step.

    `lengths`: tokens of each row behind the prefix.
    """
    for step in range(plan.steps):
        own = [lengths[row] for row in plan.batch(step)]
        cut = cut_batch(own, pieces, max_tokens, prefix_length, more)
        yield [prefix_length + sum(own[i] for i in piece) for piece in cut]


def shared_prefix(prefix: Sequence[int], shortest: int) -> int:
    """How many prompt tokens may be computed once for all sequences of a micro-batch.

    `shortest`: the fewest tokens of a prompt. A sequence keeps at least its last prompt token for
    itself, because its output is the sequence's own answer.
    """
    return max(0, min(len(prefix), shortest - 1))
