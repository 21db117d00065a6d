"""Rows of parquet and Arrow files and streams, some at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from yelp_hpc.data.formats.endings import BINARY_FORMATS
from yelp_hpc.data.formats.record import Record, check_names
from yelp_hpc.data.labels import one_naming


def arrow_batches(path: Path, rows: int = 1024) -> Iterator[Any]:
    """The record batches of a parquet or Arrow file, at most so many rows each."""
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(rows)
    else:
        yield from _ipc_batches(path, rows)


def arrow_rows(path: Path) -> Iterator[Record]:
    """`(place, record)` of each row.

    Raises:
        ValueError: it cannot be read, or two columns have one name.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in arrow_batches(path):
            check_names(batch.schema.names)
            for record in batch.to_pylist():
                yield f"row {number}", record
                number += 1
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None


def arrow_schema(path: Path) -> Any:
    """The columns of a parquet or Arrow file, of one without rows, too."""
    import pyarrow.parquet as pq

    return pq.read_schema(path) if path.suffix.lower() == ".parquet" else _ipc(path).schema


def _ipc(path: Path) -> Any:
    """The reader of an Arrow file or stream."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(path)))


def _ipc_batches(path: Path, rows: int = 1024) -> Iterator[Any]:
    """The record batches of an Arrow file or stream, in small slices."""
    reader = _ipc(path)
    count = getattr(reader, "num_record_batches", None)  # a stream does not tell
    for batch in reader if count is None else map(reader.get_batch, range(count)):
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def class_names(paths: Sequence[Path], column: str) -> list[str] | None:
    """The names of a ClassLabel column that `datasets` recorded in the files, or None.

    Raises:
        RequestError: they are not the same in all of them.
    """
    return one_naming([(str(path), _class_names(path, column)) for path in paths])


def _class_names(path: Path, column: str) -> list[str] | None:
    if path.suffix.lower() not in BINARY_FORMATS:
        return None
    import pyarrow as pa

    try:
        schema = arrow_schema(path)
    except (pa.ArrowException, OSError):
        return None  # said when its rows are read
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = ((about.get("info") or {}).get("features") or {}).get(column) or {}
    names = feature.get("names") if isinstance(feature, dict) else None
    return [str(name) for name in names] if names else None
