"""Records of JSON: an object a line, or an array of objects that is read piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

from yelp_hpc.data.formats.record import Record

_PIECE = 1 << 20


def json_lines(file: TextIO) -> Iterator[Record]:
    """`(place, record)` of each line. Raises ValueError for one that is no JSON object."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            hint = ""
            if number == 1 and line.lstrip().startswith("{"):
                hint = "; a record stands on one line, with nothing behind it, or all in an array"
            raise ValueError(f"line {number} is not JSON: {error}{hint}") from None
        except RecursionError:
            raise ValueError(f"line {number} is nested too deeply") from None
        if not isinstance(record, dict):
            array = number == 1 and isinstance(record, list)
            hint = " (a JSON array belongs into a file named .json)" if array else ""
            raise ValueError(f"line {number} is not a JSON object{hint}")
        yield f"line {number}", record


def json_rows(file: TextIO) -> Iterator[Record]:
    """An array of objects, or an object a line, as Kaggle's files are."""
    text = file.read(_PIECE)
    start = text.lstrip()
    if not start.startswith("["):
        yield from json_lines(_Rest(text, file))  # type: ignore[arg-type]
        return
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    text, at, count, ended = start, 1, 0, False
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            rest = text[at + 1 :]
            while rest:
                if rest.strip():
                    raise ValueError("something stands behind the end of the array")
                rest = file.read(_PIECE)
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
