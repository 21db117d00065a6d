"""What the code says in its texts is there: the commands and options, the files of docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click

from yelp_hpc.cli.main import cli

ROOT = Path(__file__).parents[1]
SOURCES = sorted({*(ROOT / "yelp_hpc").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")})


def texts(source: Path) -> Iterator[str]:
    """Every string of a file; what an f-string fills in is `…`."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def unknown_options(said: str) -> Iterator[str]:
    """Options of our commands that a text names and that there are not."""
    context = click.Context(cli)
    for line in re.findall(r"(?:python -m yelp_hpc +|`)([a-z]\w*(?: [^`\n]*)?)", said):
        command: click.Command | None = cli
        words = line.split()
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(context, words.pop(0))
        if command is None or command is cli:
            continue
        known = {
            option for param in command.params for option in [*param.opts, *param.secondary_opts]
        }
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(words)):
            if option not in {*known, "--help"}:
                yield f"{command.name} {option}"


def test_the_reader_of_texts_finds_an_option_that_is_not_there() -> None:
    assert [*unknown_options("so: `doctor --node` says which")] == ["doctor --node"]
    assert [*unknown_options("so:\n  python -m yelp_hpc run train --runs DIR")] == ["run --runs"]
    assert [*unknown_options("`doctor --on-node`, `hf auth login --token`")] == []


def test_every_option_that_a_text_names_is_there() -> None:
    found = [
        f"{source.relative_to(ROOT)}: {problem}"
        for source in SOURCES
        for said in texts(source)
        for problem in unknown_options(said)
    ]
    assert not found, "\n".join(found)


FOREIGN = {"modeling_chatglm.py", "tokenization_chatglm.py", "random.py", "torch.py"}
"""Not ours: what a checkpoint carries along, what a user's folder may hold."""


def test_every_file_that_a_docstring_names_is_there() -> None:
    folders = ("yelp_hpc", "jobs", "tests", "benchmarks", "docs", "containers")
    there = [f"/{path}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    missing = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for name in re.findall(r"[\w/]+\.py\b", ast.get_docstring(node) or ""):
                    if name not in FOREIGN and not any(p.endswith(f"/{name}") for p in there):
                        missing.append(f"{source.relative_to(ROOT)}: {name}")
    assert not missing, "\n".join(missing)
