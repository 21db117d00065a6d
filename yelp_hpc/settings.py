"""YAML settings → a frozen, typed object, with every problem named at once.

The machinery under `yelp_hpc.config` and `jobs/cluster.py`: no key of either is known here.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from yelp_hpc.errors import RequestError, all_problems, nearest
from yelp_hpc.explain import explain, shown


class Frozen(BaseModel):
    """Values of a fixed shape: unknown keys are refused, nothing can change after loading."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )


SEVERAL_LINES = "several lines"
"""Marks a text of a section that may hold line breaks and tabs."""
OWN_RULE = "a rule of its own"
"""Marks texts of a section that say themselves what they may hold."""
MOST = 2**32 - 1
"""A larger number is no count of anything, nor a seed."""
_NO_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NO_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Section(Frozen):
    """A section of settings, as people write them."""

    synonyms: ClassVar[Mapping[str, str]] = {}
    """What people write → the key that they mean: dotted, or of the section that it stands in."""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    """What people write that is no key here → what there is instead."""
    as_written: ClassVar[frozenset[str]] = frozenset()
    """Keys, without their section, of lists whose entries are the text that stands there."""

    @field_validator("*", mode="before")
    @classmethod
    def _sound(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        kinds = _kinds(field.annotation)
        listed = value if isinstance(value, list | tuple) else [value]
        # pydantic reads true as 1, and YAML reads on and yes as true
        if kinds & {int, float} and any(isinstance(one, bool) for one in listed):
            raise ValueError("must be a number, not true or false")
        marks = [*field.metadata, *kinds]
        if str not in kinds or OWN_RULE in marks:
            return value
        if any(isinstance(one, str) and not one.strip() for one in listed):
            if listed is value:
                raise ValueError("an entry is empty; leave it out")
            raise ValueError(f"is empty{'' if field.is_required() else '; leave it out'}")
        odd = _NO_LINES if SEVERAL_LINES in marks else _NO_LINE
        inside = value.values() if isinstance(value, dict) else listed
        if any(isinstance(one, str) and odd.search(one) for one in inside):
            raise ValueError("must not hold line breaks or control characters")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if type(value) is int and value > MOST:
            raise ValueError(f"is too large: at most {MOST}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows, in a list too."""
    inside = get_args(annotation)
    return {annotation}.union(*map(_kinds, inside)) if inside else {annotation}


Settings = TypeVar("Settings", bound=Frozen)
Sections = TypeVar("Sections", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as YAML 1.2 does (yaml/pyyaml#173) and plain values alone."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As SafeLoader does; what a value cannot be is an error of its line."""
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind not in _PLAIN:
            said = str(node.tag).replace("tag:yaml.org,2002:", "!!")
            why = f"{said} is no kind of value here; a text that begins with ! stands in quotes"
            raise ConstructorError(None, None, why, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):  # a month 13, !!int of a word
            why = f"{shown(node.value)} cannot be read as a {_PLAIN[kind]}; a text stands in quotes"
            raise ConstructorError(None, None, why, node.start_mark) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """As SafeLoader does; JSON's two halves of a character are one."""
        text = str(super().construct_scalar(node))
        with suppress(UnicodeDecodeError):
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        return text

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """010 is ten, and no octal 8."""
        text = self.construct_scalar(node).replace("_", "")
        found = int(text, 0 if re.match(r"[-+]?0[bx]", text) else 10)
        str(found)  # more digits than Python writes out are an error here, as in decimals
        return found


_PLAIN = {
    **{"str": "text", "int": "whole number", "float": "number", "bool": "truth value"},
    **{"null": "null", "timestamp": "date", "seq": "list", "map": "section"},
    **{"value": "text", "merge": "text"},
}
"""YAML's kinds of value that a file may hold → the same for people."""
for _tag in ("value", "merge"):  # a bare = or <<
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
# 1:30:00 is a time limit, not the number 5400 that YAML 1.1 reads
for _first in "+-0123456789":
    _Loader.yaml_implicit_resolvers[_first] = [
        ("tag:yaml.org,2002:str", re.compile(r"^[-+]?[0-9_]+(:[0-9]+)+(\.[0-9_]*)?$")),
        *_Loader.yaml_implicit_resolvers[_first],
    ]


def read_settings(
    model: type[Sections], path: Path, overrides: Sequence[str] = ()
) -> tuple[Sections, dict[str, Any], dict[str, str]]:
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
        list(_walk(node, "", path, origin) if node else ())
    inside = f"{section}." if section else ""
    return {k.removeprefix(inside): at for k, at in origin.items() if k.startswith(inside)}


def parse_value(text: str) -> Any:
    """A value as YAML reads it: numbers, true, null, [a, b] or plain text."""
    return _load(text, Path(), {}, ())[0]


def _load(
    text: str, path: Path, origin: dict[str, str], as_written: Collection[str], key: str = ""
) -> tuple[Any, list[str]]:
    """What a text holds, which is all of `path` or the value of `key` (dotted), and see `_walk`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        problems = list(_walk(node, f"{key}." if key else "", path, origin, as_written))
        if key.rpartition(".")[2] in as_written:
            _take_as_written(node)
        return loader.construct_document(node), problems
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

    `as_written`: see `Section`.

    Raises:
        RequestError: it is not there, cannot be read, is too large, no UTF-8 or no YAML.
    """
    text = _read_text(path)
    origin: dict[str, str] = {}
    try:
        content, problems = _load(text, path, origin, as_written)
        return content, origin, problems
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RequestError(f"{path}:{line} is not YAML: {_why(error)}") from None
    except yaml.YAMLError as error:
        raise RequestError(_not_yaml(path, error)) from None
    except RecursionError:
        raise RequestError(f"{path} is nested too deeply") from None


_LARGEST = 2**20


def _read_text(path: Path) -> str:
    raw = b""
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise RequestError(
                f"{path} holds over 1 MB, which no settings do; data is named in a config's `data:`"
            )
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
    "found unhashable key": "a key is a word, no list and no section",
}
"""What the parser says → the same for people."""


def _not_yaml(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    what = _why(error)
    began = getattr(error, "context_mark", None)
    if mark and began and began.line != mark.line and what.startswith("expected"):
        what += f"; it began in line {began.line + 1}"
    return f"{where} is not YAML: {what}"


def _why(error: yaml.YAMLError) -> str:
    if isinstance(error, ReaderError):
        return f"it holds the control character {chr(int(error.character))!r}"
    what = str(getattr(error, "problem", None) or error)
    for said, meant in _IN_WORDS.items():
        what = what.replace(said, meant)
    return what


def _walk(
    node: yaml.Node,
    prefix: str,
    path: Path,
    origin: dict[str, str],
    as_written: Collection[str] = (),
    seen: dict[int, bool] | None = None,
) -> Iterator[str]:
    """Record each key's line in `origin`; yield a problem for each key written twice.

    Args:
        seen: node → whether all of it was looked at; aliases of aliases would take forever.

    Raises:
        RecursionError: a section stands inside itself.
    """
    seen = {} if seen is None else seen
    if id(node) in seen:  # an alias
        if isinstance(node, yaml.MappingNode) and not seen[id(node)]:
            raise RecursionError("it stands inside itself")
        return
    seen[id(node)] = False
    if isinstance(node, yaml.SequenceNode):
        for place, entry in enumerate(node.value):
            yield from _walk(entry, f"{prefix}{place}.", path, origin, as_written, seen)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        dotted = f"{prefix}{key.value}"
        where = f"{path}:{key.start_mark.line + 1}"
        if re.match(r"\w+:\S", str(key.value)):
            yield f"{where}: needs a space after the colon of {key.value}"
        if dotted in origin:
            yield f"{where}: {dotted} is written twice (first at {origin[dotted]})"
        origin[dotted] = where
        if isinstance(key, yaml.ScalarNode) and key.value in as_written:
            _take_as_written(value)
        yield from _walk(value, f"{dotted}.", path, origin, as_written, seen)
    seen[id(node)] = True


def _apply_override(
    given: dict[str, Any], origin: dict[str, str], override: str, as_written: Collection[str]
) -> list[str]:
    key, sep, text = override.partition("=")
    key = key.strip()
    if not sep or not key or not all(key.split(".")):
        return [f"--set {override!r}: write it as section.key=value"]
    try:
        value, twice = _load(text, Path("--set"), {}, as_written, key)
        if twice:
            return twice
    except yaml.YAMLError as error:
        return [
            f"--set {key}: {shown(text)} is not a YAML value: {_why(error)}; a text with "
            "{ [ : or # stands in quotes inside the shell's"
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
