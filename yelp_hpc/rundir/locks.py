"""One writer at a time, on file systems without locks too."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import TEMPORARY, abandoned, host_name, write_failure

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays; others wait.

    On a file system without locks the file `path`.held, which only one can make, stands in; that
    of a dead writer is taken over.

    Raises:
        StageError: the lock file cannot be made.
    """
    held = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StageError(write_failure(path, error)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise StageError(f"cannot lock {path}: {error.strerror}") from error
            held = _hold(path.with_name(f"{path.name}.held"))
        yield
    finally:
        os.close(descriptor)
        if held is not None:
            held.unlink(missing_ok=True)


def _hold(path: Path) -> Path:
    while True:
        try:
            with path.open("x") as file:
                file.write(f".lock.{host_name()}.{os.getpid()}.tmp")
            return path
        except FileExistsError:
            with suppress(OSError):
                writer = TEMPORARY.fullmatch(path.read_text(errors="replace"))
                if abandoned(path, writer):
                    path.unlink()
                    continue
            time.sleep(0.05)
        except OSError as error:
            raise StageError(write_failure(path, error)) from error
