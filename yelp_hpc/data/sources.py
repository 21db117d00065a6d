"""Reviews from a file, the Hub or the demo's packages, every faulty row named.

A source gives `(text, label)` rows in their order; the place in that order is the row id.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from yelp_hpc.cache import cache_folder
from yelp_hpc.config import YELP, Config, DataConfig, TaskConfig
from yelp_hpc.data import demo
from yelp_hpc.data.sampling import text_key
from yelp_hpc.errors import RequestError, StageError, all_problems

Row = tuple[str, int]
FORMATS = (".csv", ".jsonl", ".parquet")


def read_source(config: Config) -> tuple[list[Row], list[Row] | None]:
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
        return [(text, demo.star_label(rating)) for text, rating in distinct.values()], None
    if data.source == "hub":
        return _read_hub(data, task, "train"), _read_hub(data, task, "test")
    assert data.train is not None  # checked by the config
    columns = data.text_column, data.label_column, task
    train = read_file(Path(data.train), *columns)
    return train, read_file(Path(data.test), *columns) if data.test else None


def read_file(
    path: Path, text_column: str, label_column: str, task: TaskConfig = YELP
) -> list[Row]:
    """The rows of a csv, jsonl or parquet file.

    Raises:
        RequestError: naming the file and, for the first faulty rows, the line and what is wrong.
    """
    if path.suffix not in FORMATS:
        raise RequestError(f"data file {path} must end in {', '.join(FORMATS)}")
    if not path.is_file():
        raise RequestError(f"data file {path} does not exist")
    try:
        records = list(_records(path))
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} "
            f"{_line_of(path, error)}); convert it, for example with iconv"
        ) from None
    except (csv.Error, ValueError, OSError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    if not records:
        raise RequestError(f"{path} has no rows")
    columns = list(records[0][1])
    missing = [c for c in (text_column, label_column) if c not in columns]
    if missing:
        raise RequestError(
            f"{path} has no column {' and no column '.join(missing)} (it has: "
            f"{', '.join(map(str, columns))}); set data.text_column and data.label_column"
        )
    return _checked(path, records, text_column, label_column, task)


def _records(path: Path) -> Iterator[tuple[str, dict[Any, Any]]]:
    """`(place, record)` of each row."""
    if path.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or ())
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the header names {', '.join(twice)} twice")
            for record in reader:
                yield f"line {reader.line_num}", record
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"line {number} is not JSON: {error}") from None
                    except RecursionError:
                        raise ValueError(f"line {number} is nested too deeply") from None
                    if not isinstance(record, dict):
                        raise ValueError(f"line {number} is not a JSON object")
                    yield f"line {number}", record
    else:
        import pyarrow.parquet as pq

        for number, record in enumerate(pq.read_table(path).to_pylist()):
            yield f"row {number}", record


def _line_of(path: Path, error: UnicodeDecodeError) -> str:
    """Where the first byte that is not UTF-8 lies."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return f"in line {number}"
    return f"at {error.start}"


def _checked(
    path: Path,
    records: Iterable[tuple[str, dict[Any, Any]]],
    text_column: str,
    label_column: str,
    task: TaskConfig,
) -> list[Row]:
    classes = {value: i for i, value in enumerate(task.values or task.labels)}
    rows: list[Row] = []
    problems = []
    for place, record in records:
        text, label = record.get(text_column), record.get(label_column)
        if None in record:  # csv: the rest of the line would be lost without a word
            problems.append(f"{place}: more fields than the header; quote a text that has a comma")
        elif not isinstance(text, str) or not text.strip():
            what = "is empty" if text is None or isinstance(text, str) else f"is {text!r}, no text"
            problems.append(f"{place}: {text_column} {what}")
        elif not _is_unicode(text):
            problems.append(f"{place}: {text_column} holds half a character (a lone surrogate)")
        elif label is None or label == "":
            problems.append(f"{place}: {label_column} is empty")
        elif str(label).strip() not in classes:
            problems.append(f"{place}: {label_column} is {label!r}, not one of 0 to 4 (stars - 1)")
        else:
            rows.append((text, classes[str(label).strip()]))
    if problems:
        raise RequestError(
            all_problems(f"{path} has {len(problems)} rows that cannot be used:", problems, 10)
        )
    return rows


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_hub(data: DataConfig, task: TaskConfig, split: str) -> list[Row]:
    from datasets import load_dataset

    assert data.path is not None  # checked by the config
    try:
        # beside the model: `fetch` on a login node and a job in the image share this folder
        cache = str(cache_folder() / "datasets")
        table = load_dataset(data.path, split=split, revision=data.revision, cache_dir=cache)
    except Exception as error:
        raise StageError(
            f"data set {data.path} ({split}) could not be loaded from the Hub: {error}\n"
            "Where the node has no network, run `python -m yelp_hpc fetch` on the login node first."
        ) from error
    if len(set(table.column_names) & {data.text_column, data.label_column}) < 2:
        raise RequestError(
            f"data set {data.path} has no columns {data.text_column} and {data.label_column} "
            f"(it has: {', '.join(table.column_names)})"
        )
    records = ((f"row {i}", record) for i, record in enumerate(table))
    return _checked(Path(data.path), records, data.text_column, data.label_column, task)
