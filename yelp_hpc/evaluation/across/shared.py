"""The answers of several models to the test rows that all of them share, from any run directories.

A row is the same where its text and its label are; neither its number nor its run's settings say
so. Reads each run's `prepare/test.parquet` and its shards, complete or refused; writes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError, all_problems
from yelp_hpc.evaluation.coverage import Coverage, TestSet, coverages_of, refuse_unless_complete
from yelp_hpc.evaluation.metrics import Counts
from yelp_hpc.rundir.files import sha256_file
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.task import TaskConfig

Key = tuple[bytes, int, int]
"""Digest of a text, its label, and which of the equal rows it is."""


@dataclass(frozen=True)
class Entry:
    """One model of one run, with its answers to the shared rows."""

    run: RunPaths
    config: Config
    model: str
    codes: Counts
    """`[n]`, columns of a tally: a label, K unparsed, K + 1 an integer that is no label."""
    rows: int
    """Of its own test set, shared or not."""


@dataclass(frozen=True)
class Shared:
    """The rows that all entries answered."""

    task: TaskConfig
    labels: Counts
    """`[n]`, the truth."""
    entries: tuple[Entry, ...]

    @property
    def classes(self) -> int:
        """How many classes the task has."""
        return len(self.task.labels)


def read_shared(runs: Sequence[tuple[RunPaths, Config]]) -> Shared:
    """Read every model of every run on the rows that all runs share.

    Raises:
        RequestError: the tasks differ, no row is shared, or one text has other labels elsewhere.
        StageError: predictions are not complete, or an adapter is another run's.
    """
    task = runs[0][1].task
    if odd := [run for run, config in runs if not same_classes(task, config.task)]:
        listed = [f"{run.root}: {_classes(config.task)}" for run, config in runs]
        raise RequestError(
            all_problems(f"{odd[0].root} tells other classes apart than {runs[0][0].root}:", listed)
        )
    found: list[tuple[RunPaths, Config, Coverage]] = []
    for run, config in runs:
        for coverage in coverages_of(run, config):
            coverage.check()
            found.append((run, config, coverage))
    refuse_unless_complete([coverage for *_, coverage in found])
    tests = {str(coverage.run.root): coverage.test for *_, coverage in found}
    places = shared_places(list(tests.values()))
    by_run = dict(zip(tests, places, strict=True))
    entries = tuple(
        Entry(
            run,
            config,
            coverage.model,
            coverage.codes[by_run[str(run.root)]].astype(np.int64),
            len(coverage.codes),
        )
        for run, config, coverage in found
    )
    first = next(iter(tests))
    labels = tests[first].labels[by_run[first]].astype(np.int64)
    return Shared(task, labels, entries)


def same_classes(one: TaskConfig, other: TaskConfig) -> bool:
    """Whether class i is the same thing in both, whatever the model is to answer for it."""
    if len(one.labels) != len(other.labels) or one.ordinal != other.ordinal:
        return False
    pairs = ((one.labels, other.labels), (one.values, other.values), (one.names, other.names))
    return any(mine is not None and mine == theirs for mine, theirs in pairs)


def _classes(task: TaskConfig) -> str:
    shown = ", ".join(task.shown[:6])
    return f"{len(task.labels)}{' ordered' * task.ordinal} classes ({shown}…)"


def shared_places(tests: Sequence[TestSet]) -> list[NDArray[np.int64]]:
    """Where the shared rows stand in each test set, `[n]` each, in the order of the first.

    Raises:
        RequestError: there are none, or a text has no label in common with the same text elsewhere.
    """
    hashes = [sha256_file(test.path) for test in tests]
    if len(set(hashes)) == 1:
        return [np.arange(len(test.labels)) for test in tests]
    known: dict[str, dict[Key, int]] = {}
    for digest, test in zip(hashes, tests, strict=True):
        if digest not in known:
            known[digest] = {key: place for place, key in enumerate(_keys(test))}
    keys_of = [known[digest] for digest in hashes]
    first, *others = zip(keys_of, (test.path for test in tests), strict=True)
    kept = list(first[0])
    for keys, path in others:
        _refuse_other_labels(first[0], first[1], keys, path)
        kept = [key for key in kept if key in keys]
        if not kept:
            raise RequestError(
                f"{path} and {first[1]} have no row in common (text and label): what was measured "
                "on other rows cannot be compared"
            )
    return [np.array([keys[key] for key in kept], dtype=np.int64) for keys in keys_of]


def _refuse_other_labels(
    mine: dict[Key, int], here: Path, theirs: dict[Key, int], there: Path
) -> None:
    labels: tuple[dict[bytes, set[int]], ...] = ({}, {})
    for found, keys in zip(labels, (mine, theirs), strict=True):
        for text, label, _ in keys:
            found.setdefault(text, set()).add(label)
    both = labels[0].keys() & labels[1].keys()
    odd = sum(labels[0][text].isdisjoint(labels[1][text]) for text in both)
    if odd:
        raise RequestError(
            f"{odd} of the {len(both)} texts that {here} and {there} share have another label in "
            "the other: their truth differs, so nothing is compared"
        )


def _keys(test: TestSet) -> Iterator[Key]:
    seen: Counter[tuple[bytes, int]] = Counter()
    place = 0
    try:
        for batch in pq.ParquetFile(test.path).iter_batches(8192, columns=["text"]):
            for text in batch.column("text").to_pylist():
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                label = int(test.labels[place])
                yield digest, label, seen[digest, label]
                seen[digest, label] += 1
                place += 1
    except (OSError, pa.ArrowException, KeyError, AttributeError):
        raise StageError(f"{test.path}: its texts cannot be read") from None
