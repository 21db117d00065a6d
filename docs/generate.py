"""Pages that are made from the code, so that they cannot fall behind it: a hook of mkdocs.

Replaces `<!-- keys: CLASS -->` by a table of a settings class's keys (`Config`, `ClusterConfig`)
`<!-- commands -->` by the help of every command and `<!-- api -->` by the docstrings of what the
package exports.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from html import escape, unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yelp_hpc
from yelp_hpc.cli.main import cli
from yelp_hpc.config import Config
from yelp_hpc.explain import keys, section_of
from yelp_hpc.jobs.cluster import ClusterConfig

SETTINGS: dict[str, type[BaseModel]] = {"Config": Config, "ClusterConfig": ClusterConfig}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' hook: fill the placeholders of a page."""
    markdown = re.sub(
        r"<!-- keys: (\w+) -->", lambda match: key_tables(SETTINGS[match[1]]), markdown
    )
    for placeholder, made in (("<!-- commands -->", command_help), ("<!-- api -->", api_reference)):
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, made())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """mkdocs' hook: have the copy button of a console block take its commands alone."""
    return re.sub(r"(?<=<pre><span></span>)<code>(.*?)(?=</code>)", _copied, html, flags=re.DOTALL)


def _copied(block: re.Match[str]) -> str:
    text = unescape(re.sub(r"<[^>]+>", "", block[1]))
    if not text.startswith("$ "):
        return block[0]
    return f'<code data-copy="{escape(commands_of(text), quote=True)}">{block[1]}'


def commands_of(block: str) -> str:
    """The commands of a console block, with their continued lines and without prompt and output."""
    lines: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            lines.append(line.removeprefix("$ "))
        elif lines and lines[-1].endswith("\\"):
            lines.append(line)
    return "\n".join(lines)


def key_tables(model: type[BaseModel]) -> str:
    """A heading and a table for each section; keys outside of one come first."""
    top = [(name, field) for name, field in keys(model).items() if not section_of(field)]
    parts = [table(top)] if top else []
    shown: dict[type[BaseModel], str] = {}
    for name, field in keys(model).items():
        inner = section_of(field)
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
        rows = [(f"{name}.{key}", value) for key, value in keys(inner).items()]
        parts.append(f"### `{name}` {{#{anchor(model, name)}}}\n\n{text}\n\n{table(rows)}")
    return "\n\n".join(parts)


def anchor(model: type[BaseModel], name: str) -> str:
    """The id of a section's heading."""
    return f"{model.__name__.lower()}-{name}"


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


def api_reference() -> str:
    """A section for each public name: signature, docstring, documented members."""
    parts = []
    for name in yelp_hpc.__all__:
        value = getattr(yelp_hpc, name)
        if not callable(value):
            continue
        parts.append(f"## {name}\n\n{signature(name, value)}\n\n{prose(value.__doc__)}")
        for key, member in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(member, "fget", None) or getattr(member, "func", None) or member
            if key[0] != "_" and inspect.isfunction(function):
                called = member is function
                gives = inspect.signature(function).return_annotation
                head = f"```python\n{key}: {gives}\n```"
                head = signature(key, member) if called else head
                parts.append(f"### {name}.{key}\n\n{head}\n\n{prose(function.__doc__)}")
        if fields := attribute_notes(value) if inspect.isclass(value) else "":
            parts.append(f"**Attributes of a {name}:**\n\n{fields}")
    return "\n\n".join(parts)


def signature(name: str, value: Any) -> str:
    """How something is called, a line if it fits."""
    called = inspect.signature(value)
    parameters: list[str] = []
    for one in called.parameters.values():
        if one.name == "self":
            continue
        if one.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        default = "" if one.default is inspect.Parameter.empty else f" = {one.default!r}"
        parameters.append(f"{one.name}: {one.annotation}{default}")
    gives = "" if inspect.isclass(value) else f" -> {called.return_annotation}"
    line = f"{name}({', '.join(parameters)}){gives}"
    if len(line) > 88:
        line = f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){gives}"
    return f"```python\n{line}\n```"


def prose(docstring: str | None) -> str:
    """A docstring as markdown: `Args:` and `Raises:` become lists."""
    text = inspect.cleandoc(docstring or "")
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line in ("Args:", "Raises:"):
            lines += [f"**{line}**", ""]
            inside = True
        elif inside and (entry := re.match(r"    (\w+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            inside = inside and line.startswith("    ")
            lines.append(f"  {line.strip()}" if inside else line)
    return "\n".join(lines)


def attribute_notes(kind: type) -> str:
    """The attributes of a class with the texts that stand below them."""
    (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    return "\n".join(
        f"- `{one.target.id}`: {inspect.cleandoc(note.value.value)}"
        for one, note in pairwise(body)
        if isinstance(one, ast.AnnAssign)
        and isinstance(one.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    )
