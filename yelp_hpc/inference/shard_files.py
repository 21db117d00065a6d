"""The files of a shard: its parts while it runs, one parquet file when it is whole.

A part holds whole batches of one window of rows; its name ends with its own SHA-256, so that a
torn or altered part is known without a list beside it. The finished shard is merged window by
window (its size bounds the memory) and carries page checksums and the provenance of its predictions
as schema metadata. Reads the prepared test set; reads and writes `infer/MODEL/shard-*.parquet` and
`infer/.partial/MODEL/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.errors import StageError
from yelp_hpc.inference.provenance import PREFIX, Provenance
from yelp_hpc.rundir.files import atomic_path, sha256_file

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("prediction", pa.int16()),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("text", pa.string()),
    ]
)

_PART = re.compile(r"part-(\d{5})-(\d{5})-([0-9a-f]{16})\.parquet")


def provenance_of(schema: pa.Schema) -> dict[str, str]:
    """The metadata that a shard's schema carries, keys without `yelp_hpc.`; {} when it has none."""
    found: Mapping[bytes, bytes] = schema.metadata or {}
    return {
        key.decode().removeprefix(PREFIX): value.decode()
        for key, value in found.items()
        if key.startswith(PREFIX.encode())
    }


def predictions_table(
    rows: Sequence[int],
    labels: Sequence[int],
    predictions: Sequence[int | None],
    scores: Sequence[Sequence[float]] | None,
    texts: Sequence[str] | None,
) -> pa.Table:
    """A table of `SCHEMA`."""
    nothing = [None] * len(rows)
    columns: list[Any] = [rows, labels, predictions, scores or nothing, texts or nothing]
    arrays = [
        pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


# The prepared test set


def read_lengths(test: Path) -> memoryview:
    """Tokens of every prompt of the test set, as a sequence of ints (8 bytes a row)."""
    column = pq.read_table(test, columns=["length"])["length"]
    return memoryview(column.cast(pa.int64()).to_numpy())


def read_windows(test: Path, windows: Sequence[range]) -> Iterator[pa.Table]:
    """The rows (`row`, `label`, `input_ids`) of each window; windows ascend and may leave gaps.

    One pass over the row groups that they touch; one window and one record batch are in memory.
    """
    if not windows:
        return
    file = pq.ParquetFile(test)
    groups: list[int] = []
    position = first = 0
    for group in range(file.num_row_groups):
        stop = position + file.metadata.row_group(group).num_rows
        if stop > windows[0].start and position < windows[-1].stop:
            first = first if groups else position
            groups.append(group)
        position = stop
    batches = file.iter_batches(1024, row_groups=groups, columns=["row", "label", "input_ids"])
    held: list[pa.RecordBatch] = []
    start = stop = first  # the positions that `held` covers
    for window in windows:
        while stop < window.stop:
            batch = next(batches)
            stop += batch.num_rows
            held.append(batch)
            while start + held[0].num_rows <= window.start and len(held) > 1:
                start += held.pop(0).num_rows
        table = pa.Table.from_batches(held)
        yield table.slice(window.start - start, len(window)).combine_chunks()
        while held and start + held[0].num_rows <= window.stop:
            start += held.pop(0).num_rows


# Parts


def write_part(folder: Path, window: int, batch: int, table: pa.Table, identity: str) -> Path:
    """Write the predictions of whole batches of a window, `batch` being the first of them."""
    sink = pa.BufferOutputStream()
    metadata = {PREFIX + "identity": identity}
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    content = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"part-{window:05d}-{batch:05d}-{digest}.parquet"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def parts_of(folder: Path) -> dict[int, list[Path]]:
    """The parts in a folder by window, in the order of their batches; nothing is opened."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        if match := _PART.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return found


def damage_of_part(path: Path, identity: str) -> str | None:
    """Why a part cannot be used; None when it can."""
    match = _PART.fullmatch(path.name)
    if match is None or sha256_file(path)[:16] != match[3]:
        return "torn or altered (its SHA-256 is not the one in its name)"
    found = provenance_of(pq.read_schema(path)).get("identity")
    return None if found == identity else "made with another model, adapter or setting"


def read_parts(paths: Sequence[Path]) -> pa.Table:
    """The parts' rows, each row once."""
    tables = [pq.read_table(path).replace_schema_metadata(None) for path in paths]
    table = pa.concat_tables(tables or [SCHEMA.empty_table()])
    seen: set[int] = set()
    rows = table["row"].to_pylist()
    keep = [not (row in seen or seen.add(row)) for row in rows]  # type: ignore[func-returns-value]
    return table if all(keep) else table.filter(pa.array(keep))


# The finished shard


def write_shard(path: Path, windows: Iterator[pa.Table], provenance: Provenance) -> None:
    """Write a finished shard atomically from its windows' tables."""
    schema = SCHEMA.with_metadata(provenance.metadata())
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer,
    ):
        for table in windows:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def damage_of_shard(path: Path, row_ids: Sequence[int], identity: str) -> str | None:
    """Why a shard file is not the finished shard of these rows; None when it is.

    Reads all of it, page checksums verified, a record batch at a time.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if provenance_of(file.schema_arrow).get("identity") != identity:
            return "it was made with another model, adapter or setting"
        if file.metadata.num_rows != len(row_ids):
            return f"it has {file.metadata.num_rows} rows instead of {len(row_ids)}"
        if file.schema_arrow.names != SCHEMA.names:
            return "its columns are not those of a shard"
        position = 0
        for batch in file.iter_batches(8192):
            rows = batch.column("row").to_pylist()
            if rows != list(row_ids[position : position + len(rows)]):
                return "its rows are not those of this shard"
            position += len(rows)
    except (OSError, pa.ArrowException, ValueError, UnicodeDecodeError) as error:
        return f"it is torn or altered ({str(error).splitlines()[0] if str(error) else error!r})"
    return None


def row_ids_of(test: Path, rows: range) -> memoryview:
    """The `row` column of a range of positions of the test set.

    Raises:
        StageError: the test set has fewer rows.
    """
    if not rows:
        return memoryview(b"").cast("q")
    file = pq.ParquetFile(test)
    if rows.stop > file.metadata.num_rows:
        raise StageError(f"{test} has {file.metadata.num_rows} rows, row {rows.stop - 1} is wanted")
    pieces, position = [], 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        low, high = max(rows.start - position, 0), min(rows.stop - position, size)
        if low < high:
            column = file.read_row_group(group, columns=["row"])["row"]
            pieces.append(column.slice(low, high - low).combine_chunks())
        position += size
    joined = pa.chunked_array(pieces, type=pa.int64())
    return memoryview(joined.to_numpy())
