"""The task of a run: its labels, what they are called, and whether they are ordered.

Frozen data that every room may read; the labels are data, not code.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from yelp_hpc.settings import Frozen

_STARS = re.compile(r"(\d+)\s*(?:stars?|[★⭐])", re.IGNORECASE)


def _as_text(value: Any) -> Any:
    """Numbers of a YAML list as the text that stands there: labels are text."""
    if not isinstance(value, list | tuple):
        return value
    if any(isinstance(item, bool) for item in value):
        raise ValueError("quote yes, no, on, off, true and false: YAML reads them as truth values")
    return tuple(str(item) if isinstance(item, int | float) else item for item in value)


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_text)]


class TaskConfig(Frozen):
    """What is told apart: the labels are data."""

    labels: Texts = Field(
        min_length=2,
        max_length=1000,
        description="what the model answers, in the order of the classes",
    )
    values: Texts | None = Field(
        None,
        description="what stands in the data for each; null: the labels, their names, or 0, 1, …",
    )
    names: Texts | None = Field(None, description="of the classes, for people; null: the labels")
    ordinal: bool = Field(False, description="the classes are ordered: distances mean something")
    noun: str = Field("review", min_length=1, description="what one text is called")

    @model_validator(mode="after")
    def _one_of_each(self) -> TaskConfig:
        for key in ("labels", "values", "names"):
            texts = getattr(self, key)
            if texts is None:
                continue
            if len(texts) != len(self.labels):
                raise ValueError(f"{key} holds {len(texts)} entries for {len(self.labels)} labels")
            if twice := sorted({text for text in texts if texts.count(text) > 1}):
                raise ValueError(f"{key} holds {', '.join(map(repr, twice))} twice")
            odd = [text for text in texts if text != text.strip() or len(text.splitlines()) != 1]
            if odd:
                raise ValueError(
                    f"{key} holds {', '.join(map(repr, odd))}: one line of text each, "
                    "without spaces around it"
                )
        return self

    @property
    def shown(self) -> tuple[str, ...]:
        """A name for people of each class."""
        return self.names or self.labels

    @property
    def stars(self) -> tuple[int, ...] | None:
        """How many stars each class is, where the task is ordinal and its names say so."""
        found = [_STARS.fullmatch(name) for name in self.shown]
        counts = tuple(int(one[1]) for one in found if one)
        return counts if self.ordinal and len(counts) == len(found) else None


YELP = TaskConfig(
    labels=("0", "1", "2", "3", "4"),
    names=("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
    ordinal=True,
)
"""The report's task: stars - 1."""
