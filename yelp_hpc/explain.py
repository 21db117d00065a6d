"""What is wrong with a settings file, in the words of people who know YAML and not pydantic.

Pure: a settings class, pydantic's errors and the places of the keys in, lines of text out.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from yelp_hpc.errors import nearest
from yelp_hpc.synonyms import value_meant, word_meant


def explain(
    model: type[BaseModel], error: ValidationError, origin: Mapping[str, str]
) -> Iterator[str]:
    """Every problem that pydantic found in a settings file, a line each, for people.

    Args:
        origin: dotted key → where it was given.
    """
    wrong: dict[str, tuple[Any, list[str]]] = {}
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        dotted = ".".join(parts)
        if item["type"] == "extra_forbidden":
            named = dotted if dotted in shown(dotted) else shown(dotted)
            yield f"{_place(parts, origin)}unknown key {named}{_nearest(model, parts)}"
        elif item["type"] == "missing" and not parts[-1].isdecimal():
            yield f"{_place(parts, origin)}{dotted} is missing"
        else:  # the ways in which one value could be right are one problem
            names, field = _field(model, parts)
            if _counted_wrongly(item):
                continue
            if item["type"] == "missing":  # an entry of a list
                names = names[:-1]
            message = in_words(item, field)
            wrong.setdefault(".".join(names), (item["input"], []))[1].append(message)
    for dotted, (value, messages) in wrong.items():
        got = "" if isinstance(value, dict) else f" (got {shown(value)})"
        said = ", or ".join(dict.fromkeys(messages)).replace(", or input should be", ", or")
        said = value_meant(dotted, value) or said
        yield f"{_place(dotted.split('.'), origin)}{dotted or 'the file'}: {said}{got}"


def _counted_wrongly(item: Mapping[str, Any]) -> bool:
    """Whether pydantic calls a list too short because of what is wrong with its entries."""
    least = int(item.get("ctx", {}).get("min_length", 0))
    return item["type"] == "too_short" and 0 < least <= len(list(item["input"]))


class _Shown(reprlib.Repr):
    """Values as they stand in YAML, the middle of long ones left out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr1(self, x: Any, level: int) -> str:
        if x is None or isinstance(x, bool):
            return {None: "null", True: "true", False: "false"}[x]
        if isinstance(x, date):
            return str(x)
        return super().repr1(list(x) if isinstance(x, tuple) else x, level)


shown = _Shown().repr
"""A value as it stands in YAML, short enough for a message."""


def _place(parts: Sequence[str], origin: Mapping[str, str]) -> str:
    """`FILE:LINE: ` of a key, of the nearest one above that was given, or of one below it."""
    named = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    below = f"{'.'.join(parts)}."
    where = next((origin[key] for key in named if key in origin), None)
    where = where or next((at for key, at in origin.items() if key.startswith(below)), None)
    return f"{where}: " if where else ""


def _field(model: type[BaseModel], parts: Sequence[str]) -> tuple[list[str], FieldInfo | None]:
    """The key that `parts` of pydantic lead to, and its field; places in a list are kept."""
    names: list[str] = []
    field = None
    inner: Any = model
    for part in parts:
        if inner is not None and part in keys(inner):
            field = keys(inner)[part]
            inner = section_of(field)
        elif inner is not None or not part.isdecimal():
            continue  # a way in which a union could be right
        names.append(part)
    return names, field


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The settings class of a section; None for a plain key."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def in_words(item: Mapping[str, Any], field: FieldInfo | None) -> str:
    """What is wrong with a value, for people who know YAML and not pydantic."""
    kind, value = item["type"], item["input"]
    context = item.get("ctx", {})
    optional = field is not None and type(None) in get_args(field.annotation)
    null = "; null for none" if optional and value is not None else ""
    plain = kind.startswith(("int", "float", "bool", "string_type", "literal"))
    if isinstance(value, dict) and plain:
        text = "; a text that begins with { stands in quotes" if kind == "string_type" else ""
        return f"takes one value, and has no keys below it{text}"
    if kind == "string_unicode":
        return "holds half a character"
    if kind == "string_type" and isinstance(value, bool):
        return "put it in quotes: YAML reads it as true or false"
    if kind == "string_type" and isinstance(value, int | float | date):
        # YAML reads 0123 as 83: what stood there is gone
        return "put it in quotes: YAML reads it as a number or a date"
    if kind == "string_type":
        listed = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        joined = f", as {','.join(value)}" if listed and value else ""
        return f"input should be one text{joined}{null}"
    if kind in ("tuple_type", "list_type") and isinstance(value, dict):
        return "input should be a list: [A, B]"
    if kind in ("tuple_type", "list_type"):
        words = _words(field)
        text = "" if value is None or isinstance(value, bool) else str(value).strip()
        if not text or text not in shown(value):
            return f"input should be a list{', of ' + ', '.join(words) if words else ': [A, B]'}"
        entries = [word_meant(part, words) or part.strip() for part in text.split(",")]
        if words and not {*entries} <= {*words}:
            return f"input should be a list, of {', '.join(words)}"
        return f"input should be a list: [{', '.join(entries)}]"
    if kind == "missing":
        return f"input should hold {len(get_args(field.annotation)) if field else 'more'} entries"
    if kind in ("too_short", "too_long"):
        least = context.get("min_length")
        bound = f"at most {context['max_length']}" if least is None else f"at least {least}"
        return f"input should hold {bound} entr{'y' if bound[-2:] == ' 1' else 'ies'}"
    if kind == "model_type" and value is None:
        return "has no keys below it: indent them, or remove the line"
    if kind in ("model_type", "dict_type"):
        return "is a section: its keys stand below it, indented, each as `key: value`"
    if kind == "invalid_key":
        return "a key is a word; a number is written without separators: 10000 or 10_000"
    if kind == "literal_error":
        words = [word for word in _words(field) if word] or [str(context["expected"])]
        meant = word_meant(value, words) if value is not None else None
        hint = f"; did you mean {meant}?" if meant and len(words) > 1 else ""
        return f"input should be {' or '.join(words)}{hint}"
    if kind.startswith("int"):
        return f"input should be a whole number{null}{_without_unit(value, 'k')}"
    if kind.startswith("float") and type(value) is int:
        return "is too large"
    if kind.startswith("float"):
        return f"input should be a number, with a decimal point{null}{_without_unit(value, '%')}"
    if kind.startswith("bool"):
        return "input should be true or false"
    if kind == "string_pattern_mismatch" and field is not None and field.description:
        return f"must fit: {field.description}"
    message = str(item["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:] + (null if kind.startswith("greater") else "")


def _without_unit(value: Any, unit: str) -> str:
    """`; write 0.08` for a text that is `8%`, `; write 1000` for `1k`."""
    number = str(value).lower().removesuffix(unit).strip()
    if not str(value).lower().endswith(unit) or not number.replace(".", "", 1).isdecimal():
        return ""
    return f"; write {float(number) * {'%': 0.01, 'k': 1000}[unit]:g}"


def _words(field: FieldInfo | None) -> list[str]:
    """The words that a key takes, those in a list or beside another type too."""
    found: list[str] = []

    def look(kind: Any) -> None:
        for part in get_args(kind):
            if isinstance(part, str):
                found.append(part)
            else:
                look(part)

    look(field.annotation if field else None)
    return found


def keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a settings class as users write them: `from`, which Python cannot name, too."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every leaf key of a settings class, dotted."""
    for name, field in keys(model).items():
        if section := section_of(field):
            yield from dotted_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _nearest(model: type[BaseModel], parts: list[str]) -> str:
    """Name the nearest valid key: in the same section first, then anywhere."""
    section: Any = model
    for part in parts[:-1]:
        field = keys(section).get(part) if section else None
        section = section_of(field) if field else None
    local = list(keys(section)) if section else []
    name = parts[-1].lower().replace("-", "_")
    if "." in name:  # as it is written after --set
        above, _, last = parts[-1].rpartition(".")
        return f": write `{above.replace('.', ': ')}:` and below it, indented, `{last}: VALUE`"
    meant = getattr(model, "synonyms", {}).get(name, "")
    if meant in local:
        return f"; did you mean {'.'.join([*parts[:-1], meant])}?"
    if meant in dotted_keys(model):
        return f"; did you mean {meant}?"
    if said := getattr(model, "elsewhere", {}).get(name):
        return f": {said}"
    near = nearest(name, local, cutoff=0.65)
    if near:
        return f"; did you mean {'.'.join([*parts[:-1], near])}?"
    everywhere = list(dotted_keys(model))
    same = [key for key in everywhere if key.rsplit(".", 1)[-1] == name]
    near = same[0] if same else nearest(".".join([*parts[:-1], name]), everywhere, cutoff=0.65)
    if near:
        return f"; did you mean {near}?"
    return f"; valid here: {', '.join(local)}" if local else ""
