"""Which rows are used for what: pure, and the same for the same seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from yelp_hpc.config import YELP, DataConfig
from yelp_hpc.errors import RequestError


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
) -> Splits:
    """Draw the test set, then the training rows without replacement, then split off validation.

    Args:
        labels: label of each row of the training source.
        test_labels: label of each row of the test source; None draws the test set from training.
        seed: of the draw, where `data.seed` does not give one of its own.
        names: of the classes; labels count in them.

    Raises:
        RequestError: fewer rows than asked for, or a set that is empty or holds one class only.
    """
    rng = random.Random(seed if data.seed is None else data.seed)
    if test_labels is not None:
        test = _draw(
            rng, range(len(test_labels)), test_labels, data.test_rows, data, "test_rows", names
        )
        rest = list(range(len(labels)))
    else:
        test = _draw(rng, range(len(labels)), labels, data.test_rows, data, "test_rows", names)
        taken = set(test)
        rest = [row for row in range(len(labels)) if row not in taken]
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
        return rng.sample(list(candidates), wanted)
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


def duplicates(train: Sequence[str], test: Sequence[str]) -> int:
    """How many test texts stand in training too, letter case and spacing aside."""
    seen = {text_key(text) for text in train}
    return sum(text_key(text) in seen for text in test)


def text_key(text: str) -> bytes:
    """A hash that is equal for texts that differ in letter case and spacing only."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()
