"""Records of data files as they lie: one reader a format, a record at a time.

csv (apart by commas or by what its header shows), tsv, jsonl (or ndjson), json (an array, or a
record a line), parquet and arrow, the first three also behind gz, zst or zip, endings in any letter
case; a folder of them, a glob, or a folder that `datasets.save_to_disk` wrote. Reads files, writes
nothing.
"""

from __future__ import annotations

import glob
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TextIO

from yelp_hpc.data.formats.arrow_rows import arrow_rows
from yelp_hpc.data.formats.csv_rows import DELIMITERS, csv_rows
from yelp_hpc.data.formats.endings import BINARY_FORMATS, COMPRESSIONS, FORMATS, TEXT_FORMATS
from yelp_hpc.data.formats.first_bytes import disguise
from yelp_hpc.data.formats.json_rows import json_lines, json_rows
from yelp_hpc.data.formats.record import Record
from yelp_hpc.errors import RequestError, nearest_path

_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


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
    elif path.exists():
        raise RequestError(f"{path} is no file (a pipe?): rows are read more than once; save them")
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
    shown = [p for p in sorted(path.iterdir()) if p.name[0] not in "._"]
    found = [p for p in shown if p.is_file() and _formats(p)[0]]
    if not found:
        raise RequestError(f"folder {path} holds no data file ({', '.join(FORMATS)})")
    sets: dict[str, Path] = {}
    for file in found:
        if (kind := re.split(r"[-_.]", file.name.lower())[0]) in _SPLITS:
            sets.setdefault(kind, file)
    if len(sets) > 1:
        raise RequestError(
            f"folder {path} holds several sets ({', '.join(p.name for p in sets.values())}): set "
            "data.train and data.test to the file, or the glob, of each"
        )
    return found


def _formats(path: Path) -> tuple[str, str]:
    """`(format, compression)` by the name's endings, each "" where there is none."""
    endings = [ending.lower() for ending in path.suffixes]
    compression = endings.pop() if endings and endings[-1] in COMPRESSIONS else ""
    ending = endings[-1] if endings and endings[-1] in FORMATS else ""
    if compression == ".zip" and not ending:  # the file in it has one
        with suppress(OSError, zipfile.BadZipFile):
            ending = next((p.suffix.lower() for p in map(Path, _members(path))), "")
            ending = ending if ending in TEXT_FORMATS else ""
    return ("" if compression and ending in BINARY_FORMATS else ending), compression


def _members(path: Path) -> list[str]:
    """The text files in a zip archive, or all of its files where there is none."""
    with zipfile.ZipFile(path) as archive:
        names = [m for m in archive.namelist() if not m.endswith("/") and "__MACOSX" not in m]
    return [m for m in names if Path(m).suffix.lower() in TEXT_FORMATS] or names


def format_of(path: Path) -> str:
    """The format of a data file, a lower-case ending. Raises RequestError if it has none."""
    found, compression = _formats(path)
    if not found:
        packed = ", ".join(COMPRESSIONS)
        with suppress(OSError):
            if what := disguise(path, ("", compression)):
                raise RequestError(f"data file {path} is {what}")
        raise RequestError(
            f"data file {path} must end in {', '.join(FORMATS)} (text also in {packed})"
        )
    return found


def records(path: Path, header: bool = True) -> Iterator[Record]:
    """`(place, record)` of each row; without a `header` a csv's columns are its numbers, from 0.

    Raises:
        RequestError: the file cannot be read; what is wrong and where.
    """
    kind = format_of(path)
    try:
        if what := disguise(path, _formats(path)):
            raise ValueError(f"it is {what}")
        if kind in BINARY_FORMATS:
            yield from arrow_rows(path)
            return
        with ExitStack() as stack:
            file = _open(path, stack)
            if kind in DELIMITERS:
                yield from csv_rows(file, DELIMITERS[kind], header)
            elif kind == ".json":
                yield from json_rows(file)
            else:
                yield from json_lines(file)
    except UnicodeDecodeError as error:
        coding = "UTF-16LE" if b"\0" in error.object else "WINDOWS-1252"
        raise RequestError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} "
            f"{_line_of(path)}); convert it: iconv -f {coding} -t UTF-8 {path.name} > NEW"
        ) from None
    except _UNREADABLE as error:
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
        members = _members(path)
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
