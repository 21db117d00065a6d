"""Progress: one bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

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


def say(text: str) -> None:
    """Print one line to standard error, at once, without control characters."""
    print(plain(text), file=sys.stderr, flush=True)


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
