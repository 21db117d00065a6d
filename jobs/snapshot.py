"""Freeze what a submission runs, code and settings, and compare it with its digest before use.

Copies the package into RUN/code/DIGEST; jobs put that folder first on PYTHONPATH. Stages in an
image use the image's own wheel, whose hash is recorded instead. Whoever can write to the run
directory could plant a folder of that name: so it is compared with its digest here before it is
used again, and on the node by a line of the sbatch script, which Slurm keeps and which imports
nothing of the folder.
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yelp_hpc.errors import StageError
from yelp_hpc.own_files import IMPORT_ROOT, PROJECT, package_files, version
from yelp_hpc.rundir.files import (
    atomic_folder,
    read_object,
    sweep,
    write_json,
    write_synced,
)
from yelp_hpc.rundir.modes import owner_name
from yelp_hpc.rundir.paths import RunPaths

LETTERS = 12
"""Of a digest, in a name."""

# What the sbatch script has the node's Python run, isolated (-I): the digests of a folder of code
# and of a file of settings, as `code_digest` and `settings_digest` have them.
_CHECK = """
import hashlib, json, os, sys
code, expected, settings, digest = sys.argv[1:]
found, names, text = hashlib.sha256(), [], ""
try:
    for folder, inner, files in os.walk(code):
        names += [os.path.relpath(os.path.join(folder, name), code) for name in inner + files]
    for name in sorted(names):
        path = os.path.join(code, name)
        if os.path.isdir(path) and not os.path.islink(path):
            continue
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            content = file.read()
        found.update(name.encode() + b"\\0%d\\0" % len(content) + content)
    with open(settings, "rb") as file:
        text = json.dumps(json.load(file), sort_keys=True)
except (OSError, ValueError, RecursionError):
    expected = ""
if found.hexdigest() != expected or hashlib.sha256(text.encode()).hexdigest() != digest:
    sys.exit(f"{code} or {settings} is not what was submitted, so nothing is run; submit again")
"""


def freeze(paths: RunPaths) -> Path:
    """Copy the running code, unless this very version is there, and return its folder.

    A folder of that name with other content is replaced.

    Raises:
        StageError: it cannot be written.
    """
    contents = {str(name): (IMPORT_ROOT / name).read_bytes() for name in package_files()}
    # what importlib.metadata reads: the version of this code, not of what is installed later
    metadata = f"Metadata-Version: 2.1\nName: {PROJECT}\nVersion: {version()}\n"
    contents[f"{PROJECT.replace('-', '_')}-{version()}.dist-info/METADATA"] = metadata.encode()
    digest = _digest(contents)
    folder = paths.code / digest[:LETTERS]
    sweep(paths.code)
    if code_digest(folder) == digest:
        return folder
    # in place of one that is planted, torn or touched; unless someone else was faster
    with atomic_folder(folder, lambda made: code_digest(made) == digest) as temporary:
        for name, content in contents.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(temporary / name, content)
    return folder


def freeze_settings(paths: RunPaths, content: dict[str, Any]) -> Path:
    """Write what every job of a submission reads, unless this very content is there.

    Raises:
        StageError: it cannot be written.
    """
    digest = _text_digest(content)
    path = paths.logs / f"cluster-{digest[:LETTERS]}.json"
    sweep(paths.logs)
    if path.is_symlink() or settings_digest(path) != digest:
        write_json(path, content)
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file of `freeze_settings`.

    Raises:
        StageError: it is missing, or its content is not what its name says.
    """
    content = read_object(path)
    digest = path.stem.partition("-")[2]
    if len(digest) != LETTERS or not _text_digest(content).startswith(digest):
        raise _altered(path)
    return content


def require_frozen(code: Path, settings: Path) -> None:
    """Compare both with the digests in their names.

    Raises:
        StageError: one of them is not what was submitted.
    """
    read_settings(settings)
    if len(code.name) != LETTERS or not (code_digest(code) or "").startswith(code.name):
        raise _altered(code)


def _altered(what: Path) -> StageError:
    return StageError(f"{what} is not what was submitted, so nothing is run; submit again")


def check_line(python: str, code: Path, settings: Path) -> str:
    """The line of a job's script that ends it when `code` or `settings` is not what it is now."""
    digests = (code_digest(code) or "DIGEST", settings_digest(settings) or "DIGEST")
    values = [str(code), digests[0], str(settings), digests[1]]
    return f"{shlex.quote(python)} -I -c {shlex.quote(_CHECK)} {shlex.join(values)} || exit"


def code_digest(folder: Path) -> str | None:
    """SHA-256 over the names and contents of a folder's files; None if there is no such folder.

    A link in it, which may lead elsewhere tomorrow, makes it "", the digest of nothing.
    """
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        paths = [
            Path(top, name) for top, *both in os.walk(folder) for part in both for name in part
        ]
        if any(path.is_symlink() for path in paths):
            return ""
        files = (path for path in paths if not path.is_dir())
        return _digest({str(path.relative_to(folder)): path.read_bytes() for path in files})
    except OSError:
        return ""


def settings_digest(path: Path) -> str | None:
    """SHA-256 of a settings file's content; None if it cannot be read."""
    try:
        return _text_digest(read_object(path))
    except StageError:
        return None


def _digest(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _text_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_torn_pickles(job: str) -> None:
    """A pickle that was being written when the node died makes submitit fail every later run."""
    folder = os.environ.get("SUBMITIT_FOLDER")
    if folder:
        for path in Path(folder).glob(f"{job.removeprefix('local-')}_*.save_tmp"):
            path.unlink(missing_ok=True)


def private_pickles() -> None:
    """Have submitit write its pickles, of calls and of results, readable by their owner alone."""
    from submitit.core import utils

    if utils.cloudpickle_dump.__module__ == __name__:
        return
    dump = utils.cloudpickle_dump

    def private_dump(value: Any, filename: str | Path) -> None:
        mask = os.umask(0o077)  # not for longer: jobs inherit it
        try:
            dump(value, filename)
        finally:
            os.umask(mask)

    utils.cloudpickle_dump = private_dump  # type: ignore[assignment]


def exposed(paths: RunPaths) -> list[str]:
    """Warn of folders through which others could have this user run what they want."""
    own = [paths.root, paths.code, paths.logs, paths.logs / "slurm", paths.logs / "local"]
    return [
        f"{folder} {why}: what jobs run could be changed there (chmod go-w, or another --run)"
        for folder in [*own, *paths.root.parents]
        for why in _why_exposed(folder, own=folder in own)
    ]


def _why_exposed(folder: Path, own: bool) -> Iterator[str]:
    try:
        status = folder.stat()
    except OSError:
        return
    if status.st_uid not in (os.geteuid(), 0):
        yield f"belongs to {owner_name(status.st_uid)}"
    if status.st_mode & stat.S_ISVTX and not own:
        return  # such as /tmp: names in it belong to their makers
    if status.st_mode & stat.S_IWOTH:
        yield "can be written by everybody"
    elif status.st_mode & stat.S_IWGRP and _shared(status.st_gid):
        yield f"can be written by the group {_group(status.st_gid)}"


def _shared(group: int) -> bool:
    """Whether a group may have other members: not root's, nor the one that is named as its user."""
    return group != 0 and _group(group) != owner_name(os.geteuid())


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
