"""A model's folder from the Hub: downloaded, resumed, verified. Needs huggingface_hub alone.

Writes the Hub's cache.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download

from yelp_hpc.cache import seen_folders
from yelp_hpc.data.hub import hub_error
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.progress import say


def fetch_model(
    path_or_id: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A model folder: a local one as it is, a Hub model downloaded and verified.

    A download can be resumed and shows its progress; its result lies in the Hub's cache and ends
    with the commit.

    Raises:
        RequestError: the model or revision does not exist or may not be read.
        StageError: the download or a checksum fails.
    """
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path_or_id):
        raise RequestError(f"model.path {path_or_id} is neither a folder here nor a Hub model's id")
    try:
        folder = Path(
            snapshot_download(
                path_or_id,
                revision=revision,
                cache_dir=cache_dir,
                # No code is run, and these are other frameworks' copies of the weights.
                ignore_patterns=["*.py", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf"],
            )
        )
    except Exception as error:  # of a proxy or an address, too, whatever the client makes of it
        raise hub_error("model", path_or_id, revision, error) from error
    if damaged := damaged_blobs(folder):
        for path in damaged:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        names = ", ".join(path.name for path in damaged)
        raise StageError(f"checksum of {names} is wrong; removed: run it again to download anew")
    return folder


def seen_model(path_or_id: str, revision: str | None = None) -> Path | None:
    """A whole Hub model in the cache of the Hub's own client, which is left as it is."""
    for folder in seen_folders(path_or_id, revision):
        with suppress(OSError):  # not all of it may be read
            if not (damaged := damaged_blobs(folder)):
                return folder
            names = ", ".join(path.name for path in damaged)
            say(f"{folder}: checksum of {names} is wrong; left as it is, another copy is taken")
    return None


def damaged_blobs(folder: Path) -> list[Path]:
    """Files of a snapshot that are not what their blob's name says."""
    return [path for path in sorted(folder.rglob("*")) if not _intact(path)]


def _intact(path: Path) -> bool:
    """Whether a file of the Hub's cache has the hash that its blob is named after.

    SHA-256, or git's SHA-1.
    """
    blob = path.resolve()
    if not blob.is_file() or not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", blob.name):
        return True
    digest = hashlib.sha256()
    if len(blob.name) == 40:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == blob.name
