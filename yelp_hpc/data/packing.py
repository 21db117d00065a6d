"""The plan of the training data: rows of each step, their ranks and their micro-batches.

A pure function of (seed, epoch, step): nothing is stored, so a resumed run finds its place in the
data by its step number alone. The sequence of global batches never depends on the world size or on
how sequences are packed. Reads and writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


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


def largest_microbatch(
    plan: DataPlan, lengths: Sequence[int], world_size: int, max_tokens: int, prefix_length: int
) -> int:
    """An upper bound on the tokens of any micro-batch of the run, the shared prefix included.

    `lengths`: tokens of each row behind the prefix. A rank's share of a step is at most an equal
    part and one sequence; the budget `max_tokens` cuts it, but never a single sequence.
    """
    share, longest = 0.0, max(lengths)
    for step in range(min(plan.steps, plan.steps_per_epoch)):
        own = [lengths[row] for row in plan.batch(step)]
        share = max(share, min(sum(own), sum(own) / world_size + max(own)))
    return prefix_length + max(longest, min(int(share), max_tokens - prefix_length))


def shared_prefix(prefix: Sequence[int], shortest: int) -> int:
    """How many prompt tokens may be computed once for all sequences of a micro-batch.

    `shortest`: the fewest tokens of a prompt. A sequence keeps at least its last prompt token for
    itself, because its output is the sequence's own answer.
    """
    return max(0, min(len(prefix), shortest - 1))
