"""What stands in the label column → classes: all values judged together, none guessed alone.

Pure. A value stands for a class because it is one of `task.values`; without them because all values
are labels, or all are names, or all are stars ("5 stars"), or all count the classes from 0. Numbers
may be written in other ways (4.0, 04), and letters in another case, where that leaves one class.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from typing import Any

from yelp_hpc.errors import RequestError
from yelp_hpc.task import TaskConfig, label_text

MOST_VALUES = 5000
"""Different labels after which the label column must be another column."""
_FLOAT = re.compile(r"([-+]?\d+)\.0+")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,2})?")
_STARS = re.compile(r"(\d+)(?:\.0+)?\s*(?:stars?|[★⭐])", re.IGNORECASE)
Rule = Callable[[str], int | None]


NO_LABEL: dict[type, str] = {list: "lists", dict: "objects", bytes: "bytes"}
"""What a cell may hold that is no label, and what many are called."""


def value_text(value: Any) -> str:
    """A value of a label column as text; "" for a missing one."""
    if type(value) in NO_LABEL:
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    return "" if value is None else label_text(str(value).strip())


def whole_number(text: str) -> str:
    """`4.0` as `4`, any other text as it is."""
    found = _FLOAT.fullmatch(text)
    return found[1] if found else text


def classes_of(
    values: Collection[str],
    task: TaskConfig,
    names: Sequence[str] | None = None,
    counted: Sequence[str] | None = None,
) -> dict[str, int | None]:
    """The class of each value; None for one that stands for none under the rule that fits best.

    Args:
        names: of a ClassLabel column, whose values are their places.
        counted: the classes that the data trained on counts from 0, where `names` are not known.

    Raises:
        RequestError: `names` are not the task's classes, or a value may stand for two of them.
    """
    best: dict[str, int | None] = {}
    rules = _rules(task, names, counted)
    for place, rule in enumerate(rules):
        found = {value: rule(value) for value in sorted(values)}
        if not best or _known(found) > _known(best):
            best = found
        if _known(best) == len(best):
            _refuse_two_readings(best, rules[:place], task)
            break
    return best


def _refuse_two_readings(
    found: dict[str, int | None], before: Sequence[Rule], task: TaskConfig
) -> None:
    """Raise RequestError where a more literal rule knows another class for a value."""
    for value, i in found.items():
        others = (rule(value) for rule in before)
        other = next((one for one in others if one not in (None, i)), None)
        if other is not None and i is not None:
            stands = {place: one for one, place in found.items()}
            listed = ", ".join(stands.get(place, "…") for place in range(len(task.labels)))
            raise RequestError(
                f"the label column holds {value}: by itself {task.shown[other]!r}, with the others "
                f"{task.shown[i]!r}; say in task.values what stands in the data for each of "
                f"task.labels: [{listed}] if it is the second"
            )


def one_naming(found: Sequence[tuple[str, list[str] | None]]) -> list[str] | None:
    """The names of a ClassLabel column's numbers by its sources; None where none names them.

    Raises:
        RequestError: two name them otherwise: a number would be two classes.
    """
    named = [(source, names) for source, names in found if names]
    for source, names in named:
        if names != named[0][1]:
            raise RequestError(
                f"{source} counts the classes {', '.join(names[:10])}, but {named[0][0]} "
                f"{', '.join(named[0][1][:10])}: write both with the same ClassLabel"
            )
    return named[0][1] if named else None


def _known(found: dict[str, int | None]) -> int:
    return sum(i is not None for i in found.values())


def _rules(
    task: TaskConfig, names: Sequence[str] | None, counted: Sequence[str] | None
) -> list[Rule]:
    """The ways to read a label column, the most literal first."""

    def among(texts: Sequence[str], fold: bool = False) -> Rule:
        own = list(map(value_text, texts))
        exact = {text: i for i, text in enumerate(own)}
        ways = [_unambiguous(own, way) for way in ([str.casefold] if fold else []) + [number]]

        def rule(value: str) -> int | None:
            if (found := exact.get(value)) is not None:
                return found
            return next((i for way in ways if (i := way(value)) is not None), None)

        return rule

    def places() -> Rule:
        """Numbers from 0: the places of `names`, else of the labels."""
        count, known = len(task.labels), names or counted
        numbers = [str(i) for i in range(count)]
        if known is None:
            return among(numbers)
        shown = ", ".join(known[:10]) + (" …" if len(known) > 10 else "")
        if len(known) != count:
            raise RequestError(
                f"its label column has {len(known)} classes ({shown}), task.labels has {count}: "
                "set task.labels to them"
            )
        orders = [
            [among(texts, fold=True)(value_text(name)) for name in known]
            for texts in (task.labels, task.shown)
        ]
        for order in orders:
            if {*order} == {*range(count)}:
                by_place = dict(zip(numbers, order, strict=True))
                return lambda value: by_place.get(whole_number(value))
        if any(i not in (None, at) for order in orders for at, i in enumerate(order)):
            raise RequestError(
                f"its label column has the classes {shown}: only some are among task.labels, and "
                "in another order; set task.labels to them, or task.values to the number of each"
            )
        return among(numbers)

    if task.values is not None:
        return [among(task.values)]
    if names is not None:
        return [places()]
    rules = [among(task.labels), among(task.labels, fold=True), among(task.shown, fold=True)]
    if task.stars:
        stars = {str(n): i for i, n in enumerate(task.stars)}

        def drawn(value: str) -> int | None:
            found = _STARS.fullmatch(value)
            text = found[1] if found else str(len(value)) if set(value) <= {"★", "⭐"} else ""
            return stars.get(text)

        rules.append(drawn)
    return [*rules, places()]


def _unambiguous(texts: Sequence[str], form: Callable[[str], Any]) -> Rule:
    """The place of the one of `texts` that has a value's `form`; None where several have it."""
    forms = Counter(map(form, texts))
    places = {form(text): i for i, text in enumerate(texts) if forms[form(text)] == 1}
    places.pop(None, None)
    return lambda value: places.get(form(value))


def number(text: str) -> Decimal | None:
    """The number that a text is in digits; None for any other."""
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def advice(values: Collection[str], task: TaskConfig) -> str:
    """What the values of a label column look like, and what to set; "" when they tell nothing."""
    count = len(task.labels)
    whole = {int(whole_number(v)) for v in values if re.fullmatch(r"\d+", whole_number(v))}
    if len(whole) == len({*values}) and whole and task.values is None:
        if max(whole) == count and min(whole) >= 1:
            listed = ", ".join(str(i + 1) for i in range(count))
            stars = "stars? " if task.stars else ""
            return (
                f"the label column holds {min(whole)} to {max(whole)}: {stars}"
                f"set task.values=[{listed}]"
            )
        return f"the label column holds {min(whole)} to {max(whole)}"
    listed = ", ".join(sorted(values)[:12]) + (" …" if len(values) > 12 else "")
    return f"the label column holds {len(values)} values: {listed}; set task.values or task.labels"
