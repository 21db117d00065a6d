"""Files that are whole or absent: atomic writes, hashes, completion markers, one reader of JSON.

Every file is written beside itself, flushed to disk and renamed. A directory is complete when its
marker, written last and holding the SHA-256 of what it covers, is there. A temporary file's name
says who writes it, so that those of killed writers are known and swept.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.modes import let_umask_rule, read_bytes, what_to_do

MARKER = "complete.json"
TEMPORARY = re.compile(r"\..+?(?:\.(?P<host>[^.]+))?\.(?P<pid>\d+)\.tmp", re.DOTALL)
"""`.NAME.HOST.PID.tmp`; see `temporary_name`."""
_DAY = 86_400.0
_HALF = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")
"""A half of a character beyond 16 bit, as it stands or escaped; two make a whole one."""
_NOT_FLUSHABLE = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
"""What some network file systems answer when a folder is to be flushed."""


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`.

    The temporary file is flushed to disk before the rename, the directory after it. When the block
    raises, `path` keeps its old content and the temporary file is removed.

    Raises:
        StageError: the disk is full, the quota is used up or the folder cannot be written; the
            message says what is at `path` now.
    """
    temporary = temporary_name(path)
    written = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        written = True
        temporary.replace(path)
    except OSError as error:
        # a network file system may have renamed the file and lost the answer
        replaced = written and not os.path.lexists(temporary) and os.path.lexists(path)
        raise StageError(write_failure(path, error, replaced)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    try:
        sync_directory(path.parent)
    except OSError as error:
        raise StageError(write_failure(path, error, replaced=True)) from error


@contextmanager
def atomic_folder(folder: Path, as_good: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a new folder beside `folder`; when the block ends well it takes its place.

    The block flushes the files that it writes (`write_synced`), folders are flushed here. What
    stood at `folder` stays as it was until then, and for good when the block raises.

    Args:
        as_good: says of what stands there meanwhile, made by somebody else, that it may stay.

    Raises:
        StageError: the disk is full, the quota is used up or the folder cannot be written; the
            message says what is at `folder` now.
    """
    temporary = temporary_name(folder)
    old = temporary.with_name(f".old{temporary.name}")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        let_umask_rule(temporary)
        for inner in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            sync_directory(inner)
        there = os.path.lexists(folder)
        if there and as_good and as_good(folder):
            return
        if there:
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if there:
                old.rename(folder)
            raise
    except OSError as error:
        raise StageError(write_failure(folder, error)) from error
    finally:
        remove(temporary)
        if os.path.lexists(folder):
            remove(old)
    try:
        sync_directory(folder.parent)
    except OSError as error:
        raise StageError(write_failure(folder, error, replaced=True)) from error


def write_synced(path: Path, content: bytes) -> None:
    """Write a file of a new folder and flush it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_failure(path: Path, error: OSError, replaced: bool = False) -> str:
    """A sentence for a failed write: what, where, what is there now and what to do.

    Args:
        replaced: the new content stands at `path` already, but it may not be on the disk.
    """
    why = error.strerror or error
    if replaced:
        return (
            f"{path} holds its new content, but it could not be flushed to disk: {why}. A crash of "
            "the machine may undo it; run the same command again."
        )
    remedy = what_to_do(path, error)
    return f"cannot write {path}: {why}. Nothing was overwritten{f'; {remedy}' if remedy else ''}."


def sync_directory(folder: Path) -> None:
    """Flush a directory's entries, if the file system can: a rename then survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FLUSHABLE:
            raise
    finally:
        os.close(descriptor)


def sweep(*folders: Path) -> None:
    """Remove what killed writers left in `folders` (not below them).

    A temporary goes when its writer is surely dead: a process of this machine that is gone, or one
    of any machine that has not touched it for a day.
    """
    for folder in folders:
        try:
            paths = list(folder.iterdir())
        except OSError:
            continue
        for path in paths:
            match = TEMPORARY.fullmatch(path.name)
            if match and abandoned(path, match):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def abandoned(path: Path, writer: re.Match[str] | None) -> bool:
    """Whether the process that `writer` names, see `TEMPORARY`, is surely gone."""
    if writer and writer["host"] == host_name() and int(writer["pid"]) != os.getpid():
        try:
            os.kill(int(writer["pid"]), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:
            pass  # somebody else's, and alive
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > _DAY
    return False


def host_name() -> str:
    """This machine's name as a part of a file's name."""
    return re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically. Raises `StageError` as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON: what `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text from a file that anybody may have changed.

    Raises:
        ValueError: it is not JSON in UTF-8, is nested too deeply for a reader, holds a number that
            no float can (1e309, NaN, an integer of 400 digits) or half a character.
    """
    text = text if isinstance(text, str) else text.removeprefix(codecs.BOM_UTF8).decode()
    try:
        value = json.loads(
            text, parse_float=_finite_float, parse_int=_finite_int, parse_constant=_refuse_constant
        )
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _finite_int(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"the number {text[:20]}… is too large")
    return int(text)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def read_json(path: Path) -> Any:
    """Read JSON; see `parse_json` for what is refused.

    Raises:
        StageError: the file is missing or torn.
    """
    try:
        return parse_json(read_bytes(path))
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing") from error
    except (ValueError, OSError) as error:
        raise StageError(f"{path} cannot be read as JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `StageError` as `read_json` does, and for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise StageError(f"{path} holds no JSON object")
    return value


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record whole: a line end first where a killed writer left a torn line.

    Raises:
        StageError: the record could not be kept; the message says which.
    """
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            alone = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back when the file is closed
            except OSError:
                alone = False
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                line = b"\n" + line
            try:
                _write_all(descriptor, line)
                os.fsync(descriptor)
            except OSError:
                if alone:  # nobody has written behind it
                    with suppress(OSError):
                        os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        shown = json.dumps(record, ensure_ascii=True)
        raise StageError(
            f"cannot append to {path}: {error.strerror or error}. This record is not kept: "
            f"{shown[:300]}{'…' if len(shown) > 300 else ''}"
        ) from error


def _write_all(descriptor: int, content: bytes) -> None:
    """Write all of it: a disk that fills up takes a part first and says so at the next call."""
    rest = memoryview(content)
    while rest:
        count = os.write(descriptor, rest)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[count:]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a JSON-lines file; a torn line is left out, no file gives []."""
    records = []
    try:
        lines = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StageError(f"{path} cannot be read: {error.strerror}") from error
    for line in lines:
        with suppress(ValueError):
            if isinstance(record := parse_json(line), dict):
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
    """The marker of `folder`, or None when there is none, it is torn or names a file elsewhere."""
    try:
        marker = read_object(folder / MARKER)
    except StageError:
        return None
    files = marker.get("files")
    if not isinstance(files, dict) or any(map(leads_out, files)):
        return None
    return marker if all(isinstance(digest, str) for digest in files.values()) else None


def leads_out(name: str) -> bool:
    """Whether a marker's name is not that of a file below its folder."""
    path = PurePath(name)
    return not path.parts or path.is_absolute() or ".." in path.parts or not name.isprintable()


def damaged_files(folder: Path) -> list[str]:
    """What is wrong with a marked folder, a line a file; [] means complete and whole."""
    marker = read_marker(folder)
    if marker is None:
        with suppress(StageError, AttributeError, TypeError):
            outside = [name for name in read_object(folder / MARKER)["files"] if leads_out(name)]
            return [f"{folder / MARKER} names {name!r}, outside of its folder" for name in outside]
        return [f"{folder / MARKER} is missing or torn"]
    problems = []
    for name, digest in marker["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif sha256_file(path) != digest:
                problems.append(f"{path} is not what was written (SHA-256 differs)")
        except PermissionError:
            problems.append(f"{path} may not be read by you; its owner can: chmod a+rX {folder}/*")
    return problems


def is_complete(folder: Path) -> bool:
    """True when the marker is there and every file that it covers is whole."""
    return not damaged_files(folder)
