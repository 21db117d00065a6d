"""Which rows are used for what: pure, and the same for the same seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yelp_hpc.config import DataConfig
from yelp_hpc.errors import RequestError
from yelp_hpc.task import YELP


@dataclass(frozen=True)
class Splits:
    """Row ids of each set.

    `test` counts in the test source, or in the training source when the
    test set was drawn from it; the other two count in the training source.
    """

    train: list[int]
    validation: list[int]
    test: list[int]


def split_rows(
    labels: Sequence[int],
    test_labels: Sequence[int] | None,
    data: DataConfig,
    seed: int,
    names: Sequence[str] = YELP.labels,
    unusable: Callable[[list[int]], NDArray[np.bool_]] | None = None,
) -> Splits:
    """Draw the test set, then the training rows without replacement, then split off validation.

    Args:
        labels: label of each row of the training source.
        test_labels: label of each row of the test source; None draws the test set from training.
        seed: of the draw, where `data.seed` does not give one of its own.
        names: of the classes; labels count in them.
        unusable: given the test rows, which rows of the training source are left out, `[rows]`.

    Raises:
        RequestError: fewer rows than asked for, or a set that is empty or holds one class only.
    """
    rng = random.Random(seed if data.seed is None else data.seed)
    if test_labels is not None:
        test = _draw(
            rng, range(len(test_labels)), test_labels, data.test_rows, data, "test_rows", names
        )
        rest: Sequence[int] = range(len(labels))
    else:
        test = _draw(rng, range(len(labels)), labels, data.test_rows, data, "test_rows", names)
        taken = set(test)
        rest = [row for row in range(len(labels)) if row not in taken]
    if unusable is not None:
        out = unusable(test)
        rest = [row for row in rest if not out[row]]
    drawn = _draw(rng, rest, labels, data.train_rows, data, "train_rows", names)
    rng.shuffle(drawn)
    cut = round(len(drawn) * data.validation_share)
    splits = Splits(sorted(drawn[cut:]), sorted(drawn[:cut]), sorted(test))
    for name, rows, source in (
        ("training", splits.train, labels),
        ("test", splits.test, labels if test_labels is None else test_labels),
    ):
        classes = {source[row] for row in rows}
        if not rows:
            raise RequestError(f"the {name} set is empty; give more rows or lower data.test_rows")
        if name == "training" and len(classes) < 2:
            raise RequestError(
                f"the training set holds label {names[classes.pop()]} only; "
                "a classifier needs two or more"
            )
    return splits


def _draw(
    rng: random.Random,
    candidates: Sequence[int],
    labels: Sequence[int],
    wanted: int | None,
    data: DataConfig,
    key: str,
    names: Sequence[str],
) -> list[int]:
    if wanted is None:
        return list(candidates)
    if wanted > len(candidates):
        raise RequestError(
            f"data.{key} asks for {wanted} rows, but there are only {len(candidates)}"
            + (" left beside the test set" if key == "train_rows" and not data.test else "")
        )
    if not data.balanced:
        return rng.sample(candidates, wanted)
    drawn: list[int] = []
    for label, name in enumerate(names):
        share = wanted // len(names) + (label < wanted % len(names))
        members = [row for row in candidates if labels[row] == label]
        if share > len(members):
            raise RequestError(
                f"data.balanced with data.{key}={wanted} needs {share} rows of label {name}, "
                f"but there are only {len(members)}"
            )
        drawn += rng.sample(members, share)
    return drawn


def text_keys(texts: Iterable[str]) -> NDArray[np.uint64]:
    """A number a text, `[n]`, equal for texts that differ in letter case and spacing only."""
    numbers = (int.from_bytes(text_key(text)[:8], "little") for text in texts)
    return np.fromiter(numbers, dtype=np.uint64)


def duplicates(train: NDArray[np.uint64], test: NDArray[np.uint64]) -> int:
    """How many test texts stand in training too, by their keys."""
    return int(np.isin(test, train).sum())


def conflicting(keys: NDArray[np.uint64], labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows have a text that stands there with another label too, `[n]`."""
    both = np.unique(np.stack([keys, labels.astype(np.uint64)]), axis=1)
    texts, labels_of = np.unique(both[0], return_counts=True)
    return np.isin(keys, texts[labels_of > 1])


def text_key(text: str) -> bytes:
    """A hash that is equal for texts that differ in letter case and spacing only."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()
