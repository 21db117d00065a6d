"""Records of data files as they lie: one reader a format, a record at a time.

csv, tsv, jsonl (or ndjson), json (an array, or a record a line), parquet and arrow, the first three
also behind gz, zst or zip, endings in any letter case; a folder of them, a glob, or a folder that
`datasets.save_to_disk` wrote. Reads files, writes nothing.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from yelp_hpc.errors import RequestError, nearest_path

TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
BINARY_FORMATS = (".parquet", ".arrow", ".feather")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zip": "zip"}
_PIECE = 1 << 20
Record = tuple[str, dict[Any, Any]]
"""Where it stands, and its columns."""


def data_files(place: str) -> list[Path]:
    """The files that a path, a folder or a glob names, in the order of their names.

    Raises:
        RequestError: there are none, or one has no format that can be read.
    """
    path = Path(place).expanduser()
    if glob.has_magic(place) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not found:
            raise RequestError(f"no file matches {place}")
    elif path.is_dir():
        found = _folder(path)
    elif path.is_file():
        found = [path]
    else:
        near = nearest_path(path)
        hint = f"; did you mean {near}?" if near else ""
        raise RequestError(f"data file {path} does not exist{hint}")
    for file in found:
        format_of(file)
    return found


def _folder(path: Path) -> list[Path]:
    """The data files of a folder."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise RequestError(
            f"{path} holds the splits {', '.join(splits)}: set data.train and data.test to "
            f"{' and '.join(str(path / split) for split in splits[:2])}"
        )
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / file["filename"] for file in state["_data_files"]]
    found = [p for p in sorted(path.iterdir()) if p.is_file() and _formats(p)[0]]
    if not found:
        raise RequestError(f"folder {path} holds no data file ({', '.join(_every())})")
    return found


def _every() -> tuple[str, ...]:
    return (*TEXT_FORMATS, *BINARY_FORMATS)


def _formats(path: Path) -> tuple[str, str]:
    """`(format, compression)` by the name's endings, each "" where there is none."""
    endings = [ending.lower() for ending in path.suffixes]
    compression = endings.pop() if endings and endings[-1] in COMPRESSIONS else ""
    ending = endings[-1] if endings and endings[-1] in _every() else ""
    return ("" if compression and ending in BINARY_FORMATS else ending), compression


def format_of(path: Path) -> str:
    """The format of a data file, a lower-case ending. Raises RequestError if it has none."""
    found, _ = _formats(path)
    if not found:
        packed = ", ".join(COMPRESSIONS)
        raise RequestError(
            f"data file {path} must end in {', '.join(_every())} (text also in {packed})"
        )
    return found


def records(path: Path, header: bool = True) -> Iterator[Record]:
    """`(place, record)` of each row; without a `header` a csv's columns are its numbers, from 0.

    Raises:
        RequestError: the file cannot be read; what is wrong and where.
    """
    kind = format_of(path)
    try:
        if kind in BINARY_FORMATS:
            yield from _arrow(path)
            return
        with ExitStack() as stack:
            file = _open(path, stack)
            if kind in (".csv", ".tsv"):
                yield from _csv(file, "\t" if kind == ".tsv" else ",", header)
            elif kind == ".json":
                yield from _json(file)
            else:
                yield from _json_lines(file)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} "
            f"{_line_of(path)}); convert it, for example with iconv"
        ) from None
    except (csv.Error, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None


def text_fault(record: Mapping[Any, Any], column: str) -> str:
    """What is wrong with the text of a record, "" when it can be used."""
    text = record.get(column)
    if None in record:  # csv: the rest of the line would be lost without a word
        return "more fields than the header; quote a text that has a comma"
    if not isinstance(text, str) or not text.strip():
        what = "is empty" if text is None or isinstance(text, str) else f"is {text!r}, no text"
        return f"{column} {what}"
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return f"{column} holds half a character (a lone surrogate)"
    return ""


def unescaped(text: str) -> str:
    """A text of Yelp's own csv, whose line ends and quotes are spelled out."""
    return text.replace("\\n", "\n").replace('\\"', '"')


def _binary(path: Path, stack: ExitStack) -> Any:
    """A compressed or plain file as bytes."""
    compression = COMPRESSIONS.get(_formats(path)[1])
    if compression == "zip":
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = [m for m in archive.namelist() if not m.endswith("/") and "__MACOSX" not in m]
        if len(members) != 1:
            raise ValueError(f"it holds {len(members)} files ({', '.join(members[:5])}), not one")
        return stack.enter_context(archive.open(members[0]))
    if compression:
        import pyarrow as pa

        return stack.enter_context(pa.input_stream(str(path), compression=compression))
    return stack.enter_context(path.open("rb"))


def _open(path: Path, stack: ExitStack) -> TextIO:
    """Its text; a byte order mark is no part of it."""
    return io.TextIOWrapper(_binary(path, stack), encoding="utf-8-sig", newline="")


def _line_of(path: Path) -> str:
    """Where the first byte that is not UTF-8 lies."""
    with ExitStack() as stack:
        for number, line in enumerate(io.BufferedReader(_binary(path, stack)), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"in line {number}"
    return "at its end"


def _csv(file: TextIO, delimiter: str, header: bool) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    for fields in reader:
        if names is None:
            names = fields if header else [str(i) for i in range(len(fields))]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the header names {', '.join(twice)} twice")
            if header:
                continue
        if not fields:
            continue
        record: dict[Any, Any] = dict(zip(names, fields, strict=False))
        if len(fields) > len(names):
            record[None] = fields[len(names) :]
        yield f"line {reader.line_num}", record


def _json_lines(file: TextIO) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
        except RecursionError:
            raise ValueError(f"line {number} is nested too deeply") from None
        if not isinstance(record, dict):
            array = number == 1 and isinstance(record, list)
            hint = " (a JSON array belongs into a file named .json)" if array else ""
            raise ValueError(f"line {number} is not a JSON object{hint}")
        yield f"line {number}", record


def _json(file: TextIO) -> Iterator[Record]:
    """An array of objects, or an object a line, as Kaggle's files are."""
    text = file.read(_PIECE)
    start = text.lstrip()
    if not start.startswith("["):
        yield from _json_lines(_Rest(text, file))  # type: ignore[arg-type]
        return
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    text, at, count, ended = start, 1, 0, False
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            return
        try:
            record, end = decoder.raw_decode(text, at) if at < len(text) else (None, len(text))
        except RecursionError:
            raise ValueError(f"entry {count + 1} is nested too deeply") from None
        except ValueError as error:
            if ended:
                raise ValueError(f"entry {count + 1} is not JSON: {error}") from None
            end = len(text)
        if end == len(text):  # the entry, or the array, goes on in the next piece
            if ended:
                raise ValueError("the array does not end")
            piece = file.read(max(_PIECE, len(text) - at))
            text, at, ended = text[at:] + piece, 0, not piece
            continue
        count += 1
        if not isinstance(record, dict):
            raise ValueError(f"entry {count} is not a JSON object")
        yield f"entry {count}", record
        at = end


class _Rest:
    """The lines of a file of which a piece was read already."""

    def __init__(self, text: str, file: TextIO) -> None:
        self.text, self.file = text, file

    def __iter__(self) -> Iterator[str]:
        lines = self.text.split("\n")
        yield from (line + "\n" for line in lines[:-1])
        yield lines[-1] + self.file.readline()
        yield from self.file


def arrow_batches(path: Path, rows: int = 1024) -> Iterator[Any]:
    """The record batches of a parquet or Arrow file, at most so many rows each."""
    import pyarrow.parquet as pq

    if format_of(path) == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(rows)
    else:
        yield from _ipc_batches(path, rows)


def _arrow(path: Path) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    try:
        for batch in arrow_batches(path):
            for record in batch.to_pylist():
                yield f"row {number}", record
                number += 1
    except pa.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _ipc_batches(path: Path, rows: int = 1024) -> Iterator[Any]:
    """The record batches of an Arrow file or stream, in small slices."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        reader: Any = pa.ipc.open_file(source)
        found = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        found = iter(pa.ipc.open_stream(pa.memory_map(str(path))))
    for batch in found:
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def class_names(path: Path, column: str) -> list[str] | None:
    """The names of a ClassLabel column that `datasets` recorded in the file, or None."""
    kind = format_of(path)
    if kind not in BINARY_FORMATS:
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path) if kind == ".parquet" else next(_ipc_batches(path)).schema
    except (pa.ArrowException, OSError, StopIteration):
        return None  # said when its rows are read
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = ((about.get("info") or {}).get("features") or {}).get(column) or {}
    names = feature.get("names") if isinstance(feature, dict) else None
    return [str(name) for name in names] if names else None
