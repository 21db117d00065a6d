"""The state of a study: a line a run, from the same facts as the state of each run."""

from __future__ import annotations

import json
import time
from collections.abc import Container
from dataclasses import asdict, replace
from functools import partial

from yelp_hpc.jobs.status import (
    UNFOLDED,
    WATCH_SECONDS,
    WORST_FIRST,
    JobStatus,
    collect_status,
    plain_text,
    screen,
)
from yelp_hpc.jobs.study.submit import PARTS
from yelp_hpc.progress import plain
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import read_object
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.study import Study

_GOES_ON = ("running", "waiting")


def collect_study(study: Study) -> tuple[dict[str, list[JobStatus]], str]:
    """By run, the lines of its own table; and why Slurm did not answer, if it did not."""
    found, problem = {}, ""
    for run in study.runs:
        paths = study.run(run)
        lines: list[JobStatus] = []
        if paths.run_json.is_file():
            lines, problem = collect_status(paths.root, load_run(paths.root)[1])
        found[run.name] = [_taken(line, run.takes.keys()) for line in lines]
    return found, problem


def _taken(line: JobStatus, parts: Container[str]) -> JobStatus:
    """What another run makes is no part of this one that nobody submitted."""
    part = next((part for part, job in PARTS.items() if job == line.name), "")
    if part in parts and line.state == "absent":
        return replace(line, state="shared", detail="another run of the study makes it")
    return line


def state_of(lines: list[JobStatus]) -> tuple[str, str]:
    """A run's state in one word, and the stage that it is at."""
    for word in WORST_FIRST:
        for line in lines:
            if line.state == word:
                detail = f": {line.detail}" if line.detail else ""
                return word, f"{line.name}{detail}"
    if lines and lines[-1].state == "done":
        return "done", ""
    return "absent", "not submitted"


def render(
    study: Study, found: dict[str, list[JobStatus]], problem: str, width: int | None = None
) -> str:
    """The table as plain text, folded to `width` if one is given."""
    from rich.table import Table

    table = Table("run", "state", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    states = []
    for run in study.runs:
        state, detail = state_of(found[run.name])
        states.append(state)
        values = ", ".join(f"{key}={value}" for key, value in run.values.items())
        about = "; ".join(filter(None, (detail, values)))
        table.add_row(run.name, state, plain(" ".join(about.split())))
    counts = ", ".join(f"{states.count(word)} {word}" for word in dict.fromkeys(states))
    hours = attempts.gpu_hours(a for run in study.runs for a in attempts.of_run(study.run(run)))
    notes = [f"{len(states)} runs: {counts}"] + ([str(hours)] if hours.used else [])
    if study.leaderboard.is_file():
        chosen = [t for t in read_object(study.leaderboard)["trials"] if t["chosen"]]
        where = f"chosen: trial {chosen[0]['trial']}; " if chosen else ""
        notes.append(f"leaderboard: {where}{study.paths.report}")
    if problem:
        notes.append(f"from the run directories alone, Slurm did not answer: {plain(problem)}")
    return "\n".join([plain_text(table, width or UNFOLDED), *notes])


def show_study(study: Study, as_json: bool = False, watch: bool = False) -> None:
    """Print the state; with `watch` until nothing runs or waits, in place on a terminal."""
    with screen(watch and not as_json) as show:
        while True:
            found, problem = collect_study(study)
            if as_json:
                runs = {
                    name: {"state": state_of(lines)[0], "stages": [asdict(line) for line in lines]}
                    for name, lines in found.items()
                }
                value = {"study": str(study.root), "runs": runs, "slurm": problem or None}
                print(json.dumps(value), flush=True)
            else:
                show(partial(render, study, found, problem))
            if not watch or not any(state_of(lines)[0] in _GOES_ON for lines in found.values()):
                return
            time.sleep(WATCH_SECONDS)
