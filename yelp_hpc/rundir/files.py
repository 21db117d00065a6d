"""Files that are whole or absent: atomic writes, hashes and completion markers.

Every file is written beside itself, flushed to disk and renamed. A directory is complete when its
marker, written last and holding the SHA-256 of what it covers, is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from yelp_hpc.errors import StageError

MARKER = "complete.json"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`.

    The temporary file is flushed to disk before the rename, the directory after it. When the block
    raises, `path` keeps its old content and the temporary file is removed.

    Raises:
        StageError: the disk is full, the quota is used up or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise StageError(write_failure(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_failure(path: Path, error: OSError) -> str:
    """A sentence for a failed write: what, where and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"cannot write {path}: {error.strerror}. Nothing was overwritten; free some space "
            "(or quota) and run the same command again."
        )
    return f"cannot write {path}: {error.strerror or error}. Nothing was overwritten."


def sync_directory(folder: Path) -> None:
    """Flush a directory's entries, so that a rename survives a crash of the node."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically. Raises `StageError` as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StageError: the file is missing or torn.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing") from error
    except (ValueError, OSError) as error:
        raise StageError(f"{path} cannot be read as JSON: {error}") from error


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record with a single write, so that concurrent writers do not mix lines."""
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StageError(write_failure(path, error)) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a JSON-lines file; a torn line is left out, no file gives []."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_marker(folder: Path, names: list[str], **extra: Any) -> None:
    """Declare `folder` complete: the marker holds each named file's SHA-256 and `extra`."""
    hashes = {name: sha256_file(folder / name) for name in sorted(names)}
    write_json(folder / MARKER, {"files": hashes, **extra})


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of `folder`, or None when there is none or it is torn."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("files"), dict) else None


def damaged_files(folder: Path) -> list[str]:
    """What is wrong with a marked folder: one line for a missing, torn or altered file.

    An empty list means complete and whole. A folder without a marker is reported as such.
    """
    marker = read_marker(folder)
    if marker is None:
        return [f"{folder / MARKER} is missing or torn"]
    problems = []
    for name, digest in marker["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif sha256_file(path) != digest:
            problems.append(f"{path} is not what was written (SHA-256 differs)")
    return problems


def is_complete(folder: Path) -> bool:
    """True when the marker is there and every file that it covers is whole."""
    return not damaged_files(folder)
