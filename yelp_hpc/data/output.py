"""Tables as files that others open: csv, jsonl or parquet, by the name's ending, as they stream by.

Writes one file, whole or not at all.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.errors import RequestError
from yelp_hpc.rundir.files import atomic_path

FORMATS = (".csv", ".jsonl", ".parquet")


def output_format(path: Path) -> str:
    """The format of a file to be written, a lower-case ending.

    Raises:
        RequestError: it is none that is written, or there is no such folder.
    """
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise RequestError(f"{path} must end in {', '.join(FORMATS)}")
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.absolute().parent}")
    return ending


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Takes tables of `schema` and writes their rows.

    In csv a null is an empty field and what holds other values is JSON.

    Raises:
        RequestError: as `output_format`.
        StageError: the file cannot be written.
    """
    ending = output_format(path)
    with atomic_path(path) as temporary:
        if ending == ".parquet":
            with pq.ParquetWriter(temporary, schema) as writer:
                yield lambda table: writer.write_table(table.cast(schema))
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            if ending == ".csv":
                rows.writerow(schema.names)

            def write(table: pa.Table) -> None:
                for record in table.to_pylist():
                    if ending == ".csv":
                        rows.writerow([_cell(record[name]) for name in schema.names])
                    else:
                        line = json.dumps(record, ensure_ascii=False, default=_as_json)
                        file.write(f"{line}\n")

            yield write


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_as_json)
    return value


def _as_json(value: Any) -> Any:
    """What JSON has no word for, as text: dates, decimals, bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
