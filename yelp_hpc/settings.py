"""YAML settings → a frozen, typed object, with every problem named at once.

The machinery under `yelp_hpc.config` and `jobs/cluster.py`: no key of either is known here.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from yelp_hpc.errors import RequestError, all_problems, nearest
from yelp_hpc.explain import explain


class Frozen(BaseModel):
    """A section of settings: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )
    synonyms: ClassVar[Mapping[str, str]] = {}
    """What people write → the key that they mean: dotted, or of the section that it stands in."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """What people write that is no key here → what there is instead."""
    as_written: ClassVar[frozenset[str]] = frozenset()
    """Keys, without their section, of lists whose entries are the text that stands there."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1, and YAML reads on and yes as true
        if isinstance(value, bool) and _kinds(cls.model_fields[str(info.field_name)].annotation) & {
            int,
            float,
        }:
            raise ValueError("must be a number, not true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows, those in a list aside."""
    if get_origin(annotation) is tuple:
        return set()
    inside = get_args(annotation)
    return {annotation}.union(*map(_kinds, inside)) if inside else {annotation}


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
    given, origin, problems = read_yaml(path, model.as_written)
    if given is None:
        raise RequestError(f"{path} is empty")
    if not isinstance(given, dict):
        kind = "a list" if isinstance(given, list) else "text"
        raise RequestError(f"{path} must hold `key: value` lines at its top level, not {kind}")
    for override in overrides:
        problems += _apply_override(given, origin, override, model.as_written)
    try:
        settings = model.model_validate(given)
    except ValidationError as error:
        problems += list(explain(model, error, origin))
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
        problems = list(explain(model, error, _lines(path, section)))
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


def parse_value(text: str, key: str = "", as_written: Collection[str] = ()) -> Any:
    """The value of `key` as YAML reads it: numbers, true, null, [a, b] or plain text.

    `as_written`: see `Frozen`.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if isinstance(node, yaml.MappingNode):
            list(_walk(node, "", Path(), {}, as_written))
        elif key in as_written:
            _take_as_written(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _take_as_written(node: yaml.Node | None) -> None:
    """Make text of a list's plain entries, whatever YAML would read in them."""
    for entry in node.value if isinstance(node, yaml.SequenceNode) else ():
        if isinstance(entry, yaml.ScalarNode):
            entry.tag = "tag:yaml.org,2002:str"


def read_yaml(
    path: Path, as_written: Collection[str] = ()
) -> tuple[Any, dict[str, str], list[str]]:
    """A YAML file's content of any shape, the place of each key, and each key written twice.

    `as_written`: see `Frozen`.

    Raises:
        RequestError: it is not there, cannot be read, is no UTF-8 or no YAML.
    """
    text = _read_text(path)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}, []
        origin: dict[str, str] = {}
        problems: list[str] = []
        if isinstance(node, yaml.MappingNode):
            problems += _walk(node, "", path, origin, as_written)
        return loader.construct_document(node), origin, problems
    except yaml.YAMLError as error:
        raise RequestError(_not_yaml(path, error)) from None
    except RecursionError:
        raise RequestError(f"{path} is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _read_text(path: Path) -> str:
    raw = b""
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise RequestError(f"config file {path} does not exist{_instead(path)}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        utf16 = raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raise RequestError(
            f"{path} is not UTF-8 text (line {line}); save it as UTF-8, as by "
            f"`iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8`"
        ) from None
    except IsADirectoryError:
        inside = ", ".join(map(str, sorted(path.glob("*.y*ml"))[:5]))
        named = f", as {inside}" if inside else ""
        raise RequestError(f"{path} cannot be read: it is a folder; name a file{named}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def _instead(path: Path) -> str:
    """What is said of a file that is not there: why, or which one is meant."""
    if re.match(r"\w+:/", str(path)):
        return ": it is an address; download it first"
    if path.is_symlink():
        return f": it is a link to {path.readlink()}, which is not there"
    there = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    found = {f.name: f for f in there} | {f.stem: f for f in there}
    near = nearest(path.name, found, cutoff=0.6)
    return f"; did you mean {found[near]}?" if near else ""


_IN_WORDS = {
    "character '\\t'": "a tab (indent with spaces)",
    "but found another document": "a second document begins (`---`); a file holds one",
    "mapping values are not allowed here": "no `key: value` can stand here: look at the "
    "indentation, or put a text that holds `: ` in quotes",
    "'<stream end>'": "the end of the file",
}
"""What the parser says → the same for people."""


def _not_yaml(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    what = str(getattr(error, "problem", None) or error)
    for said, meant in _IN_WORDS.items():
        what = what.replace(said, meant)
    began = getattr(error, "context_mark", None)
    if mark and began and began.line != mark.line and what.startswith("expected"):
        what += f"; it began in line {began.line + 1}"
    return f"{where} is not YAML: {what}"


def _walk(
    node: yaml.MappingNode,
    prefix: str,
    path: Path,
    origin: dict[str, str],
    as_written: Collection[str] = (),
) -> Iterator[str]:
    """Record each key's line in `origin`; yield a problem for each key written twice."""
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        where = f"{path}:{key.start_mark.line + 1}"
        if re.match(r"\w+:\S", str(key.value)):
            yield f"{where}: needs a space after the colon of {key.value}"
        if dotted in origin:
            yield f"{where}: {dotted} is written twice (first at {origin[dotted]})"
        origin[dotted] = where
        if isinstance(value, yaml.MappingNode):
            yield from _walk(value, f"{dotted}.", path, origin, as_written)
        elif isinstance(key, yaml.ScalarNode) and key.value in as_written:
            _take_as_written(value)


def _apply_override(
    given: dict[str, Any], origin: dict[str, str], override: str, as_written: Collection[str]
) -> list[str]:
    key, sep, text = override.partition("=")
    key = key.strip()
    if not sep or not key or not all(key.split(".")):
        return [f"--set {override!r}: write it as section.key=value"]
    try:
        value = parse_value(text, key.rpartition(".")[2], as_written)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", error)
        return [
            f"--set {key}: {text!r} is not a YAML value: {why}; a text with {{ [ : or # stands in "
            "quotes inside the shell's"
        ]
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
