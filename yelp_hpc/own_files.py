"""Where the toolkit's own files lie: the package, what it brings along, and how it is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package, in a checkout, an installed wheel or a run's frozen code."""
IMPORT_ROOT = PACKAGE.parent
"""The folder that PYTHONPATH must name; in a checkout the top of the repository."""
SHARE = PACKAGE / "share"
"""configs/, containers/ and Apptainer.def: links in a checkout, copies in a wheel."""


def python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH for a child that is to run this very code, wherever it is started."""
    return os.pathsep.join(filter(None, (str(IMPORT_ROOT), environ.get("PYTHONPATH"))))


def package_files() -> list[Path]:
    """Every file of the package, relative to `IMPORT_ROOT`, links followed, in order of name."""
    found = []
    for folder, inner, names in os.walk(PACKAGE, followlinks=True):
        inner[:] = [name for name in inner if name != "__pycache__" and name[0] != "."]
        found += [Path(folder, name).relative_to(IMPORT_ROOT) for name in names if name[0] != "."]
    return sorted(found)
