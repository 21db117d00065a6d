"""Which test rows a shard holds, and which shards or rows are missing.

Pure: token counts and row numbers in, ranges out. A shard is a run of consecutive rows of the test
set, so a job reads its own part of the file alone; the cuts are made by tokens, so that shards of
long and of short reviews take equally long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from yelp_hpc.rundir.attempts import task_text


def plan_shards(lengths: Sequence[int], shards: int) -> list[range]:
    """Cut the rows `0..len(lengths)-1` into `shards` consecutive ranges of about equal tokens.

    A row belongs to the shard that holds the middle of its tokens, so no shard's tokens differ from
    the mean by more than the longest row. Integer arithmetic alone: every job that plans finds the
    same cuts. With fewer rows than shards some ranges are empty.

    Args:
        lengths: tokens of each row, in the order of the test set.

    Raises:
        ValueError: `shards` is not positive, or a length is.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, not {shards}")
    if any(length < 1 for length in lengths):
        raise ValueError("a row has no tokens")
    total = sum(lengths)
    starts = [0]
    before = 0
    for row, length in enumerate(lengths):
        shard = (2 * before + length) * shards // (2 * total)
        while len(starts) <= shard:
            starts.append(row)
        before += length
    starts += [len(lengths)] * (shards + 1 - len(starts))
    return [range(start, stop) for start, stop in pairwise(starts)]


def plan_windows(lengths: Sequence[int], rows: range, tokens: int) -> list[range]:
    """Cut a shard's rows into consecutive windows of at most `tokens` tokens.

    A window is what is read, sorted by length and batched at once, so it bounds the memory of a
    shard. A row longer than `tokens` is a window of its own.
    """
    windows: list[range] = []
    start, used = rows.start, 0
    for row in rows:
        if used and used + lengths[row] > tokens:
            windows.append(range(start, row))
            start, used = row, 0
        used += lengths[row]
    if start < rows.stop:
        windows.append(range(start, rows.stop))
    return windows


def missing_shards(found: Iterable[int], shards: int) -> list[int]:
    """The shard numbers below `shards` that are not in `found`, ascending."""
    present = set(found)
    return [shard for shard in range(shards) if shard not in present]


def spans(numbers: Iterable[int]) -> str:
    """Numbers for a person, runs joined and sorted: `[0, 1, 2, 5]` → `0-2, 5`."""
    return task_text(tuple(sorted(set(numbers)))).replace(",", ", ")
