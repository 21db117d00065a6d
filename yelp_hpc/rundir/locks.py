"""One writer at a time, on file systems without locks too."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.progress import say
from yelp_hpc.rundir.files import TEMPORARY, abandoned, host_name, write_failure

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF}


POLL, SILENT = 0.1, 10.0
"""Seconds between two tries, and until a wait is spoken of."""


class Busy(RequestError):
    """Somebody else holds the lock; the message says who."""


@contextmanager
def locked(path: Path, wait: float | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which stays and names its holder; others wait.

    The kernel's lock, which NFS hands on to its server and which ends with the process. On a file
    system without locks the file `path`.held, which only one can make, stands in; that of a dead
    writer is taken over.

    Args:
        wait: seconds to wait for it; None: as long as it takes.

    Raises:
        Busy: somebody else still holds it then.
        StageError: the lock file cannot be made.
    """
    held = None
    end = None if wait is None else time.monotonic() + wait
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StageError(write_failure(path, error)) from error
    try:
        try:
            _lock(path, descriptor, end)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise StageError(f"cannot lock {path}: {error.strerror}") from error
            held = _hold(path.with_name(f"{path.name}.held"), end)
        else:
            with suppress(OSError):  # a full disk: only the words of a refusal are lost
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _owner(), 0)
        yield
    finally:
        os.close(descriptor)
        if held is not None:
            held.unlink(missing_ok=True)


def _lock(path: Path, descriptor: int, end: float | None) -> None:
    turns = _turns(path, end, "")
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        next(turns)


def _turns(path: Path, end: float | None, remedy: str) -> Iterator[None]:
    """Wait for one turn after the other; who waits for long is told for whom, and the remedy."""
    told = time.monotonic() + SILENT
    while True:
        if end is not None and time.monotonic() >= end:
            raise Busy(f"{_holder(path)} is at it")
        if time.monotonic() > told:
            say(f"waiting for {_holder(path)}, which holds {path}{remedy}")
            told = math.inf
        time.sleep(POLL)
        yield


def _holder(path: Path) -> str:
    with suppress(OSError):
        if writer := TEMPORARY.fullmatch(path.read_text(errors="replace")):
            return f"process {writer['pid']} on {writer['host']}"
    return "another process"


def _owner() -> bytes:
    return f".lock.{host_name()}.{os.getpid()}.tmp".encode()


def _hold(path: Path, end: float | None) -> Path:
    turns = _turns(path, end, "; if that process is gone, remove the file")
    while True:
        try:
            with path.open("xb") as file:
                file.write(_owner())
            return path
        except FileExistsError:
            with suppress(OSError):
                writer = TEMPORARY.fullmatch(path.read_text(errors="replace"))
                if abandoned(path, writer):
                    path.unlink()
                    continue
            next(turns)
        except OSError as error:
            raise StageError(write_failure(path, error)) from error
