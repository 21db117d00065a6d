"""Completion in the real shells, --help with examples, and what Ctrl-C says."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
import pytest

from yelp_hpc.cli.main import cli, interrupted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shell_environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with the command yelp-hpc of this tree, and an empty home."""
    command = tmp_path / "bin" / "yelp-hpc"
    command.parent.mkdir()
    command.write_text(
        f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -c "
        '"import sys; sys.argv[0] = \\"yelp-hpc\\"; from yelp_hpc.cli.main import main; '
        'main()" "$@"\n'
    )
    command.chmod(0o755)
    (tmp_path / "home").mkdir()
    path = f"{command.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(tmp_path / "home")}


def script(shell: str, folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "yelp_hpc", "completion", shell],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    path = folder / f"completion.{shell}"
    path.write_text(done.stdout)
    return path


CASES = [
    ("yelp-hpc su", "submit"),
    ("yelp-hpc submit pre", "prepare"),
    ("yelp-hpc submit all --exec", "--executor"),
    ("yelp-hpc config show --set lora.r", "lora.rank="),
    ("yelp-hpc plan --gpu rtx3", "rtx3090"),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash(shell_environment: dict[str, str], tmp_path: Path, line: str, expected: str) -> None:
    words = line.split()
    quoted = " ".join(shlex.quote(word) for word in words)
    code = (
        f"source {script('bash', tmp_path)}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        'complete -p yelp-hpc >/dev/null && _yelp_hpc_completion yelp-hpc; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, env=shell_environment
    )
    assert expected in done.stdout.split(), done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("line", "expected"), CASES)
def test_fish(shell_environment: dict[str, str], tmp_path: Path, line: str, expected: str) -> None:
    code = f"source {script('fish', tmp_path)}; complete --do-complete {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, env=shell_environment
    )
    assert expected in done.stdout.split(), done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(("line", "expected"), CASES)
def test_zsh(shell_environment: dict[str, str], tmp_path: Path, line: str, expected: str) -> None:
    # an interactive zsh in a pseudo-terminal, as a user has it: Tab, then what the line became
    code = f"""
        zmodload zsh/zpty
        zpty shell {shlex.quote(f"{shutil.which('zsh')} -f -i")}
        zpty -w shell 'PS1="" ; autoload -Uz compinit; compinit -u -D'
        zpty -w shell 'source {script("zsh", tmp_path)}'
        zpty -w shell 'print RE''ADY'
        while zpty -r shell got; do [[ $got == *READY* ]] && break; done
        zpty -w -n shell {shlex.quote(line)}$'\\t'
        sleep 4
        zpty -w -n shell $'\\x15print DO\\'\\'NE\\n'
        while zpty -r shell got; do print -r -- $got; [[ $got == *DONE* ]] && break; done
    """
    done = subprocess.run(
        ["zsh", "-f", "-c", code], capture_output=True, text=True, env=shell_environment, timeout=60
    )
    assert expected in done.stdout, done.stdout + done.stderr


def commands() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in cli.commands.items():
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {inner}", sub) for inner, sub in command.commands.items()]
    return found


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_help_has_an_example_that_parses(name: str, command: click.Command) -> None:
    help_text = (command.help or "").replace("\\\n", " ")
    lines = [line.strip() for line in help_text.splitlines()]
    examples = [line for line in lines if line.startswith(f"python -m yelp_hpc {name.split()[0]}")]
    assert examples, "no example"
    for example in examples:
        words = shlex.split(
            example.partition("|")[0].partition("&&")[0].partition(">")[0].partition("  (")[0]
        )
        check_command_line(words[3:])


def check_command_line(words: list[str]) -> None:
    """Let click parse a command line without running it; raises click's error."""
    command: click.Command = cli
    context = click.Context(cli, info_name="yelp_hpc")
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, f"no command {words[0]}"
        command, words = found, words[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    command.parse_args(context, list(words))


def test_ctrl_c_says_that_jobs_go_on_and_how_to_follow_them() -> None:
    text = interrupted(["submit", "all", "--run", "runs/my run", "--wait"])
    assert "status --run 'runs/my run' --watch" in text and "cancel --run 'runs/my run'" in text
    assert interrupted(["config", "show"]) == "interrupted"


def test_ctrl_c_ends_status_watch_with_130_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\ndata: {source: file, train: r.csv, test_rows: 5}\n"
    )
    from yelp_hpc.config import load_config
    from yelp_hpc.rundir.manifest import record_run

    record_run(tmp_path / "run", load_config(tmp_path / "c.yaml"), "c.yaml", [])
    code = (
        "import yelp_hpc.jobs.status as s, signal, time, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs\n"
        "s.show_status = lambda *a, **k: (print('up', flush=True), time.sleep(60))\n"
        f"sys.argv = ['x', 'status', '--run', {str(tmp_path / 'run')!r}, '--watch']\n"
        "from yelp_hpc.cli.main import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "jobs that were submitted go on" in errors and "Traceback" not in errors


def on_terminal(code: str, **env: str) -> str:
    """What a program writes to a terminal (a pseudo-terminal here)."""
    outer, inner = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=inner,
        stderr=inner,
        cwd=ROOT,
        env={**clean, "TERM": "xterm-256color", **env},
    )
    os.close(inner)
    got = b""
    with suppress(OSError):  # the terminal's end
        while part := os.read(outer, 65536):
            got += part
    os.close(outer)
    assert process.wait() == 0
    return got.decode()


PROGRESS = "from yelp_hpc.progress import track; list(track(range(3), 3, 'working'))"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


def test_no_color_turns_colours_off() -> None:
    assert COLOUR.search(on_terminal(PROGRESS))
    assert not COLOUR.search(on_terminal(PROGRESS, NO_COLOR="1"))


def test_nothing_but_text_off_a_terminal() -> None:
    env = {**os.environ, "TERM": "xterm-256color"}
    done = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, env=env, cwd=ROOT)
    assert b"\x1b" not in done.stdout + done.stderr


LINES = [
    "starting [bold]on[/bold] a node",
    "step 1/3  loss 1.0000",
    "step 2/3  loss 0.5000  validation loss 0.4",
    "step 3/3  loss 0.2500",
    "train: done",
]
STEPS = f"""
from yelp_hpc.progress import step_bar
with step_bar() as show:
    list(map(show, {LINES!r}))
"""


def test_steps_of_training_are_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    shown = on_terminal(STEPS)
    assert "━" in shown and "1/3" in shown
    kept = [line for line in LINES if not line.startswith("step 1/3")]
    places = [shown.index(line) for line in kept]
    assert places == sorted(places)
    assert "step 1/3" not in shown  # the bar alone says it
    code = STEPS.replace("map(show, [", "map(lambda x: show(x + chr(10)), [")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines() == LINES
