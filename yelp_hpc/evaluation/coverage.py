"""Which rows of the test set a model has answered: each exactly once, or what is wrong.

Reads `prepare/test.parquet` (row, label) and the shards of `infer/MODEL/`, a record batch at a
time. Four bytes a test row stay in memory (ten more when row ids are not consecutive), whatever the
number and size of the shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from yelp_hpc.config import Config
from yelp_hpc.errors import StageError, in_shell
from yelp_hpc.evaluation.metrics import Counts
from yelp_hpc.inference.provenance import Provenance, wanted
from yelp_hpc.inference.shard_files import provenance_of
from yelp_hpc.inference.shards import missing_shards, spans
from yelp_hpc.progress import track
from yelp_hpc.rundir.files import sha256_file
from yelp_hpc.rundir.origin import require_own_adapter
from yelp_hpc.rundir.paths import RunPaths, shard_of

MISSING = -1
"""Code of a row without an answer. K is unparsed, K + 1 an integer that is no class."""
_BATCH = 65_536
_NAMED = 10
"""Rows that a message names; the rest are counted."""


@dataclass(frozen=True)
class TestSet:
    """The rows that must be answered. `ids` is None when they are `first, first + 1, …`."""

    __test__ = False  # not a test class, whatever pytest takes from the name

    classes: int
    labels: NDArray[np.int16]
    first: int
    ids: Counts | None
    order: Counts | None
    path: Path

    def positions(self, rows: Counts) -> Counts:
        """Where row ids stand in the test set, `[n]` -> `[n]`; -1 for an id that it lacks."""
        if self.ids is None or self.order is None:
            places = rows - self.first
            return np.where((places >= 0) & (places < len(self.labels)), places, -1)
        found = np.minimum(np.searchsorted(self.ids, rows), len(self.ids) - 1)
        return np.where(self.ids[found] == rows, self.order[found], -1)

    def row_ids(self, positions: Counts) -> list[int]:
        """The row ids that stand at these places; the way back from `positions`."""
        if self.ids is None or self.order is None:
            return [int(place) + self.first for place in positions]
        inverse = np.empty_like(self.order)
        inverse[self.order] = self.ids
        return [int(row) for row in inverse[positions]]


def read_test_set(path: Path, classes: int = 5, labelled: bool = True) -> TestSet:
    """Read row ids and labels.

    Args:
        labelled: without it, a label may be anything.

    Raises:
        StageError: the file is missing, torn or empty, an id is there twice, a label is no class.
    """
    mend = "make it again: python -m yelp_hpc run prepare --run " + in_shell(path.parent.parent)
    try:
        file = pq.ParquetFile(path)
        total = file.metadata.num_rows
        labels = np.empty(total, dtype=np.int16)
        ids = np.empty(total, dtype=np.int64)
        start = 0
        for batch in file.iter_batches(_BATCH, columns=["row", "label"]):
            stop = start + batch.num_rows
            ids[start:stop] = integers(batch.column("row"))
            labels[start:stop] = integers(batch.column("label"))
            start = stop
    except FileNotFoundError:
        raise StageError(f"{path} is missing; {mend}") from None
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise StageError(f"{path} cannot be read ({_first_line(error)}); {mend}") from None
    if not total:
        raise StageError(f"{path} holds no rows; {mend}")
    if labelled and (labels.min() < 0 or labels.max() >= classes):
        raise StageError(f"{path} holds labels outside 0-{classes - 1}; {mend}")
    if np.array_equal(ids, np.arange(ids[0], ids[0] + total)):
        return TestSet(classes, labels, int(ids[0]), None, None, path)
    order = np.argsort(ids)
    ids = ids[order]
    if (ids[1:] == ids[:-1]).any():
        twice = ids[1:][ids[1:] == ids[:-1]]
        raise StageError(f"{path} holds row {twice[0]} more than once; {mend}")
    return TestSet(classes, labels, int(ids[0]), ids, order, path)


@dataclass(frozen=True)
class Answers:
    """Rows of a shard that belong to the test set and were new; all arrays are `[n]`."""

    positions: Counts
    labels: Counts
    codes: NDArray[np.int16]
    predictions: Counts
    """0 where unparsed."""
    scores: NDArray[np.float64] | None
    """`[n, K]` scores, None in generate and answer mode."""
    path: Path


@dataclass
class Coverage:
    """What was found of one model's shards."""

    run: RunPaths
    model: str
    shards: int
    test: TestSet
    made_with: Provenance | None = None
    """What the shards must say of themselves, as far as they say anything."""
    codes: NDArray[np.int16] = field(init=False)
    """`[rows]`: each test row's column of the tally, or MISSING."""
    damaged: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    doubled: dict[int, list[str]] = field(default_factory=dict)
    doubled_rows: int = 0
    foreign: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.codes = np.full(len(self.test.labels), MISSING, dtype=np.int16)

    def read(self) -> Iterator[Answers]:
        """Read every shard; when it ends, `problems` knows what is wrong."""
        folder = self.run.predictions(self.model)
        whole: dict[int, Path] = {}
        for path in sorted(folder.glob("shard-*.parquet")) if folder.is_dir() else ():
            named = shard_of(path)
            if named is None or named[1] != self.shards or named[0] >= self.shards:
                self.leftovers.append(path)
            else:
                whole[named[0]] = path
        self.missing = missing_shards(whole, self.shards)
        digest, identity = "", ""
        for shard, path in track(whole.items(), len(whole), f"collect {self.model}: shards"):
            try:
                file = pq.ParquetFile(path, page_checksum_verification=True)
                made = provenance_of(file.schema_arrow)
                if made.get("test_sha256"):
                    digest = digest or sha256_file(self.test.path)
                    if made["test_sha256"] != digest:
                        raise ValueError("it was made from another test set")
                identity = identity or made.get("identity", "")
                if identity and made.get("identity") != identity:
                    raise ValueError("made with another model, adapter or setting than the rest")
                if self.made_with and (other := self.made_with.unlike(made)):
                    raise ValueError(f"made with {other}")
                columns = ["row", "label", "prediction", "scores"]
                for batch in file.iter_batches(_BATCH, columns=columns):
                    yield from self._take(batch, path, shard)
            except (OSError, pa.ArrowException, ValueError, KeyError) as error:
                self.damaged[shard] = _first_line(error)

    def check(self) -> None:
        """Read every shard for its codes and its problems alone."""
        for _ in self.read():
            pass

    def _take(self, batch: pa.RecordBatch, path: Path, shard: int) -> Iterator[Answers]:
        if set(batch.schema.names) != {"row", "label", "prediction", "scores"}:
            raise ValueError("its columns are not those of a shard")
        if batch.column("row").null_count or batch.column("label").null_count:
            raise ValueError("it holds rows without a row id or a label")
        rows = integers(batch.column("row"))
        labels = integers(batch.column("label"))
        unparsed = integers(batch.column("prediction").is_null()).astype(bool)
        predictions = np.where(unparsed, 0, integers(batch.column("prediction")))
        scores = read_scores(batch.column("scores"), predictions, unparsed, self.test.classes)
        places = self.test.positions(rows)
        if (places < 0).any():
            self.foreign[shard] = f"row {rows[places < 0][0]} is not in the test set"
        known = places >= 0
        if (self.test.labels[places[known]] != labels[known]).any():
            wrong = rows[known][self.test.labels[places[known]] != labels[known]][0]
            self.foreign[shard] = f"row {wrong} has another label in the test set"
        keep = known & (self.codes[np.maximum(places, 0)] == MISSING)
        _, firsts = np.unique(places, return_index=True)
        once = np.zeros(len(places), dtype=bool)
        once[firsts] = True
        again = known & ~(keep & once)
        self.doubled_rows += int(again.sum())
        for row in rows[again][: max(0, _NAMED - len(self.doubled))]:
            self.doubled[int(row)] = []
        keep &= once
        inside = (predictions >= 0) & (predictions < self.test.classes)
        codes = np.where(inside, predictions, self.test.classes + 1)
        codes = np.where(unparsed, self.test.classes, codes).astype(np.int16)
        self.codes[places[keep]] = codes[keep]
        yield Answers(
            places[keep],
            self.test.labels[places[keep]].astype(np.int64),  # a shard's own may be no class
            codes[keep],
            predictions[keep],
            None if scores is None else scores[keep],
            path,
        )

    def problems(self) -> list[str]:
        """What keeps this model from being measured, a line each; [] when all is there once."""
        found = []
        folder = self.run.predictions(self.model)
        absent = np.flatnonzero(self.codes == MISSING)
        if self.missing:
            found.append(
                f"{folder}: {'shard' if len(self.missing) == 1 else 'shards'} "
                f"{spans(self.missing)} of {self.shards} missing (shards count from 0)"
            )
        for shard, reason in [*self.damaged.items(), *self.foreign.items()][:_NAMED]:
            found.append(f"{self.run.shard(self.model, shard, self.shards)}: {reason}")
        hidden = len(self.damaged) + len(self.foreign) - _NAMED
        if hidden > 0:
            found.append(f"{folder}: {hidden} more shards cannot be used")
        if self.leftovers:
            names = ", ".join(path.name for path in self.leftovers[:_NAMED])
            more = len(self.leftovers) - _NAMED
            found.append(
                f"{folder}: {names}{f' and {more} more' if more > 0 else ''} left over from "
                f"another division (this run has {self.shards} shards)"
            )
        if self.doubled_rows:
            self._find_holders()
            places = [
                f"row {row} ({' and '.join(dict.fromkeys(names)) or 'unreadable'})"
                for row, names in self.doubled.items()
            ]
            more = self.doubled_rows - len(places)
            found.append(
                f"{self.model}: answered more than once: {', '.join(places)}"
                + (f" and {more} more rows" if more > 0 else "")
            )
        if len(absent):
            rows = spans(self.test.row_ids(absent[:_NAMED]))
            more = len(absent) - _NAMED
            found.append(
                f"{self.model}: {len(absent)} of {len(self.codes)} test rows have no answer: "
                f"{rows}{f' and {more} more' if more > 0 else ''}"
            )
        return found

    def mend(self) -> list[str]:
        """The commands that make what is missing or wrong again."""
        commands = []
        if self.leftovers:
            pattern = sorted({path.name.split("-of-")[1] for path in self.leftovers})
            folder = self.run.predictions(self.model)
            commands += [f"rm {in_shell(folder)}/shard-*-of-{suffix}" for suffix in pattern]
        bad = sorted({*self.missing, *self.damaged, *self.foreign, *self._doubling_shards()})
        infer = f"python -m yelp_hpc run infer --run {in_shell(self.run.root)} --model {self.model}"
        if 0 < len(bad) <= 3:
            commands += [f"{infer} --shard {shard}" for shard in bad]
        elif bad or (self.codes == MISSING).any():
            commands.append(infer)
        return commands

    def _doubling_shards(self) -> set[int]:
        names = {name for names in self.doubled.values() for name in names}
        found = (shard_of(Path(name)) for name in names)
        return {item[0] for item in found if item}

    def _find_holders(self) -> None:
        """Name the shards that hold each doubled row: a second pass, over the row ids alone."""
        doubled = pa.array(list(self.doubled), type=pa.int64())
        for names in self.doubled.values():
            names.clear()
        for shard in range(self.shards):
            path = self.run.shard(self.model, shard, self.shards)
            if shard in self.damaged or not path.is_file():
                continue
            column = pq.read_table(path, columns=["row"])["row"]
            for row in column.filter(pc.is_in(column, value_set=doubled)).to_pylist():
                self.doubled[row].append(path.name)


def read_scores(
    column: pa.Array, predictions: Counts, unparsed: NDArray[np.bool_], classes: int
) -> NDArray[np.float64] | None:
    """`[n, K]` scores of a list column, None when it is all null.

    Raises:
        ValueError: some rows lack scores, have not one a class, have one that is not finite, or the
            prediction is not the label with the highest score.
    """
    if column.null_count == len(column):
        return None
    if column.null_count:
        raise ValueError("some of its rows have scores and some have none")
    flat = _values(column.flatten().cast(pa.float64()), np.float64)
    if not (integers(column.value_lengths()) == classes).all():
        raise ValueError(f"it holds rows that have not {classes} scores")
    scores = flat.reshape(-1, classes)
    if not np.isfinite(scores).all():
        raise ValueError("it holds scores that are not finite numbers")
    inside = ~unparsed & (predictions >= 0) & (predictions < classes)
    chosen = scores[inside, predictions[inside]]
    if (chosen < scores[inside].max(axis=1)).any():
        raise ValueError("its predictions are not the labels with the highest scores")
    return scores


def integers(column: pa.Array) -> Counts:
    """An integer or boolean column as int64; what stands at a null is arbitrary."""
    return _values(column.cast(pa.int64()), np.int64)


def _values(column: pa.Array, dtype: type[Any]) -> NDArray[Any]:
    """A view of a column's buffer; `to_numpy` would import pandas where it is there: a second."""
    buffer = column.buffers()[1]
    if buffer is None:
        return np.zeros(len(column), dtype=dtype)
    return np.frombuffer(buffer, dtype)[column.offset : column.offset + len(column)]


def _first_line(error: Exception) -> str:
    """A foreign error in one line, plain about what it means for a parquet file."""
    text = (str(error) or repr(error)).splitlines()[0]
    if isinstance(error, ValueError) and not isinstance(error, pa.ArrowException):
        return text
    return f"torn or altered ({text})"


def coverages_of(run: RunPaths, config: Config, labelled: bool = True) -> list[Coverage]:
    """One of each model that a run names; their shards are still to be read.

    Args:
        labelled: the test rows have labels.

    Raises:
        StageError: as `read_test_set`, or the adapter is another run's.
    """
    if "tuned" in config.infer.models:
        require_own_adapter(run, config)
    test = read_test_set(run.split("test"), len(config.task.labels), labelled)
    return [
        Coverage(run, model, config.infer.shards, test, wanted(run, config, model))
        for model in config.infer.models
    ]


def refuse_unless_complete(coverages: Sequence[Coverage]) -> None:
    """Raise a StageError that lists every problem of every model and the commands that mend it."""
    problems = [problem for coverage in coverages for problem in coverage.problems()]
    if not problems:
        return
    commands = [command for coverage in coverages for command in coverage.mend()]
    lines = ["predictions are not complete, so nothing was computed:"]
    lines += [f"  - {problem}" for problem in problems]
    lines += ["To mend it, run:", *(f"  {command}" for command in commands)]
    raise StageError("\n".join(lines))
