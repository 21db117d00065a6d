"""Pages that are made from the code, so that they cannot fall behind it: a hook of mkdocs.

Replaces `<!-- keys: CLASS -->` by a table of a settings class's keys (`Config`, `ClusterConfig`)
and `<!-- commands -->` by the help of every command.
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from yelp_hpc.cli.main import cli
from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig

SETTINGS: dict[str, type[BaseModel]] = {"Config": Config, "ClusterConfig": ClusterConfig}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' hook: fill the placeholders of a page."""
    markdown = re.sub(
        r"<!-- keys: (\w+) -->", lambda match: key_tables(SETTINGS[match[1]]), markdown
    )
    return markdown.replace("<!-- commands -->", command_help())


def key_tables(model: type[BaseModel]) -> str:
    """A heading and a table for each section; keys outside of one come first."""
    top = [(name, field) for name, field in model.model_fields.items() if not section(field)]
    parts = [table(top)] if top else []
    shown: dict[type[BaseModel], str] = {}
    for name, field in model.model_fields.items():
        inner = section(field)
        if inner is None:
            continue
        if inner in shown:
            parts.append(
                f"### `{name}` {{#{anchor(model, name)}}}\n\nThe keys of [{shown[inner]}]"
                f"(#{anchor(model, shown[inner])})."
            )
            continue
        shown[inner] = name
        text = (inner.__doc__ or "").strip().splitlines()[0]
        rows = [(f"{name}.{key}", value) for key, value in inner.model_fields.items()]
        parts.append(f"### `{name}` {{#{anchor(model, name)}}}\n\n{text}\n\n{table(rows)}")
    return "\n\n".join(parts)


def anchor(model: type[BaseModel], name: str) -> str:
    """The id of a section's heading."""
    return f"{model.__name__.lower()}-{name}"


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The settings class of a section; None for a plain key."""
    for kind in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def table(rows: list[tuple[str, FieldInfo]]) -> str:
    """One row a key: name, type with limits, default, description."""
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for key, field in rows:
        value = "**needed**" if field.is_required() else f"`{shown_default(field.default)}`"
        note = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{key}` | {shown_type(field)} | {value} | {note} |")
    return "\n".join(lines)


def shown_default(value: Any) -> str:
    """The default as JSON, cut short where it is a text of many words."""
    if isinstance(value, tuple):
        value = list(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:40].replace("|", "/") + '…"'


def shown_type(field: FieldInfo) -> str:
    """The type in words, with its limits, and whether null is allowed."""
    limits = [text for item in field.metadata for text in limit(item)]
    kind, null, _ = type_name(field.annotation).partition(" or null")
    return " ".join([kind, *limits]).replace("|", "\\|") + null


def limit(item: Any) -> Iterator[str]:
    """The comparison that pydantic makes, as a sign and a number."""
    for kind, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
        if isinstance(item, kind):
            yield f"{sign} {getattr(item, kind.__name__.lower())}"


def type_name(annotation: Any) -> str:
    """A Python type in words: `int`, `text`, `one of a, b`, `list of text`; `null` is allowed."""
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        type(None): "null",
    }
    if annotation in names:
        return names[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin is typing.Annotated:
        return type_name(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(kind) for kind in args)
    if origin is tuple:
        kinds = [kind for kind in args if kind is not Ellipsis]
        count = "" if Ellipsis in args else f"{len(kinds)} × "
        return f"list of {count}{type_name(kinds[0])}"
    if origin is dict:
        return "section of texts"
    return str(getattr(annotation, "__name__", annotation))


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, groups before their members."""
    for name, command in cli.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            for inner, member in command.commands.items():
                yield f"{name} {inner}", member


def command_help() -> str:
    """Every command's help text, a heading each."""
    parts = []
    for name, command in commands():
        context = click.Context(
            command, info_name=f"python -m yelp_hpc {name}", max_content_width=88
        )
        parts.append(f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```")
    return "\n\n".join(parts)
