"""The exceptions of the toolkit and the exit code that each one ends the process with.

    YelpHpcError
    ├── RequestError        2   the request is wrong: a config, an argument, a data file
    ├── StageError          1   it failed: a fault of the machine, a stage, the cluster
    └── SavedForRequeue    75   state is saved, run me again
        └── NodeFault      75   … on another node: this one's hardware failed

Each message says what, where and what to do next; the command line prints it without a traceback.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


class YelpHpcError(Exception):
    """Base of every error that the command line prints as one message."""

    exit_code = 1


class RequestError(YelpHpcError):
    """The request is wrong; nothing was changed."""

    exit_code = 2


class StageError(YelpHpcError):
    """The work failed; what was finished before is kept."""

    exit_code = 1


class SavedForRequeue(YelpHpcError):
    """The stage saved its state and asks to be started again (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class NodeFault(SavedForRequeue):
    """A fault of this node's hardware or network; what the last save holds is kept."""


def all_problems(headline: str, problems: Sequence[str], limit: int = 20) -> str:
    """One message of a headline and an indented line per problem, the rest counted."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … and {len(problems) - limit} more")
    return "\n".join([headline, *lines])


def problems_in(error: BaseException) -> list[str]:
    """The lines of a message of `all_problems` without its headline; of any other all lines."""
    lines = str(error).splitlines()
    return [line.removeprefix("  - ") for line in lines[1:] or lines]


def in_shell(path: object) -> str:
    """A path as it is typed in a command: in quotes where a shell would read it otherwise."""
    return shlex.quote(str(path))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like `name`, letter case aside; None when none is like it."""
    lower = {option.lower(): option for option in known}
    near = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=cutoff)
    return lower[near[0]] if near else None


def nearest_path(path: Path) -> str:
    """What stands beside `path` and is most like it by name; "" when nothing is."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.name != path.name]
    except OSError:
        return ""
    near = nearest(path.name, names, cutoff=0.4)
    return str(path.parent / near) if near else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
