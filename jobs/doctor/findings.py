"""What a check found: ok, a warning or a failure, and the line that mends it; how that is printed.

Pure but for `print_findings`: findings in, lines of at most 80 columns out.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from yelp_hpc.progress import as_called, plain

Level = Literal["ok", "warning", "failure"]
WIDTH = 80
_COLOURS = {"ok": "32", "warning": "33", "failure": "31"}
_INDENT = " " * 26
_MARK = {"config": "→ ", "command": "$ ", "advice": "→ "}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    """A config line, a shell command or, where a person must act, a sentence."""
    kind: Literal["config", "command", "advice"] = "config"
    """What the remedy is."""
    where: str = "host"
    """`host`, `node NAME` or `image`."""


def ok(check: str, text: str) -> Finding:
    """What was looked at and is as it should be."""
    return Finding(check, "ok", text)


def config_line(check: str, level: Level, text: str, remedy: str) -> Finding:
    """A finding that a line of a config mends."""
    return Finding(check, level, text, remedy, "config")


def command(check: str, level: Level, text: str, remedy: str) -> Finding:
    """A finding that a shell command mends."""
    return Finding(check, level, text, remedy, "command")


def advice(check: str, level: Level, text: str, remedy: str) -> Finding:
    """A finding that only a person can mend."""
    return Finding(check, level, text, remedy, "advice")


def listed(names: Iterable[str], limit: int = 8) -> str:
    """`a, b, c … (20 in all)`."""
    every = list(dict.fromkeys(names))
    text = ", ".join(every[:limit]) or "none"
    return text if len(every) <= limit else f"{text} … ({len(every)} in all)"


def failed(findings: Sequence[Finding]) -> bool:
    """Whether anything found would make a job fail."""
    return any(finding.level == "failure" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """What `--json` prints."""
    counts = {level: sum(f.level == level for f in findings) for level in _COLOURS}
    return {"counts": counts, "findings": [asdict(finding) for finding in findings]}


def print_findings(findings: Sequence[Finding], as_json_text: bool = False) -> None:
    """Print to standard output; colours on a terminal, unless NO_COLOR is set.

    Exits with 1 when there is a failure.
    """
    if as_json_text:
        print(json.dumps(as_json(findings)))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(as_called("\n".join(lines(findings, colour))))
    if failed(findings):
        sys.exit(1)


def lines(findings: Sequence[Finding], colour: bool = False) -> list[str]:
    """A heading a place, a line or more a finding, a summary.

    Only an unbreakable path or word makes a line longer than 80 columns.
    """
    result = []
    for where in dict.fromkeys(finding.where for finding in findings):
        result.append(plain(where))
        for finding in findings:
            if finding.where == where:
                result += _entry(finding, colour)
    counts = as_json(findings)["counts"]
    words = [f"{n} {level}{'s' * (n != 1 and level != 'ok')}" for level, n in counts.items()]
    return [*result, ", ".join(words)]


def _entry(finding: Finding, colour: bool) -> list[str]:
    head = f"  {finding.level:<8} {finding.check:<14} "
    body = _wrap(finding.text, _INDENT)
    first = head + body[0].strip()
    if colour:
        code = _COLOURS[finding.level]
        first = first.replace(finding.level, f"\x1b[{code}m{finding.level}\x1b[0m", 1)
    rest = body[1:]
    if finding.remedy:
        mark = _MARK[finding.kind]
        for line in finding.remedy.splitlines():
            # a long command goes on behind a backslash, so that it can be copied as it stands
            tail = " \\" if finding.kind == "command" else ""
            wrapped = _wrap(line, _INDENT + "  ", len(tail))
            wrapped = [part + tail for part in wrapped[:-1]] + wrapped[-1:]
            rest += [_INDENT + mark + wrapped[0].strip(), *wrapped[1:]]
    return [first, *rest]


def _wrap(text: str, indent: str, spare: int = 0) -> list[str]:
    made = textwrap.wrap(
        " ".join(plain(text).split()),
        WIDTH - spare,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return made or [indent]
