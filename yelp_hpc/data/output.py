"""Tables as files that others open: csv, jsonl or parquet, by the name's ending, as they stream by.

Writes one file, whole or not at all.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.errors import RequestError
from yelp_hpc.rundir.files import atomic_path

if TYPE_CHECKING:  # a login node asks for the formats alone
    import pyarrow as pa

FORMATS = (".csv", ".jsonl", ".parquet")


def output_problems(path: Path) -> list[str]:
    """Why a file cannot be written, a line each; [] when it can."""
    problems = []
    if path.suffix.lower() not in FORMATS:
        problems.append(f"{path} must end in {', '.join(FORMATS)}")
    if path.is_dir():
        problems.append(f"{path} is a folder; name a file")
    if not path.expanduser().absolute().parent.is_dir():
        problems.append(f"{path}: there is no folder {path.expanduser().absolute().parent}")
    return problems


@contextmanager
def table_writer(
    path: Path, schema: pa.Schema
) -> Iterator[Callable[[pa.Table | list[dict[Any, Any]]], None]]:
    """Takes tables of `schema`, and for csv and jsonl records too, and writes their rows.

    In csv a null is an empty field and what holds other values is JSON.

    Raises:
        RequestError: it is none of these formats, or its folder is not there.
        StageError: the file cannot be written.
    """
    if problems := output_problems(path):
        raise RequestError("; ".join(problems))
    import pyarrow.parquet as pq

    ending = path.suffix.lower()
    with atomic_path(path) as temporary:
        if ending == ".parquet":
            with pq.ParquetWriter(temporary, schema) as writer:

                def write_table(table: Any) -> None:
                    same = table.cast(schema.remove_metadata())
                    writer.write_table(same.replace_schema_metadata(schema.metadata))

                yield write_table
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            if ending == ".csv":
                rows.writerow(schema.names)

            def write(table: pa.Table | list[dict[Any, Any]]) -> None:
                for record in table if isinstance(table, list) else table.to_pylist():
                    if ending == ".csv":
                        rows.writerow([_cell(record.get(name)) for name in schema.names])
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
