"""What the first bytes of a data file tell: that it is something else than its name says."""

from __future__ import annotations

from pathlib import Path

_DISGUISED = (
    (b"PK\x03\x04", ".zip", "a zip archive, or an Excel workbook: save its table as csv"),
    (b"\xd0\xcf\x11\xe0", "", "an Excel workbook: save its table as csv"),
    (b"\x1f\x8b", ".gz", "gzip: end its name in .gz"),
    (b"\x28\xb5\x2f\xfd", ".zst", "zstd: end its name in .zst"),
    (b"BZh9", "", "bzip2: unpack it"),
    (b"\xfd7zXZ", "", "xz: unpack it"),
    (b"PAR1\x15", ".parquet", "parquet: end its name in .parquet"),
    (b"ARROW1\0\0", ".arrow .feather", "Arrow: end its name in .arrow"),
    (b"FEA1", "", "Feather of version 1: write it as parquet"),
    (b"\xff\xfe", "", "UTF-16, not UTF-8 text: `iconv -f UTF-16 -t UTF-8` converts it"),
    (b"\xfe\xff", "", "UTF-16, not UTF-8 text: `iconv -f UTF-16 -t UTF-8` converts it"),
    (b"version https://git-lfs", "", "a pointer of Git LFS: `git lfs pull` fetches the file"),
    (b"<!doctype html", "", "a web page: download the file itself"),
    (b"<html", "", "a web page: download the file itself"),
)
"""How a file begins that is no text; the endings that say so; what it is and what to do."""


def disguise(path: Path, endings: tuple[str, str]) -> str:
    """What a file is by its first bytes, if that is nothing that its `endings` say; mostly ""."""
    with path.open("rb") as file:
        head = file.read(64)
    for begins, right, what in _DISGUISED:
        if head.lower().startswith(begins.lower()) and not {*right.split()} & {*endings}:
            return what
    return ""
