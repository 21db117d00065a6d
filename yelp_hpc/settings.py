"""YAML settings → a frozen, typed object, with every problem named at once.

The machinery under `yelp_hpc.config` and `jobs/cluster.py`: no key of either is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from yelp_hpc.errors import RequestError, all_problems, nearest


class Frozen(BaseModel):
    """A section of settings: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )
    synonyms: ClassVar[Mapping[str, str]] = {}
    """What people write → the key that they mean: dotted, or of the section that it stands in."""


Settings = TypeVar("Settings", bound=Frozen)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-5 as a number, as YAML 1.2 does (yaml/pyyaml#173)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
# 1:30:00 is a time limit, not the number 5400 that YAML 1.1 reads
for _digit in "0123456789":
    _Loader.yaml_implicit_resolvers[_digit] = [
        ("tag:yaml.org,2002:str", re.compile(r"^[0-9]+(:[0-9]+)+$")),
        *_Loader.yaml_implicit_resolvers[_digit],
    ]


def read_settings(
    model: type[Settings], path: Path, overrides: Sequence[str] = ()
) -> tuple[Settings, dict[str, Any], dict[str, str]]:
    """Read `path`, apply `a.b=value` overrides in order and validate.

    Returns:
        The settings, the merged values as given, and dotted key → `FILE:LINE` or `--set`.

    Raises:
        RequestError: with all problems in one message.
    """
    given, origin, problems = _read_yaml(path)
    for override in overrides:
        problems += _apply_override(given, origin, override)
    try:
        settings = model.model_validate(given)
    except ValidationError as error:
        problems += list(_explain(model, error, origin))
        raise RequestError(all_problems(f"{path} cannot be used:", problems)) from None
    if problems:
        raise RequestError(all_problems(f"{path} cannot be used:", problems))
    return settings, given, origin


def check_values(model: type[Settings], values: Any, path: Path, section: str = "") -> Settings:
    """Validate what a JSON file of ours holds in `section` (dotted), as `read_settings` does.

    Raises:
        RequestError: with all problems in one message, and their lines where these can be told.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = list(_explain(model, error, _lines(path, section)))
        raise RequestError(all_problems(f"{path} cannot be used:", problems)) from None


def _lines(path: Path, section: str) -> dict[str, str]:
    """Where each key below `section` stands; JSON is YAML but for odd characters: then {}."""
    origin: dict[str, str] = {}
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            list(_walk(node, "", path, origin))
    inside = f"{section}." if section else ""
    return {k.removeprefix(inside): at for k, at in origin.items() if k.startswith(inside)}


def parse_value(text: str) -> Any:
    """A value as YAML reads it: numbers, true, null, [a, b] or plain text."""
    return yaml.load(text, _Loader)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, (p.name for p in _siblings(path)), cutoff=0.6)
        hint = f"; did you mean {path.parent / near}?" if near else ""
        raise RequestError(f"config file {path} does not exist{hint}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: byte {error.start} is not valid") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RequestError(f"{path} is empty")
        if not isinstance(node, yaml.MappingNode):
            raise RequestError(f"{path} must hold `key: value` lines at its top level")
        origin: dict[str, str] = {}
        problems = list(_walk(node, "", path, origin))
        return loader.construct_document(node), origin, problems
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise RequestError(f"{where} is not YAML: {what}") from None
    except RecursionError:
        raise RequestError(f"{path} is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _siblings(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []


def _walk(node: yaml.MappingNode, prefix: str, path: Path, origin: dict[str, str]) -> Iterator[str]:
    """Record each key's line in `origin`; yield a problem for each key written twice."""
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        where = f"{path}:{key.start_mark.line + 1}"
        if dotted in origin:
            yield f"{where}: {dotted} is written twice (first at {origin[dotted]})"
        origin[dotted] = where
        if isinstance(value, yaml.MappingNode):
            yield from _walk(value, f"{dotted}.", path, origin)


def _apply_override(given: dict[str, Any], origin: dict[str, str], override: str) -> list[str]:
    key, sep, text = override.partition("=")
    key = key.strip()
    if not sep or not key or not all(key.split(".")):
        return [f"--set {override!r}: write it as section.key=value"]
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        return [f"--set {key}: {text!r} is not a YAML value: {getattr(error, 'problem', error)}"]
    except RecursionError:
        return [f"--set {key}: the value is nested too deeply"]
    *parents, last = key.split(".")
    place = given
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            return [f"--set {key}: {parent} is not a section"]
        place = child
    place[last] = value
    for known in [k for k in origin if k == key or k.startswith(f"{key}.")]:
        del origin[known]
    origin[key] = "--set"
    return []


def _explain(
    model: type[BaseModel], error: ValidationError, origin: dict[str, str]
) -> Iterator[str]:
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        dotted = ".".join(parts)
        named = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        where = next((origin[key] for key in named if key in origin), None)
        place = f"{where}: " if where else ""
        if item["type"] == "extra_forbidden":
            yield f"{place}unknown key {dotted}{_nearest(model, parts)}"
        elif item["type"] == "missing":
            yield f"{place}{dotted} is missing"
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "string_type" and isinstance(item["input"], int | float | date):
                # YAML reads 0123 as 83: what stood there is gone
                message = "put it in quotes: YAML reads it as a number or a date"
            value = item["input"]
            shown = "" if isinstance(value, dict) else f" (got {value!r})"
            yield f"{place}{dotted or 'the file'}: {message[:1].lower()}{message[1:]}{shown}"


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every leaf key of a settings class, dotted."""
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from dotted_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _nearest(model: type[BaseModel], parts: list[str]) -> str:
    """Name the nearest valid key: in the same section first, then anywhere."""
    section: Any = model
    for part in parts[:-1]:
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        section = field.annotation if field else None
        section = next((k for k in get_args(section) if hasattr(k, "model_fields")), section)
    local = list(section.model_fields) if hasattr(section, "model_fields") else []
    meant = getattr(model, "synonyms", {}).get(parts[-1].lower().replace("-", "_"), "")
    if meant in local:
        return f"; did you mean {'.'.join([*parts[:-1], meant])}?"
    if meant in dotted_keys(model):
        return f"; did you mean {meant}?"
    near = nearest(parts[-1], local, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join([*parts[:-1], near])}?"
    everywhere = list(dotted_keys(model))
    same = [key for key in everywhere if key.rsplit(".", 1)[-1] == parts[-1]]
    near = same[0] if same else nearest(".".join(parts), everywhere)
    if near:
        return f"; did you mean {near}?"
    return f"; valid here: {', '.join(local)}" if local else ""
