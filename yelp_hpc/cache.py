"""Where downloads and built images are kept: the one cache folder of the toolkit."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads are kept: `YELP_HPC_CACHE`, or `~/.cache/yelp_hpc`."""
    named = os.environ.get("YELP_HPC_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "yelp_hpc"
