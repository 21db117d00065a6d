"""What a path can name, who may read and write there, whether there is room. Writes no file.

`in_the_way` and `unwritable` look at a path before anything is done with it, `is_full` and
`room_again` after it failed; `patiently` reads from a file server that was away; `let_umask_rule`
gives files the mode that they would have had without a library's own mind.
"""

from __future__ import annotations

import errno
import functools
import os
import pwd
import re
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from yelp_hpc.errors import RequestError, YelpHpcError
from yelp_hpc.progress import say

_LONGEST_NAME, _LONGEST_PATH = 255, 4096
"""Bytes, on Linux."""
_NO_UTF8 = re.compile("[\udc80-\udcff]")
"""How Python spells the bytes of a name that are no UTF-8."""
_ROOM_IN_NAME, _ROOM_IN_PATH = 80, 300
"""What is put before a name while its file is written; what a run directory holds below it."""


def in_the_way(path: Path) -> str | None:
    """Why nothing can be or be made at `path`; None when something is there, or nothing hinders."""
    path = path.expanduser()
    whole = path
    with suppress(OSError):  # the working directory is gone
        whole = path.absolute()
    if _NO_UTF8.search(str(whole)):
        return f"{os.fsencode(path)!r} is no name in UTF-8, which records are written in; rename it"
    parts = [len(os.fsencode(part)) for part in path.parts]
    if max(parts, default=0) > _LONGEST_NAME or sum(parts) + len(parts) > _LONGEST_PATH:
        return f"{str(path)[:40]}… is too long a name; choose a shorter one"
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):  # noqa: PTH110, PTH114 - never raise
            return f"{place} does not exist: it is a link to {place.readlink()}, which is not there"
        if os.path.lexists(place):
            if place == path or (os.access(place, os.X_OK) and os.path.isdir(place)):  # noqa: PTH112
                return None
            if os.path.isdir(place):  # noqa: PTH112
                return f"{path} cannot be looked at: you may not enter {place}; name another"
            return f"{path} cannot be there: {place} is a file; name another"
    return None


FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))
"""How a full disk or a used-up quota is called in the message of whoever met it."""
PATIENCE = 120.0
"""Seconds for which room is waited for."""
_ROOM = 2**24


def is_full(folder: Path, said: str) -> bool:
    """Whether the disk of `folder` was full, as `said` tells, or is full now."""
    with suppress(OSError):
        return any(words in said for words in FULL) or shutil.disk_usage(folder).free < _ROOM
    return False


def room_again(folder: Path, give_up: Callable[[], bool]) -> bool:
    """Wait until the disk of `folder` has room, and return whether it has."""
    with suppress(OSError):  # where this is said may be full, too
        say(f"{folder}: the disk is full, or was; waiting up to {PATIENCE:.0f} s for room")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not give_up():
        time.sleep(2)  # of a quota nothing else is known: the next start tells
        with suppress(OSError):
            if shutil.disk_usage(folder).free >= _ROOM:
                return True
    return False


_AWAY = frozenset(
    (
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOLINK, errno.ECOMM, errno.ECONNRESET),
    )
)
"""What a network file system says of a server that is away, or came back as another."""
SERVER_SECONDS = 20.0
"""For so long it is asked again."""
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def patiently(read: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """`read`, asked again while the file server is away."""

    @functools.wraps(read)
    def asked(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        end, pause = time.monotonic() + SERVER_SECONDS, 0.1
        while True:
            try:
                return read(*args, **kwargs)
            except OSError as error:
                if error.errno not in _AWAY or time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    return asked


read_bytes = patiently(Path.read_bytes)


def what_to_do(path: Path, error: OSError, writes: bool = True) -> str:
    """The remedy for a refusal of `path` by the file system's rights, kind or room; "" for others.

    What refuses is the path itself or the nearest folder that is there. `writes`: it was written.
    """
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "free some space (or quota) and run the same command again"
    if error.errno == errno.EROFS:
        return "its file system is read-only here: name a place that can be written"
    if error.errno not in {errno.EACCES, errno.EPERM}:
        return ""
    with suppress(OSError):
        for place in (path, *path.parents):
            if os.path.lexists(place) and not os.access(place, os.W_OK):
                owner = owner_name(place.stat().st_uid)
                seen = os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0))
                mode = "w" if seen else "rwX" if writes else "rX"
                return f"{place} is {owner}'s, who can open it (chmod g+{mode}); or name another"
        if path.parent.stat().st_mode & stat.S_ISVTX:
            return f"{path.parent} lets nobody replace what others own (sticky): name another place"
    return "name another place"


def owner_name(number: int) -> str:
    """A user's name, or the number where nobody knows it."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def unreachable(error: OSError) -> str:
    """What a user is told of a file system that refuses or does not answer; raises other errors.

    Without a name it is the folder one is in, or what standard output leads to.
    """
    if "temporary directory" in str(error):  # tempfile's words, and matplotlib's
        return (
            "there is no folder for temporary files: TMPDIR, /tmp and /var/tmp cannot be written; "
            "name one: export TMPDIR=DIR"
        )
    if error.filename is None and error.errno == errno.ENOENT:
        return "the folder that you are in is no longer there: go to another (cd) and try again"
    if error.filename is None and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return f"what is printed cannot be written where it is sent: {error.strerror}"
    if error.filename is not None and (
        remedy := what_to_do(Path(os.fsdecode(error.filename)).absolute(), error, writes=False)
    ):
        return f"{error.filename}: {error.strerror}; {remedy}"
    if error.errno not in {*_AWAY, errno.EIO}:
        raise error
    where = f"{error.filename}: {error.strerror}"
    return f"{where}. Its file system does not answer: run the same command again later"


def unwritable(path: Path, folder: bool = False) -> str | None:
    """Why `path` cannot be written, as a file or a `folder` with files; None when it can.

    A file is written beside itself and renamed, so that its folder must be writable.
    """
    if hinders := in_the_way(path):
        return hinders
    path = path.expanduser().absolute()
    name, whole = len(os.fsencode(path.name)), len(os.fsencode(path))
    if name > _LONGEST_NAME - _ROOM_IN_NAME or whole > _LONGEST_PATH - _ROOM_IN_PATH:
        return f"{str(path)[:40]}… is too long for what is written there; choose a shorter name"
    if path.is_dir() and not folder:
        return f"{path} is a folder; name a file"
    if os.path.lexists(path) and folder and not path.is_dir():
        return f"{path} is a file; name a folder"
    start = path if folder else path.parent
    there = next(place for place in (start, *start.parents) if os.path.lexists(place))
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{path} cannot be written: you may not write in {there}; name another"
    return None


def refuse_foreign(path: Path, ours: Callable[[Path], bool]) -> None:
    """Refuse to write over a file that the same command has not written.

    Args:
        ours: whether what is there is of that kind; a fault of reading it means that it is not.

    Raises:
        RequestError: it is another.
    """
    if not os.path.lexists(path):
        return
    with suppress(OSError, ValueError, YelpHpcError):
        if ours(path):
            return
    raise RequestError(f"{path} is there already; name another file, or remove it")


def let_umask_rule(folder: Path) -> None:
    """Give files that a library made for their owner alone the mode of any other new file.

    safetensors writes through a temporary file of mode 0600, so that colleagues of a group could
    not read the weights. The folder was made under the same umask.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(mode)
