"""The manual and the README say what is so: their examples are executed, or at least parsed.

A fenced block under `<!-- test: run -->` runs in a folder with a tiny model, `reviews.csv`,
`mine.yaml` and a finished run `runs/mine`; what stands below a `$` line must be printed, `…` being
anything, and `# exits with N` names an exit code that is not 0. A block under `<!-- test: in FILE
-->` shows a message that needs a cluster: its words must stand in that source file.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

import yelp_hpc
from tests.tiny import make_model, reviews
from yelp_hpc.cli.main import cli
from yelp_hpc.config import Config
from yelp_hpc.explain import dotted_keys
from yelp_hpc.jobs.cluster import ClusterConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOOLS = "bash sh cat cp env grep head ls mkdir mv printf rm sed sleep touch chmod".split()  # noqa: SIM905
FENCE = re.compile(
    r"(?:<!-- test: ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    marker: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return [
        Block(name, text[: m.start(3)].count("\n") + 1, m[1] or "", m[2], m[3])
        for m in FENCE.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]
EXECUTED = sorted({block.page for block in ALL if block.marker == "run"})


def test_markers_are_understood_and_many_blocks_run() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    marked = re.findall(r"^<!-- test: .* -->$", text, re.MULTILINE)
    found = [block for block in ALL if block.marker]
    assert len(found) == len(marked), "a marker does not stand right above a block"
    assert all(re.fullmatch(r"run|in [\w/.]+", block.marker) for block in found)
    assert sum(block.marker == "run" for block in found) >= 20


# --- executed -----------------------------------------------------------------------------------


def tiny_study(folder: Path) -> None:
    """A tiny model, `reviews.csv` and the quick start's `mine.yaml` in `folder`."""
    make_model(folder / "model")
    (folder / "yelp_hpc.sif").write_bytes(b"")  # what the page's step 3 builds; looked at, not run
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows((label, text) for text, label in reviews(120))
    (mine,) = [b.text for b in ALL if b.language == "yaml" and b.text.startswith("# mine.yaml")]
    (folder / "mine.yaml").write_text(mine.replace("demo:smollm2-135m", "model"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages presume, with a finished run made by the command that they name."""
    folder = tmp_path_factory.mktemp("manual") / "work"
    folder.mkdir()
    tiny_study(folder)
    (command,) = {
        line.removeprefix("$ ")
        for b in ALL
        for line in b.text.splitlines()
        if line.startswith("$") and "submit all --config mine.yaml" in line and "--wait" in line
    }
    code, output = execute(command, folder)
    assert code == 0, output
    shutil.copytree(folder, folder.with_name("untouched"), symlinks=True)
    return folder


def execute(command: str, folder: Path, stdin: str = "") -> tuple[int, str]:
    """Run a line as typed in a shell whose PATH has `python` and everyday tools, but no Slurm."""
    tools = folder / ".bin"
    if not tools.is_dir():
        tools.mkdir()
        for name in TOOLS:
            (tools / name).symlink_to(shutil.which(name) or "/missing")
        (tools / "python").write_text(
            f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n', encoding="utf-8"
        )
        (tools / "python").chmod(0o755)
        (folder / "configs").symlink_to(ROOT / "configs")
    keep = ("LANG", "LC_ALL", "OMP_NUM_THREADS", "SSL_CERT_FILE")
    env = {key: os.environ[key] for key in keep if key in os.environ}
    env |= {"PATH": str(tools), "HOME": str(folder), "YELP_HPC_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [tools / "bash", "-c", command],
        cwd=folder,
        env=env,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def steps(block: Block) -> Iterator[tuple[str, int, str]]:
    """`(command, exit code, expected output)` of a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        command = lines.pop(0)
        while command.endswith("\\"):
            command = command[:-1] + lines.pop(0)
        code = re.search(r"# exits with (\d+)", command)
        yield command, int(code[1]) if code else 0, "\n".join(lines)


def matches(expected: str, output: str) -> bool:
    """Whether `output` is `expected`, runs of white space being one space and `…` anything."""
    flat = [" ".join(part.split()) for part in expected.split("…")]
    pattern = ".*".join(re.escape(part) for part in flat)
    return re.fullmatch(pattern.replace(r"\ ", r"\s+"), " ".join(output.split())) is not None


def test_matching_is_strict() -> None:
    assert matches("a … c", "a b\n  c") and matches("a\n…", "a\nb\nc")
    assert not matches("a", "a b") and not matches("a … c", "a b")


@pytest.mark.parametrize("page", EXECUTED)
def test_examples_print_what_the_page_shows(page: str, finished: Path) -> None:
    folder = finished  # a run directory names its data and model by absolute paths
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("untouched"), folder, symlinks=True)
    for block in ALL:
        if block.page != page or block.marker != "run":
            continue
        if block.language == "python":
            code, output = execute("python -", folder, stdin=block.text)
            assert code == 0, f"{page}:{block.line}\n{output}"
            continue
        for command, wanted, expected in steps(block):
            code, output = execute(command, folder)
            assert code == wanted, f"{page}:{block.line}: {command}\n{output}"
            assert "Traceback" not in output, f"{page}:{block.line}: {command}\n{output}"
            if expected.strip():
                place = f"{page}:{block.line}: {command}"
                shown = f"{place}\n--- printed:\n{output}\n--- shown:\n{expected}"
                assert matches(expected, output), shown


# --- looked up ----------------------------------------------------------------------------------


def texts(source: Path) -> str:
    """Every string of a Python file, what an f-string fills in as `…`, white space as one space."""
    found = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append(
                "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return " ".join(" ".join(text.split()) for text in found)


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.marker.startswith("in ")], ids=lambda b: f"{b.page}:{b.line}"
)
def test_messages_stand_in_the_source(block: Block) -> None:
    source = texts(ROOT / block.marker.removeprefix("in "))
    fragments = [" ".join(part.split()) for part in block.text.split("…")]
    for fragment in filter(None, (part.strip(" .:;,-") for part in fragments)):
        assert fragment in source, f"{block.page}:{block.line}: {fragment!r}"


# --- parsed -------------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, str]]:
    for block in ALL:
        joined = re.sub(r"\\\n\s*", " ", block.text)
        for number, line in enumerate(joined.splitlines()):
            found = re.match(r"(?:\$ )?(?:\S+=\S+ )*python -m yelp_hpc +(.*)", line)
            if found and "…" not in line and not found[1].startswith("COMMAND"):
                yield f"{block.page}:{block.line + number}", found[1]


def test_every_command_line_parses() -> None:
    lines = list(command_lines())
    assert len(lines) >= 40
    problems = []
    for place, line in lines:
        words = shlex.split(re.split(r"  +|\s[|>#]", line)[0])
        command: click.Command = cli
        context = click.Context(cli, info_name="yelp_hpc")
        try:
            while isinstance(command, click.Group) and not words[0].startswith("-"):
                found = command.get_command(context, words[0])
                if found is None:
                    raise click.UsageError(f"no command {words[0]}")
                command, words = found, words[1:]
                context = click.Context(command, parent=context, info_name=command.name)
            if not isinstance(command, click.Group):
                command.parse_args(context, [word.strip("[]") for word in words])
        except click.ClickException as error:
            problems.append(f"{place}: {line}: {error.format_message()}")
    assert not problems, "\n".join(problems)


def test_files_that_are_named_exist() -> None:
    named = re.compile(r"`((?:configs|jobs|yelp_hpc|tests|benchmarks|containers|docs)/[\w./-]+\w)`")
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert not missing


def descriptions(model: type[BaseModel]) -> Iterator[tuple[str, str | None]]:
    """`(key, description)` of every key of a settings class, its sections' too."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if inner:
            yield from ((f"{name}.{key}", note) for key, note in descriptions(inner[0]))
        else:
            yield name, field.description


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_broken_link_and_shows_every_key(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    keys = (tmp_path / "site" / "configuration.html").read_text(encoding="utf-8")
    assert [key for key in dotted_keys(Config) if f"<code>{key}</code>" not in keys] == []
    assert [key for key, note in descriptions(Config) if not note] == []
    assert [key for key, note in descriptions(ClusterConfig) if not note] == []
    shown = (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f'id="{name}"' not in shown] == []
    named = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    public = [name for name in yelp_hpc.__all__ if name[0] != "_"]
    assert [name for name in public if f'id="{name.lower()}"' not in named] == []
    assert "fonts.googleapis.com" not in (tmp_path / "site" / "index.html").read_text()
