"""Texts and their classes from files, the Hub or the demo's packages, every faulty row named.

A source gives rows in their order; the place in that order is the row id. They are written once
into an Arrow file of this process's own and read from there, some thousand rows at a time, so that
memory does not grow with the source.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from yelp_hpc.cache import cache_folder, made
from yelp_hpc.config import Config, DataConfig
from yelp_hpc.data import demo
from yelp_hpc.data.files import data_files, records, text_fault, unescaped
from yelp_hpc.data.formats.arrow_rows import class_names
from yelp_hpc.data.formats.record import Record
from yelp_hpc.data.hub import hub_error
from yelp_hpc.data.labels import (
    MOST_VALUES,
    NO_LABEL,
    advice,
    classes_of,
    one_naming,
    value_text,
)
from yelp_hpc.data.sampling import text_key
from yelp_hpc.errors import RequestError, YelpHpcError, all_problems
from yelp_hpc.task import YELP, TaskConfig

Row = tuple[str, int]
_BATCH = 4096
_SHOWN = 10


class Table(Sequence[Row]):
    """`(text, class)` rows; `read` gives the texts of the i-th `_BATCH` of them."""

    def __init__(
        self,
        read: Callable[[int], pa.Array],
        labels: NDArray[np.int16],
        names: list[str] | None = None,
    ) -> None:
        self._batch = lru_cache(1)(read)
        self.labels = labels
        """`[n]` classes."""
        self.names = names
        """What the data count from 0, where they say so (a ClassLabel column)."""

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        rows = range(len(self))[place]
        if isinstance(rows, range):
            return list(zip(self.texts(rows), self.labels[place].tolist(), strict=True))
        return next(self.texts([rows])), int(self.labels[rows])

    def __iter__(self) -> Iterator[Row]:
        return zip(self.texts(range(len(self))), self.labels.tolist(), strict=True)

    def texts(self, rows: Iterable[int]) -> Iterator[str]:
        """The texts of some rows, a batch in memory at a time: best in their order."""
        for number, places in groupby(rows, lambda row: row // _BATCH):
            wanted = pa.array([row % _BATCH for row in places], pa.int64())
            yield from self._batch(number).take(wanted).to_numpy(zero_copy_only=False).tolist()


def read_source(config: Config) -> tuple[Table, Table | None]:
    """Training and test rows of the configured source; no test rows: draw them from training.

    Raises:
        RequestError: a file is missing, has the wrong columns, or holds rows that cannot be used.
        StageError: a download failed.
    """
    data, task = config.data, config.task
    if data.source == "demo":
        if len(task.labels) != 5:
            raise RequestError(
                f"data.source demo has five classes, task.labels has {len(task.labels)}"
            )
        distinct = {text_key(text): (text, rating) for text, rating in demo.rated_snippets()}
        texts, ratings = zip(*distinct.values(), strict=True)
        labels = np.array([demo.star_label(rating) for rating in ratings], dtype=np.int16)
        whole = pa.array(texts, pa.large_string())
        return Table(lambda i: whole[i * _BATCH :], labels), None
    if data.source == "hub":
        spools = [_read_hub(data, s) for s in (data.train_split, data.test_split) if s]
    else:
        spools = [_read_files(place, data) for place in (data.train, data.test) if place]
    tables = _classified(spools, task)
    return tables[0], tables[1] if len(tables) > 1 else None


def read_file(
    path: Path | str, text_column: str, label_column: str, task: TaskConfig = YELP
) -> Table:
    """The rows of a data file, a folder of them or a glob.

    Raises:
        RequestError: naming the file and, for the first faulty rows, the line and what is wrong.
    """
    data = DataConfig(
        source="file",
        train=str(path),
        text_column=text_column,
        label_column=label_column,
        test_rows=1,
    )
    return _classified([_read_files(str(path), data)], task)[0]


@dataclass
class _Spool:
    """The rows of one source, its texts in a file; labels are places in `values`."""

    source: str
    label_column: str
    texts: Callable[[int], pa.Array]
    codes: NDArray[np.int32]
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Each label as text → as it stood, and where it stood first."""
    problems: list[str] = field(default_factory=list)
    faulty: int = 0
    """Rows without a usable text or label."""
    names: list[str] | None = None


def _classified(spools: list[_Spool], task: TaskConfig) -> list[Table]:
    """The classes of all sources' labels, judged together. Raises RequestError for faulty rows."""
    values = {value for spool in spools for value in spool.values}
    names = one_naming([(spool.source, spool.names) for spool in spools])
    try:
        classes = classes_of(values, task, names)
    except RequestError as error:
        raise RequestError(f"{spools[0].source}: {error}") from None
    wrong = [value for value, i in classes.items() if i is None]
    for spool in spools:
        counts = np.bincount(spool.codes, minlength=len(spool.values))
        faulty, problems = spool.faulty, [(1, problem) for problem in spool.problems]
        for count, (value, (stood, place)) in zip(counts, spool.values.items(), strict=True):
            if classes[value] is None:
                faulty += int(count)
                rows = f" in {count:,} rows" if count > 1 else ""
                problem = f"{place}: {spool.label_column} is {stood!r}{rows}, not {_expected(task)}"
                problems.append((int(count), problem))
        if problems:
            shown = [problem for _, problem in problems[:_SHOWN]]
            if hidden := faulty - sum(count for count, _ in problems[:_SHOWN]):
                shown.append(f"… and {hidden:,} more")
            headline = f"{spool.source} has {faulty} rows that cannot be used:"
            hint = f"\n{advice(values, task)}" if wrong else ""
            raise RequestError(all_problems(headline, shown) + hint)
    tables = []
    for spool in spools:
        order = np.array([classes[value] for value in spool.values], dtype=np.int16)
        tables.append(Table(spool.texts, order[spool.codes] if len(order) else order, names))
    return tables


def _expected(task: TaskConfig) -> str:
    if task == YELP:
        return "one of 0 to 4 (stars - 1)"
    texts = task.values or task.labels
    return "one of " + ", ".join(texts[:12]) + (" …" if len(texts) > 12 else "")


def _read_files(place: str, data: DataConfig) -> _Spool:
    paths = data_files(place)
    one = len(paths) == 1

    def every() -> Iterator[Record]:
        for path in paths:
            for where, record in records(path, data.header):
                yield where if one else f"{path.name} {where}", record

    source = str(paths[0]) if one else place
    spool = _spool(source, every(), data, "set data.text_column and data.label_column")
    spool.names = class_names(paths, data.label_column)
    return spool


def _read_hub(data: DataConfig, split: str) -> _Spool:
    from datasets import load_dataset

    assert data.path is not None  # checked by the config
    try:
        # beside the model: `fetch` on a login node and a job in the image share this folder
        cache = str(cache_folder() / "datasets")
        table = load_dataset(
            data.path, data.configuration, split=split, revision=data.revision, cache_dir=cache
        )
    except ValueError as error:
        # The library names what there is: an unknown split or configuration, or none of several.
        text = " ".join(str(error).split())
        raise RequestError(
            f"data set {data.path} ({split}) cannot be read so: {text[:500]}; set "
            "data.configuration, data.train_split and data.test_split"
        ) from error
    except Exception as error:
        raise hub_error("data set", data.path, data.revision, error) from error
    batches = (zip(*batch.values(), strict=True) for batch in table.iter(_BATCH))
    names = table.column_names
    rows = (
        (f"row {i}", dict(zip(names, values, strict=True)))
        for i, values in enumerate(chain.from_iterable(batches))
    )
    spool = _spool(f"data set {data.path}", rows, data, "set data.text_column and so on")
    spool.names = getattr(table.features.get(data.label_column), "names", None)
    return spool


def _spool_folder() -> Path | None:
    """A folder of the cache; None, which is TMPDIR, where a node's home may only be read."""
    try:
        return made(cache_folder() / "rows")
    except YelpHpcError:
        return None


def _spool(source: str, rows: Iterable[Record], data: DataConfig, mend: str) -> _Spool:
    """Write the texts into a file to be read again; remember the labels and what is wrong.

    Raises:
        RequestError: there are no rows, a column is missing, or the label column holds texts.
    """
    text_column, label_column = data.text_column, data.label_column
    spool = _Spool(source, label_column, lambda i: pa.array([], pa.large_string()), _codes([]))
    places: dict[str, int] = {}
    columns: dict[str, None] = {}
    codes: list[NDArray[np.int32]] = []
    schema = pa.schema([("text", pa.large_string())])
    folder = _spool_folder()
    # unlinked when it is closed: its reader keeps it alive
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".arrow") as file:
        texts: list[str] = []
        own: list[int] = []
        seen = False
        with pa.ipc.new_file(file.name, schema) as writer:

            def flush() -> None:
                writer.write_batch(pa.record_batch([pa.array(texts, pa.large_string())], schema))
                codes.append(_codes(own))
                texts.clear()
                own.clear()

            for place, record in rows:
                seen = True
                if record.keys() - columns.keys():
                    columns |= dict.fromkeys(key for key in record if key is not None)
                fault, text, value = _judged(record, text_column, label_column, data.escaped)
                if fault:
                    spool.faulty += 1
                    if len(spool.problems) < _SHOWN:
                        spool.problems.append(f"{place}: {fault}")
                    continue
                if value not in places:
                    places[value] = len(places)
                    spool.values[value] = (record[label_column], place)
                    if len(places) > MOST_VALUES:
                        raise RequestError(
                            f"{source}: column {label_column} holds over {MOST_VALUES:,} different "
                            "values: is it the label? Set data.label_column"
                        )
                texts.append(text)
                own.append(places[value])
                if len(texts) == _BATCH:
                    flush()
            flush()
        if not seen:
            raise RequestError(f"{source} has no rows")
        missing = [c for c in (text_column, label_column) if c not in columns]
        if missing:
            headless = " (if its first line is a row already, set data.header=false)"
            raise RequestError(
                f"{source} has no column {' and no column '.join(missing)} (it has: "
                f"{', '.join(map(str, columns))}); {mend}"
                + (headless if ".csv" in source.lower() and data.header else "")
            )
        # not mapped: pages that were read once would count as this process's memory
        reader = pa.ipc.open_file(pa.OSFile(file.name))
    spool.texts, spool.codes = (lambda i: reader.get_batch(i)["text"]), np.concatenate(codes)
    return spool


def _codes(values: list[int]) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def _judged(
    record: dict[Any, Any], text_column: str, label_column: str, escaped: bool
) -> tuple[str, str, str]:
    """`(what is wrong, text, label as text)` of a record."""
    if fault := text_fault(record, text_column):
        return fault, "", ""
    text, label = str(record[text_column]), record.get(label_column)
    if type(label) in NO_LABEL:
        return f"{label_column} is {label!r}, no label", "", ""
    value = value_text(label)
    if not value:
        return f"{label_column} is empty", "", ""
    return "", unescaped(text) if escaped else text, value
