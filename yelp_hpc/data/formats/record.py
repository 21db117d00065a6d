"""What every reader gives, and what holds for the columns of any format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = tuple[str, dict[Any, Any]]
"""Where it stands, and its columns."""


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for columns of one name: one would hide the other."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the header names {', '.join(twice)} twice")
