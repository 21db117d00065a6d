"""Freeze the code of a submission: a requeue a day later runs what was submitted.

Copies the package into RUN/code/DIGEST; jobs put that folder first on PYTHONPATH. Stages in an
image use the image's own wheel, whose hash is recorded instead.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from yelp_hpc.errors import StageError
from yelp_hpc.own_files import IMPORT_ROOT, PROJECT, package_files, version
from yelp_hpc.rundir.files import write_failure
from yelp_hpc.rundir.paths import RunPaths


def freeze(paths: RunPaths) -> Path:
    """Copy the running code, if this version is not there yet, and return its folder."""
    files = package_files()
    digest = hashlib.sha256()
    contents = [(IMPORT_ROOT / name).read_bytes() for name in files]
    # what importlib.metadata reads: the version of this code, not of what is installed later
    files.append(Path(f"{PROJECT.replace('-', '_')}-{version()}.dist-info", "METADATA"))
    contents.append(f"Metadata-Version: 2.1\nName: {PROJECT}\nVersion: {version()}\n".encode())
    for name, content in zip(files, contents, strict=True):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    folder = paths.code / digest.hexdigest()[:12]
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name, content in zip(files, contents, strict=True):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # someone else was faster, with the same content
            raise StageError(write_failure(folder, error)) from error
    return folder
