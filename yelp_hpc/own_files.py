"""Where the toolkit's own files lie: the package, what it brings along, and how it is imported."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PROJECT = "yelp-hpc"
PACKAGE = Path(__file__).resolve().parent
"""The folder of the package, in a checkout, an installed wheel or a run's frozen code."""
IMPORT_ROOT = PACKAGE.parent
"""The folder that holds the package; in a checkout the top of the repository."""
SHARE = PACKAGE / "share"
"""configs/, containers/ and Apptainer.def: links in a checkout, copies in a wheel."""


def own_module(module: str) -> list[str]:
    """The argv of a child that runs `module` of this very code, wherever it is started.

    Neither the working directory nor what lies beside the package is searched for anything but
    the package: a file `random.py` or `torch.py` there shadows nothing.
    """
    code = f"""\
import sys
sys.path.insert(0, {str(IMPORT_ROOT)!r})
import yelp_hpc
del sys.path[0]
import runpy
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)"""
    return [sys.executable, "-P", "-c", code]


def version() -> str:
    """The version of this very code, whatever else is installed.

    Metadata beside the package says it: an installed wheel's, an image's, what `freeze` writes. A
    checkout has pyproject.toml, which the metadata is made from.
    """
    import importlib.metadata
    import tomllib

    project = IMPORT_ROOT / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    for found in importlib.metadata.distributions(name=PROJECT, path=[str(IMPORT_ROOT)]):
        return found.version
    return importlib.metadata.version(PROJECT)


def pip_install(what: str, python: str = sys.executable) -> str:
    """The command that installs `what` for a Python, ready to be typed."""
    return f"{shlex.quote(python)} -m pip install {what}"


def outdated(extras: Iterable[str] = ()) -> str:
    """What is said of installed packages that are older than this code needs; "" of none.

    Args:
        extras: `job`, `demo`: also what these bring.
    """
    import importlib.metadata
    import re
    import tomllib

    project = tomllib.loads((SHARE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    wanted += [one for extra in extras for one in project["optional-dependencies"][extra]]
    old = {}
    for one in wanted:
        name, _, least = one.partition(">=")
        with suppress(importlib.metadata.PackageNotFoundError):
            have = importlib.metadata.version(name)
            if [*map(int, re.findall(r"\d+", have))] < [*map(int, least.split("."))]:
                old[one] = f"{name} {have} ({least} is needed)"
    if not old:
        return ""
    return (
        f"{sys.executable} has packages that are too old: {', '.join(old.values())} → "
        f"{pip_install(shlex.join(old))}; those in ~/.local hides "
        "`export PYTHONNOUSERSITE=1`"
    )


def package_files() -> list[Path]:
    """Every file of the package, relative to `IMPORT_ROOT`, links followed, in order of name."""
    found = []
    for folder, inner, names in os.walk(PACKAGE, followlinks=True):
        inner[:] = [name for name in inner if name != "__pycache__" and name[0] != "."]
        found += [Path(folder, name).relative_to(IMPORT_ROOT) for name in names if name[0] != "."]
    return sorted(found)


def expanded(text: str) -> str:
    """A path, or what begins with one, with the home folder for its `~`.

    Raises:
        ValueError: it is in the home of a user that there is not, or of one that has none.
    """
    found = os.path.expanduser(text)  # noqa: PTH111 - a text, which may be more than a path
    if found.startswith("~"):
        lost = found.partition("/")[0]
        raise ValueError("there is no HOME" if lost == "~" else f"{lost} is no user here")
    return found


def shipped(name: str | Path) -> Path:
    """`name`, or the file of that name that the package brings along where there is none here.

    `demo`, `demo.yaml` and `configs/demo.yaml` all name the demo's configuration.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - never raises
    if path.exists() or path.is_absolute():
        return path
    for folder in (SHARE, SHARE / "configs", SHARE / "configs" / "clusters"):
        for found in (folder / path, folder / f"{path}.yaml"):
            if found.is_file():
                return found
    return path
