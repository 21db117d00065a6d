"""The manual and the README say what is so: their examples are executed, or at least parsed.

A fenced block under `<!-- test: run -->` runs in a folder with a tiny model, `reviews.csv`,
`mine.yaml` and a finished run `runs/mine`; what stands below a `$` line must be printed, and
`# exits with N` names an exit code that is not 0. What differs from run to run (`VOLATILE`) is left
out of the comparison; so are all figures under `<!-- test: run, figures vary -->`. The pages show
what was printed; `YELP_HPC_RECORD=1 pytest tests/test_docs.py -k examples` writes it anew. A block
under `<!-- test: in FILE -->` shows a message that needs a cluster: its words must stand in that
source file.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

import yelp_hpc
from tests.test_texts import texts
from tests.tiny import SIF, make_model, reviews
from yelp_hpc.cli.main import cli
from yelp_hpc.config import Config
from yelp_hpc.explain import dotted_keys, keys
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


HOME = "/home/me/yelp"
"""The reader's working directory, in place of the test's."""
VOLATILE = [
    (r"\b\d+:\d\d:\d\d\b|\b\d\d-\d\d \d\d:\d\d:\d\d\b", "TIME"),
    (r"\blocal-\d+\b", "local-1"),
    (r"\b[0-9a-f]{12,64}\b", "DIGEST"),
    (r"─+", "─"),
    (r"\s+", " "),
]
"""What differs from run to run, and what stands for it."""

ALL = [block for page in PAGES for block in blocks(page)]
EXECUTED = sorted({block.page for block in ALL if block.marker.startswith("run")})


def test_markers_are_understood_and_many_blocks_run() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    marked = re.findall(r"^<!-- test: .* -->$", text, re.MULTILINE)
    found = [block for block in ALL if block.marker]
    assert len(found) == len(marked), "a marker does not stand right above a block"
    assert all(re.fullmatch(r"run(, figures vary)?|in [\w/.]+", block.marker) for block in found)
    assert sum(block.marker.startswith("run") for block in found) >= 20


# --- executed -----------------------------------------------------------------------------------


def tiny_study(folder: Path) -> None:
    """A tiny model, `reviews.csv` and the quick start's `mine.yaml` in `folder`."""
    make_model(folder / "model")
    (folder / "yelp_hpc.sif").write_bytes(SIF)  # what the page's step 2 builds; looked at, not run
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
    env["COLUMNS"] = "80"
    done = subprocess.run(
        [tools / "bash", "-c", command],
        cwd=folder,
        env=env,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, as_on_the_page(done.stdout, folder)


def as_on_the_page(output: str, folder: Path) -> str:
    """What was printed, with the reader's names of folders and programs."""
    output = output.replace(str(folder), HOME).replace(sys.executable, "python")
    output = output.replace(str(ROOT / "configs"), f"{HOME}/configs").replace(
        platform.node(), "node1"
    )
    return re.sub(r" +$", "", output, flags=re.MULTILINE)


def steps(block: Block) -> Iterator[tuple[str, int, str]]:
    """`(command, exit code, expected output)` of a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        command = lines.pop(0)
        while command.endswith("\\"):
            command = command[:-1] + lines.pop(0)
        code = re.search(r"# exits with (\d+)", command)
        yield command, int(code[1]) if code else 0, "\n".join(lines)


def comparable(text: str, figures_vary: bool) -> str:
    """`text` without what differs from run to run."""
    for pattern, word in VOLATILE:
        text = re.sub(pattern, word, text)
    return re.sub(r"[-+±]?\d[\d.,]*(?:e[-+]?\d+)?%?", "0", text) if figures_vary else text


def test_the_comparison_is_strict_but_for_what_varies() -> None:
    assert comparable("a  1.5\nb local-7", False) == comparable("a 1.5 b local-9", False)
    assert comparable("a 1.5", False) != comparable("a 1.6", False)
    assert comparable("a 1.5 +2e-3", True) == comparable("a 17 -1", True)
    assert comparable("a 1.5", True) != comparable("b 1.5", True)


def test_no_output_is_cut_short_and_no_block_changes_the_shell() -> None:
    """What is pasted runs in one shell, what is tested in one a command: it is the same."""
    shown = [b for b in ALL if b.marker.startswith("run") and b.language == "console"]
    for block in shown:
        for command, _, text in steps(block):
            assert "…" not in text, f"{block.page}:{block.line}"
            assert not re.search(r"(^|[;&] *)(cd|export|source|set|alias|\.) ", command), command


@pytest.mark.parametrize("page", EXECUTED)
def test_examples_print_what_the_page_shows(page: str, finished: Path) -> None:
    folder = finished  # a run directory names its data and model by absolute paths
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("untouched"), folder, symlinks=True)
    for block in ALL:
        if block.page != page or not block.marker.startswith("run"):
            continue
        if block.language == "python":
            code, output = execute("python -", folder, stdin=block.text)
            assert code == 0, f"{page}:{block.line}\n{output}"
            continue
        recorded = ""
        for command, wanted, expected in steps(block):
            code, output = execute(command, folder)
            place = f"{page}:{block.line}: {command}"
            assert code == wanted, f"{place}\n{output}"
            assert "Traceback" not in output, f"{place}\n{output}"
            silent = not expected.strip()  # what it prints does not matter there
            recorded += f"$ {command}\n" + ("" if silent else f"{output.rstrip()}\n")
            vary = "figures vary" in block.marker
            if not silent and "YELP_HPC_RECORD" not in os.environ:
                shown = f"{place}\n--- printed:\n{output}\n--- shown:\n{expected}"
                printed = comparable(output.strip(), vary)
                assert printed == comparable(expected.strip(), vary), shown
        if "YELP_HPC_RECORD" in os.environ:
            file = ROOT / page
            file.write_text(file.read_text(encoding="utf-8").replace(block.text, recorded))


# --- looked up ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.marker.startswith("in ")], ids=lambda b: f"{b.page}:{b.line}"
)
def test_messages_stand_in_the_source(block: Block) -> None:
    found = texts(ROOT / block.marker.removeprefix("in "))
    source = " ".join(" ".join(text.split()) for text in found)
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
        words = shlex.split(re.split(r"\s(?:[|>]|2>)", line)[0], comments=True)
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
                command.parse_args(context, words)
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
    for name, field in keys(model).items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if inner:
            yield from ((f"{name}.{key}", note) for key, note in descriptions(inner[0]))
        else:
            yield name, field.description


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built manual."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_without_a_broken_link_and_shows_every_key(site: Path) -> None:
    keys = (site / "configuration.html").read_text(encoding="utf-8")
    assert [key for key in dotted_keys(Config) if f"<code>{key}</code>" not in keys] == []
    assert [key for key, note in descriptions(Config) if not note] == []
    assert [key for key, note in descriptions(ClusterConfig) if not note] == []
    shown = (site / "commands.html").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f'id="{name}"' not in shown] == []
    named = (site / "api.html").read_text(encoding="utf-8")
    public = [name for name in yelp_hpc.__all__ if name[0] != "_"]
    assert [name for name in public if f'id="{name.lower()}"' not in named] == []
    pages = [page.read_text(encoding="utf-8") for page in (site).rglob("*.html")]
    assert not [p for p in pages if re.search(r'<(?:script|link)[^>]+(?:src|href)="https?:', p)]
    # opened as a file, the search reads the index as a script and has a worker of its own
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = ") and "requeue" in index
    assert all("iframe-worker.js" in page for page in pages)


def test_what_the_site_copies_is_what_is_executed(site: Path) -> None:
    """On every built page, the commands of every console block: those that `steps` finds."""
    for page in {block.page for block in ALL if block.page.startswith("docs/")}:
        html = (site / page.removeprefix("docs/")).with_suffix(".html").read_text(encoding="utf-8")
        copied = [unescape(text) for text in re.findall(r'<code data-copy="([^"]*)"', html)]
        consoles = [b for b in ALL if b.page == page and b.text.startswith("$ ")]
        commands = [[c.rstrip() for c, _, _ in steps(block)] for block in consoles]
        assert [text.replace("\\\n", "").splitlines() for text in copied] == commands, page


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_copying_a_block_copies_its_commands_alone() -> None:
    from docs.generate import commands_of, on_page_content

    consoles = [b for b in ALL if b.language == "console" and b.text.startswith("$ ")]
    assert len(consoles) >= 25
    for block in consoles:
        commands = [command.rstrip() for command, _, _ in steps(block)]
        assert commands_of(block.text).replace("\\\n", "").splitlines() == commands
    made = on_page_content("<pre><span></span><code>$ a &gt; b\n# said\n$ c\n</code></pre>")
    assert '<code data-copy="a &gt; b\nc">$ a' in made
    kept = "<pre><span></span><code>name: x\n</code></pre>"
    assert on_page_content(kept) == kept
