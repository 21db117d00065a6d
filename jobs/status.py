"""The state of a run: from the markers first, then squeue, then sacct where it answers.

`watch.facts.gather` reads the run directory and asks Slurm once; `summarise` is pure; `show_status`
prints.
A controller that is down or an sacct that is absent only takes columns away.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.config import Config
from yelp_hpc.jobs.site.reasons import reason_in_words
from yelp_hpc.jobs.slurm import Row
from yelp_hpc.jobs.watch.facts import Facts, gather
from yelp_hpc.progress import clock, plain
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt
from yelp_hpc.rundir.paths import Task

if TYPE_CHECKING:  # loaded when a table is drawn
    from rich.table import Table
    from rich.text import Text

WATCH_SECONDS = 5.0
WORST_FIRST = ("failed", "cancelled", "stopped", "running", "waiting", "unknown", "partial")
"""States of a stage that is not done, in the order in which they name a whole run's."""


@dataclass(frozen=True)
class JobStatus:
    """One line of the table."""

    name: str
    state: str
    """done, absent, one of `WORST_FIRST`, or in a study shared."""
    job: str = ""
    node: str = ""
    elapsed: str = ""
    limit: str = ""
    restarts: int = 0
    detail: str = ""
    gpu_hours: float = 0.0
    gpu_hours_lost: float = 0.0
    shards: dict[str, int] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    """infer: rows done and known of, rows_per_second of the running shards, eta_seconds."""
    training: dict[str, Any] = field(default_factory=dict)


def summarise(facts: Sequence[Facts]) -> list[JobStatus]:
    """The table's lines. Pure: markers win over squeue, squeue over attempts, these over sacct."""
    return [_summarise(fact) for fact in facts]


def _summarise(fact: Facts) -> JobStatus:
    job = fact.submission["job"] if fact.submission else ""
    mine = [a for a in fact.attempts if attempts.within(a.job, job)]
    # of each part of the work that is not done: how its last attempt ended
    last = {
        a.task: a for a in fact.attempts if not (a.task and fact.shards_done.issuperset(a.task))
    }
    state, detail = _state(fact, last)
    running = [row for row in fact.rows if row.runs]
    shown = running[0] if running else (fact.rows or fact.accounting or (Row("", ""),))[0]
    used, lost = attempts.gpu_hours(fact.attempts)
    latest = mine[-1] if mine else None
    elapsed = shown.elapsed
    if not elapsed and latest:
        elapsed = clock(attempts.lasted(latest))
    shards, rows = {}, {}
    if fact.shards:
        failed = {shard for task, a in last.items() if a.verdict == "failed" for shard in task}
        shards = {
            "done": len(fact.shards_done),
            "running": len(running),
            "failed": len(failed.difference(fact.shards_done)),
            "all": fact.shards,
        }
        parts = [f"{shards['done']}/{fact.shards} shards"]
        parts += [f"{shards[k]} {k}" for k in ("running", "failed") if shards[k]]
        if state == "running":
            rows = rows_done(fact)
            parts += _speed(rows)
        detail = ", ".join([*parts, *([detail] if detail and state != "done" else [])])
    elif fact.training and state != "done":
        detail = "; ".join(part for part in (_training(fact), detail) if part)
    return JobStatus(
        name=fact.name,
        state=state,
        job=job,
        node=shown.node or (latest.node if latest else ""),
        elapsed=elapsed,
        limit=shown.limit,
        restarts=max(
            [row.restarts for row in fact.rows] + [attempt.restart for attempt in mine], default=0
        ),
        detail=detail,
        gpu_hours=round(used, 3),
        gpu_hours_lost=round(lost, 3),
        shards=shards,
        rows=rows,
        training=fact.training or {},
    )


def rows_done(fact: Facts) -> dict[str, Any]:
    """Rows done, rows per second of the shards that run now, and the time that is left.

    Shards that have not begun are taken to be as large as those that have, on average.
    """
    known = fact.shards_progress.values()
    if not known:
        return {}
    rows = sum(line["rows"] for line in known)
    done = sum(line["done"] for line in known)
    expected = round(rows / len(known) * fact.shards)
    rates = [line["rows_per_second"] or 0.0 for line in known if line["state"] == "running"]
    speed = sum(rates)
    return {
        "done": done,
        "all": expected,
        "rows_per_second": round(speed, 3),
        "eta_seconds": round((expected - done) / speed, 1) if speed else None,
    }


def _speed(rows: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    parts = [f"{rows['done']}/{rows['all']} rows"]
    if rows["eta_seconds"] is not None:
        parts += [f"{rows['rows_per_second']:.1f} rows/s", f"ETA {clock(rows['eta_seconds'])}"]
    return parts


def _state(fact: Facts, last: dict[Task, Attempt]) -> tuple[str, str]:
    if fact.done:
        return "done", ""
    if any(row.runs for row in fact.rows) or fact.alive:
        suspended = bool(fact.rows) and all(
            row.state == "SUSPENDED" for row in fact.rows if row.runs
        )
        return "running", "suspended by Slurm" if suspended else ""
    if fact.rows:
        words = reason_in_words(fact.rows[0].reason)
        return "waiting", words
    if fact.unseen:
        if any(not attempt.verdict for attempt in last.values()):
            return "running", "squeue does not show it"
        return "waiting", "submitted; squeue does not show it yet"
    failed = [attempt for attempt in last.values() if attempt.verdict == "failed"]
    if failed:
        return "failed", failed[-1].reason.partition("\n")[0]
    states = {row.state for row in fact.accounting}
    if "CANCELLED" in states or (fact.submission or {}).get("cancelled"):
        return "cancelled", "cancelled; submit it again to go on"
    said = f": {fact.said}" if fact.said else ""
    asked = [a.reason.partition("\n")[0] for a in last.values() if a.verdict == "requeued"]
    if asked and states == {"TIMEOUT"}:  # nobody answered until the limit came
        return "stopped", f"{asked[-1]}; Slurm did not run it again: submit it again to go on"
    if states - {"COMPLETED", "PENDING", "RUNNING", "REQUEUED"} and not _saved(last):
        bad = sorted(states - {"COMPLETED"})[0]
        return "failed", f"Slurm says {bad}{said or f': {_WORDS.get(bad, _SEE_LOGS)}'}"
    if any(attempt.verdict in ("stopped", "lost", "") for attempt in last.values()):
        stopped = [a.reason for a in last.values() if a.verdict == "stopped"]
        if "PREEMPTED" in states:
            return "stopped", _WORDS["PREEMPTED"]
        if stopped and "submit again" in stopped[-1]:
            return "stopped", stopped[-1].partition("\n")[0]
        return "stopped", "interrupted; submit it again to go on"
    if fact.shards_done:
        return "partial", "submit infer to do the rest"
    if fact.submission is None:
        return "absent", "not submitted"
    if fact.said:
        return "failed", f"it never began{said}"
    return "unknown", "submitted, but Slurm has no trace of it"


def _saved(last: dict[Task, Attempt]) -> bool:
    """Whether the newest word of the supervisor is that all was saved: Slurm calls that FAILED."""
    return bool(last) and all(attempt.verdict == "stopped" for attempt in last.values())


_SEE_LOGS = "see `logs`"
_WORDS = {
    "TIMEOUT": "the time limit came before it had saved: raise save_seconds",
    "OUT_OF_MEMORY": "raise memory",
    "NODE_FAIL": "the node died and the job was not requeued",
    "PREEMPTED": "another job took its place and it was not requeued; submit it again",
    "DEADLINE": "its deadline came before it could end",
    "BOOT_FAIL": "the node did not start",
    "FAILED": "it failed before its supervisor could say why: see `logs`",
}


def _training(fact: Facts) -> str:
    line = fact.training or {}
    parts = [f"step {line.get('step')}/{fact.steps or '?'}"]
    if isinstance(line.get("loss"), int | float):
        parts.append(f"loss {line['loss']:.4f}")
    if line.get("tokens_per_second"):
        parts.append(f"{line['tokens_per_second']:.0f} tokens/s")
    if line.get("eta_seconds") is not None:
        parts.append(f"ETA {clock(line['eta_seconds'])}")
    return ", ".join(parts)


def render(
    lines: Sequence[JobStatus],
    problem: str = "",
    hours: attempts.GpuHours | None = None,
    width: int | None = None,
) -> str:
    """The table as plain text, a line a stage; with a `width`, folded to fit it.

    Where the whole does not fit, node and restarts stand among the details.
    """
    full = _table(lines, narrow=False)
    text = plain_text(full, UNFOLDED)
    if width is not None and max(map(len, text.splitlines())) > width:
        text = plain_text(_table(lines, narrow=True), width)
    notes = [str(hours)] if hours and hours.used else []
    if problem:
        notes.append(f"from the run directory alone, Slurm did not answer: {plain(problem)}")
    return "\n".join([text, *(plain_text(note, width or UNFOLDED) for note in notes)])


UNFOLDED = 10_000
"""Columns of what is no terminal: a line a stage, for `grep` and the like."""


def _table(lines: Sequence[JobStatus], narrow: bool) -> Table:
    from rich.table import Table

    head = ("stage", "state", "job", "elapsed/limit") if narrow else _COLUMNS
    table = Table(*head, "", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=None)
    for column in table.columns[:-1]:
        column.no_wrap = column.header != "job"
    for line in lines:
        time_used = "/".join(part for part in (line.elapsed, line.limit) if part)
        cells = [line.name, line.state, line.job, line.node, time_used, str(line.restarts)]
        detail = line.detail
        if narrow:
            cells = [*cells[:3], time_used]
            restarts = f"{line.restarts} restart{'s' * (line.restarts > 1)}" * bool(line.restarts)
            detail = "; ".join(filter(None, (detail, line.node, restarts)))
        table.add_row(*map(_cell, [*cells, detail]))
    return table


_COLUMNS = ("stage", "state", "job", "node", "elapsed/limit", "restarts")


def _cell(text: str) -> Text:
    from rich.text import Text

    return Text(" ".join(plain(text).split()), overflow="fold")


def plain_text(shown: Any, width: int) -> str:
    """What rich would show, as text of at most `width` columns."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False)
    console.print(shown, highlight=False, soft_wrap=False)
    lines: Any = console.file
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def collect_status(run_dir: str | Path, config: Config) -> tuple[list[JobStatus], str]:
    """The lines of the table, and why Slurm did not answer, if it did not."""
    facts, problem = gather(run_dir, config)
    return summarise(facts), problem


def show_status(run_dir: str | Path, as_json: bool = False, watch: bool = False) -> None:
    """Print the state; with `watch` until nothing runs or waits, in place on a terminal."""
    from yelp_hpc.rundir.manifest import load_run

    paths, config = load_run(run_dir)
    with screen(watch and not as_json) as show:
        while True:
            lines, problem = collect_status(paths.root, config)
            hours = attempts.gpu_hours(attempts.of_run(paths))
            if as_json:
                stages = [asdict(line) for line in lines]
                value = {"run": str(paths.root), "stages": stages, "gpu_hours": hours._asdict()}
                print(json.dumps({**value, "slurm": problem or None}), flush=True)
            else:
                show(partial(render, lines, problem, hours))
            if not watch or not any(line.state in ("running", "waiting") for line in lines):
                return
            time.sleep(WATCH_SECONDS)


@contextmanager
def screen(in_place: bool) -> Iterator[Callable[[Callable[..., str]], None]]:
    """Shows a text in the terminal's width, each in the place of the last if so wished."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        yield lambda text: print(text(), flush=True)
    elif not in_place:
        yield lambda text: print(text(width=console.width), flush=True)
    else:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            yield lambda text: live.update(Text(text(width=console.width)), refresh=True)
