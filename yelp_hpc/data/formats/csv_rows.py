"""Rows of csv: apart by commas, tabs or what the header shows, with what spreadsheets add to them.

Wrong quoting ends in an error or is told by its traces; it never merges rows without a word.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any, TextIO

from yelp_hpc.data.formats.record import Record, check_names

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def csv_rows(file: TextIO, delimiter: str, header: bool) -> Iterator[Record]:
    """`(place, record)` of each row; fields beyond the header's stand under None.

    A `header` without the `delimiter` names another one by what it shows; a space behind each
    delimiter of it belongs to none of the fields. Without a header columns are numbers, from 0.

    Raises:
        ValueError: the quoting is wrong or not meant as such, or the header stands there twice.
    """
    csv.field_size_limit(sys.maxsize)
    skipped, first = 0, ""
    for first in file:
        if separator := re.fullmatch(r'"?sep=(.)"?\s*', first):  # Excel's own first line
            delimiter = separator[1]
        elif first.strip():
            break
        skipped += 1
    first = first.lstrip("\ufeff")
    if "\0" in first:
        text = "its first line holds zero bytes; if it is UTF-16 without a mark, convert it: "
        raise ValueError(text + "iconv -f UTF-16LE -t UTF-8")
    shown = [other for other in ",;\t|" if other in first]
    if header and delimiter not in first and len(shown) == 1:
        delimiter = shown[0]
    spaced = header and 0 < first.count(delimiter) == first.count(f"{delimiter} ")
    reader = csv.reader(
        chain([first], file), delimiter=delimiter, strict=True, skipinitialspace=spaced
    )
    names: list[str] | None = None
    named: list[str] = []
    line = several = alike = 0
    try:
        for fields in reader:
            own, line = line, reader.line_num
            if not fields:
                continue
            if names is None:
                named = fields
                names = _names(fields) if header else [str(i) for i in range(len(fields))]
                if header:
                    continue
            elif header and fields == named:
                raise ValueError(f"line {skipped + line} repeats the header: remove it")
            while len(fields) > len(names) and not fields[-1].strip():
                fields.pop()
            if line - own > 1:
                several += 1
                alike += _swallows_rows(fields, len(names), delimiter)
            record: dict[Any, Any] = dict(zip(names, fields, strict=False))
            if len(fields) > len(names):
                record[None] = fields[len(names) :]
            yield f"line {skipped + line}", record
    except csv.Error as error:
        where = f"line {skipped + reader.line_num}"
        if "end of data" in str(error):
            raise ValueError(f"a quote opens in line {skipped + line + 1} and never ends") from None
        hint = "a quote inside a quoted text is written twice"
        raise ValueError(f"{where}: {error}; {hint}") from None
    if alike >= (1 if delimiter in "\t|" else 3) and 2 * alike > several:
        raise ValueError(
            f"{alike} of its texts hold whole rows: quotes are letters in it, it seems, and open "
            "texts that end in another row; write it as jsonl"
        )


def _names(fields: list[str]) -> list[str]:
    """The columns that a csv's first line names; several without a name get one."""
    names = [name.strip("\ufeff \t") for name in fields]
    if names.count("") > 1:
        names = [name or f"column {i}" for i, name in enumerate(names)]
    check_names(names)
    return names


def _swallows_rows(fields: list[str], columns: int, delimiter: str) -> bool:
    """Whether a text of several lines reads as a row's end, whole rows and a row's beginning."""
    place = next((i for i, field in enumerate(fields) if "\n" in field or "\r" in field), 0)
    counts = [part.count(delimiter) for part in re.split(r"\r\n|\r|\n", fields[place])]
    rows = [columns - 1 - place, *[columns - 1] * (len(counts) - 2), place]
    return columns > 1 and counts == rows
