"""The one cache folder of the toolkit: downloads, built images, and the model folders in it.

Looks only: nothing is fetched or made here.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads are kept: `YELP_HPC_CACHE`, or `~/.cache/yelp_hpc`."""
    named = os.environ.get("YELP_HPC_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "yelp_hpc"


DEMO_MODEL = "demo:smollm2-135m"


def demo_model_place() -> Path:
    """Where the demo's model lies once it is made."""
    return cache_folder() / "models" / "smollm2-135m"


def hub_folder() -> Path:
    """The Hub's cache of models."""
    return cache_folder() / "hub"


def cached_folders(path: str, revision: str | None = None) -> list[Path]:
    """Folders of the demo model or a Hub model in the cache, whole or not; the newest first."""
    if path.startswith("demo:"):
        return [demo_model_place()] if path == DEMO_MODEL else []
    hub = hub_folder() / f"models--{path.replace('/', '--')}" / "snapshots"
    return sorted(hub.glob(f"{revision or '*'}*"), key=lambda p: p.stat().st_mtime, reverse=True)
