"""The task of a run: its labels, what they are called, and whether they are ordered.

Frozen data that every room may read; the labels are data, not code.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from yelp_hpc.settings import OWN_RULE, Section

_STARS = re.compile(r"(\d+)\s*(?:stars?|[★⭐])", re.IGNORECASE)


def label_text(text: str) -> str:
    """A text in the one form in which labels are compared: composed letters (NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def label_fault(text: str) -> str:
    """Why a text can be no label, "" when it can: it is one line, as a model writes it."""
    if not text:
        return "is empty"
    if text != text.strip():
        return "begins or ends with a space"
    if len(text.splitlines()) > 1:
        return "has several lines"
    kinds = {unicodedata.category(letter) for letter in text if letter != "\t"}
    return "holds a control character" if kinds & {"Cc", "Cs"} else ""


def _as_text(value: Any) -> Any:
    """Numbers of a list as text: labels are text. A YAML file's are what stands there already."""
    if not isinstance(value, list | tuple):
        return value
    for place, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise ValueError(f"entry {place} is {item!r}, no text: put it in quotes")
    return tuple(str(item) for item in value)


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_text), OWN_RULE]


class TaskConfig(Section):
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
        problems = []
        for key in ("labels", "values", "names"):
            texts = getattr(self, key)
            if texts is None:
                continue
            if len(texts) != len(self.labels):
                problems.append(f"{key} holds {len(texts)} entries for {len(self.labels)} labels")
            rows = Counter(map(label_text, texts))
            if twice := sorted(text for text, count in rows.items() if count > 1):
                problems.append(f"{key} holds {', '.join(map(repr, twice[:10]))} twice")
            odd = [f"{text!r} {fault}" for text in texts if (fault := label_fault(text))]
            if odd:
                problems.append(f"{key} are one line of text each: {', '.join(odd[:10])}")
        if problems:
            raise ValueError("; ".join(problems))
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

    @property
    def unit(self) -> str:
        """What a step from one class to the next is: a star, or no more than a class."""
        steps = {abs(after - before) for before, after in pairwise(self.stars or ())}
        return "star" if steps == {1} else "class"


YELP = TaskConfig(
    labels=("0", "1", "2", "3", "4"),
    names=("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
    ordinal=True,
)
"""The report's task: stars - 1."""
