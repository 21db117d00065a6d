"""Rows to be answered: texts, and labels where every row has one, from any file that prepare reads.

Reads the input, a record at a time; writes nothing. What is plain text needs no pyarrow, so that a
login node can look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.data.files import data_files, records, text_fault, unescaped
from yelp_hpc.data.formats.arrow_rows import class_names
from yelp_hpc.data.formats.record import Record
from yelp_hpc.data.labels import MOST_VALUES, classes_of, value_text
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.rundir.request import Request
from yelp_hpc.task import TaskConfig

_SHOWN = 10


@dataclass(frozen=True)
class Scan:
    """What an input holds."""

    rows: int
    classes: Mapping[str, int] | None
    """Label as text → class; None where the rows have no labels that can be counted."""
    why_unlabelled: str = ""
    """Why a label column that is there gives no metrics."""


def read_input(request: Request) -> Iterator[Record]:
    """`(place, record)` of every row, in the order of the files. Raises as `records` does."""
    paths = data_files(request.input)
    for path in paths:
        for place, record in records(path, request.header):
            yield place if len(paths) == 1 else f"{path.name} {place}", record


def text_of(record: Mapping[Any, Any], request: Request) -> str:
    """The text of a row that `scan` has passed."""
    text = str(record[request.text_column])
    return unescaped(text) if request.escaped else text


def scan(request: Request, task: TaskConfig, added: Sequence[str]) -> Scan:
    """Read all of the input once.

    Args:
        added: names of the columns that the answers will have.

    Raises:
        RequestError: a file or a column is missing, a row has no text, a column is named as one
            that is added; every problem at once.
    """
    source, column = request.input, request.label_column
    problems: list[str] = []
    columns: dict[str, None] = {}
    values: dict[str, str] = {}
    rows = faulty = empty = 0
    without = ""
    many = False
    for place, record in read_input(request):
        rows += 1
        columns.update(dict.fromkeys(str(key) for key in record if key is not None))
        if fault := text_fault(record, request.text_column):
            faulty += 1
            problems += [f"{place}: {fault}"] * (len(problems) < _SHOWN)
        label = record.get(column)
        value = value_text(label)
        if not value:
            empty += 1
            without = without or place
        elif not many:
            values.setdefault(value, place)
            many = len(values) > MOST_VALUES
    if not rows:
        raise RequestError(f"{source} has no rows")
    if request.text_column not in columns:
        problems = [
            f"it has no column {request.text_column} (it has: {', '.join(columns)}); name the "
            "text's with --text-column"
        ]
    elif faulty > len(problems):
        problems.append(f"… and {faulty - len(problems):,} more rows")
    taken = [name for name in added if name in columns]
    if taken:
        problems.append(
            f"it has the columns {', '.join(taken)} already: give those that are added another "
            "beginning, --prefix TEXT"
        )
    classes, why = None, ""
    if column in columns and column != request.text_column:
        if empty:
            why = f"{empty:,} of {rows:,} rows have none (first: {without})"
        elif many:
            why = f"it holds over {MOST_VALUES:,} different values"
        else:
            classes, why = _classes(values, task, request)
    elif request.label_needed:
        why = f"there is no such column (there are: {', '.join(columns)})"
    if why and request.label_needed:
        problems.append(f"--label-column {column} gives no metrics: {why}")
    if problems:
        raise RequestError(all_problems(f"{source} cannot be answered:", problems))
    return Scan(rows, classes, f"{column}: {why}" if why else "")


def _classes(
    values: Mapping[str, str], task: TaskConfig, request: Request
) -> tuple[dict[str, int] | None, str]:
    try:
        names = class_names(data_files(request.input), request.label_column)
        found = classes_of(values, task, names, request.class_names)
    except RequestError as error:
        return None, str(error)
    known = {value: i for value, i in found.items() if i is not None}
    strange = [value for value in found if value not in known]
    if strange:
        return None, f"{strange[0]!r} ({values[strange[0]]}) is no label of the task"
    return known, ""


def input_files(place: str) -> list[Path]:
    """The files of an input, each there. Raises RequestError as `data_files` does."""
    return data_files(str(Path(place).expanduser().absolute()))


def named_inputs(place: str) -> dict[str, Path]:
    """The files of an input by name, by path where two have one. Raises as `input_files` does."""
    paths = input_files(place)
    named = {path.name: path for path in paths}
    return named if len(named) == len(paths) else {str(path): path for path in paths}
