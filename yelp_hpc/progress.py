"""Progress: one bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

Item = TypeVar("Item")

LOG_SECONDS = 5.0


_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)
"""What a terminal would obey (ECMA-48): colours, cursor moves, titles, links."""
# C0 but tab and line end, DEL, C1, marks that turn the writing direction, halves of characters
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    """`text` of foreign origin without what a terminal would obey instead of show."""
    text = _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    return _CONTROL.sub("", text.replace("\r", "\n"))


def as_called(text: str) -> str:
    """`text` with its commands spelled as this one was: `yelp-hpc`, or `python -m yelp_hpc`.

    With its folder, where the shell would not find it by its name. One for an image stays: there it
    lies elsewhere.
    """
    called = Path(sys.argv[0])
    if called.name != "yelp-hpc":
        return text
    found = shutil.which(called.name)
    known = called.name == sys.argv[0] or (found and Path(found).resolve() == called.resolve())
    name = "yelp-hpc" if known else shlex.quote(sys.argv[0])
    return re.sub(r"(?<!\.sif )python -m yelp_hpc", lambda _: name, text)


def say(text: str) -> None:
    """Print one line to standard error, at once, without control characters."""
    write(f"{as_called(plain(text))}\n")


def write(text: str) -> None:
    """Write to standard error, at once; where nobody reads it any more, nowhere."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:  # `2>&1 | head`: the work goes on
        to_nowhere(sys.stderr)
    except OSError:  # on a full disk, too; what waits to be printed is, once it can be
        pass


def to_nowhere(stream: TextIO) -> None:
    """What is printed there from now on, and what waits to be, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flush_streams() -> None:
    """Print what waits to be; where that cannot be, Python would end with a code of its own."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            to_nowhere(stream)


def clock(seconds: float) -> str:
    """`H:MM:SS`, fractions of a second cut off."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield `items` and show how many of `total` are done.

    A terminal gets a bar with the time left; anything else a line every few seconds, none when
    the work ends before that.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, description=label, total=total, console=Console(stderr=True))
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            left = f", about {(now - start) / done * (total - done):.0f} s left" if done else ""
            say(f"{label}: {done}/{total}, {now - start:.0f} s{left}")
        yield item


_STEP = re.compile(r"step (\d+)/(\d+)  ?(.*)")


@contextmanager
def step_bar() -> Iterator[Callable[[str], None]]:
    """Takes a log's lines and shows them on standard error.

    On a terminal `step A/B …` becomes a bar that stays put; the last step, and those with a
    validation, are printed too. Anything else is printed as it is.
    """
    if not sys.stderr.isatty():
        yield write
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn
    from rich.table import Column

    console = Console(stderr=True, markup=False, highlight=False)
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    columns = (BarColumn(20), TextColumn("{task.completed:.0f}/{task.total:.0f}"), text)
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bars:
        task: TaskID | None = None

        def show(line: str) -> None:
            nonlocal task
            line = plain(line.rstrip("\n"))
            step = _STEP.match(line)
            if step is None or "validation" in line or step[1] == step[2]:
                console.print(line, soft_wrap=True)
            if step is not None:
                task = bars.add_task("") if task is None else task
                done, total, what = int(step[1]), int(step[2]), step[3]
                bars.update(task, completed=done, total=total, description=what, refresh=True)

        yield show
