"""Where downloads lie: our own cache folder, and the Hub's own, which is looked at and left alone.

Looks only, but for `made`: nothing is fetched here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.own_files import expanded

SEEN = "YELP_HPC_HUB"
"""Names the Hub's own cache to a stage in the image, in which HF_HOME is another folder."""


def cache_folder() -> Path:
    """Ours: `YELP_HPC_CACHE`, else `yelp_hpc` in `XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        RequestError: it is in the home of a user that there is not.
    """
    named = os.environ.get("YELP_HPC_CACHE")
    # a module file or an `export` in quotes leaves the ~ to us
    found = named or str(_user_caches(os.environ) / "yelp_hpc")
    try:
        return Path(expanded(found))
    except ValueError as error:
        raise RequestError(
            f"the cache {found}: {error}; name another: export YELP_HPC_CACHE=DIR"
        ) from None


def made(folder: Path) -> Path:
    """A folder of our cache that can be written, made where it is not there.

    Raises:
        StageError: it cannot be; says how to name another.
    """
    why = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):  # read-only, or another user's
            why = "written"
    except OSError as error:
        why = f"made: {error.strerror}"
    if why:
        raise StageError(
            f"{folder}, in the cache, cannot be {why}; name another: export YELP_HPC_CACHE=DIR"
        )
    return folder


def _user_caches(env: Mapping[str, str]) -> Path:
    named = env.get("XDG_CACHE_HOME", "")
    # a relative one is to be ignored (XDG Base Directory Specification)
    return Path(named) if named.startswith("/") else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111


def seen_hub(env: Mapping[str, str]) -> Path:
    """The cache of the Hub's own client, as it finds it: read and never written."""
    for name in (SEEN, "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(os.path.expanduser(env[name]))  # noqa: PTH111 - never raises
    return hub_home(env) / "hub"


def hub_home(env: Mapping[str, str]) -> Path:
    """Where the Hub's own client keeps what it fetches, and its login."""
    return Path(os.path.expanduser(env.get("HF_HOME") or _user_caches(env) / "huggingface"))  # noqa: PTH111


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's on the Hub, OWNER/NAME."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))


DEMO_MODEL = "demo:smollm2-135m"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the demo's model stands on the Hub; here it is made of a package."""


def check_demo(path: str) -> None:
    """Raise RequestError for a model path `demo:NAME` that is not the demo's."""
    if path.startswith("demo:") and path != DEMO_MODEL:
        raise RequestError(f"model.path {path} is unknown; the demo's is {DEMO_MODEL}")


def demo_model_place() -> Path:
    """Where the demo's model lies once it is made."""
    return cache_folder() / "models" / "smollm2-135m"


def hub_folder() -> Path:
    """Our own copy of the Hub's cache of models, which `fetch` writes."""
    return cache_folder() / "hub"


def cached_folders(path: str, revision: str | None = None) -> list[Path]:
    """Folders of the demo model or a Hub model that lie here: whole ones of the Hub's own cache.

    Then ours, whole or not. The commit that `revision` (None: main) names comes first, then the
    newest.
    """
    if path.startswith("demo:"):
        return [demo_model_place()] if path == DEMO_MODEL else []
    return [*seen_folders(path, revision), *_snapshots(hub_folder(), path, revision)]


def seen_folders(path: str, revision: str | None = None) -> list[Path]:
    """Whole folders of a Hub model in the cache of the Hub's own client."""
    found = _snapshots(seen_hub(os.environ), path, revision)
    return [folder for folder in found if not model_problem(folder)]


def repository(folder: Path) -> Path | None:
    """What holds a snapshot and the blobs that it links to; None for any other folder."""
    return folder.parents[1] if folder.parent.name == "snapshots" else None


def _snapshots(hub: Path, path: str, revision: str | None) -> list[Path]:
    place = hub / f"models--{path.replace('/', '--')}"
    commit = ""
    with suppress(OSError, ValueError):
        commit = (place / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    try:
        found = [p for p in (place / "snapshots").iterdir() if p.is_dir()]
        found = [p for p in found if p.name == commit or p.name.startswith(revision or "")]
        return sorted(found, key=lambda p: (p.name == commit, p.stat().st_mtime), reverse=True)
    except OSError:
        return []


def model_problem(path: Path) -> str:
    """What a model folder lacks, "" when it is whole as far as names and sizes tell."""
    try:
        names = {p.name: p.stat().st_size for p in path.iterdir() if p.is_file()}
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if "config.json" not in names:
        return "it has no config.json"
    needed = [name for name in names if name.endswith((".safetensors", ".bin", ".gguf"))]
    for index in [name for name in names if name.endswith(".index.json")]:
        needed += _indexed(path / index)
    missing = [name for name in dict.fromkeys(needed) if not names.get(name)]
    if not needed:
        return "it has no weights (*.safetensors or *.bin)"
    return f"these are missing or empty: {', '.join(missing[:5])}" if missing else ""


def _indexed(index: Path) -> Iterator[str]:
    with suppress(ValueError, RecursionError, OSError, KeyError, TypeError, AttributeError):
        yield from sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
