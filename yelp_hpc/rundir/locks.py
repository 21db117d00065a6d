"""One writer at a time, on file systems without locks too."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.rundir.files import TEMPORARY, abandoned, host_name, write_failure

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF}


POLL = 0.1


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
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            _pause(path, end)


def _pause(path: Path, end: float | None) -> None:
    if end is not None and time.monotonic() >= end:
        with suppress(OSError):
            if writer := TEMPORARY.fullmatch(path.read_text(errors="replace")):
                raise Busy(f"process {writer['pid']} on {writer['host']} is at it")
        raise Busy("another process is at it")
    time.sleep(POLL)


def _owner() -> bytes:
    return f".lock.{host_name()}.{os.getpid()}.tmp".encode()


def _hold(path: Path, end: float | None) -> Path:
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
            _pause(path, end)
        except OSError as error:
            raise StageError(write_failure(path, error)) from error
