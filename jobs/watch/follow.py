"""`--wait`: follows what was submitted until all of it has ended, and says how.

One absence from squeue is not the end: a client may answer from a cache, and what a job leaves in
the run directory may reach this machine late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from yelp_hpc.errors import RequestError, SavedForRequeue, StageError, YelpHpcError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.logs import last_output
from yelp_hpc.jobs.site.reasons import never_starts, reason_in_words
from yelp_hpc.jobs.slurm import Row
from yelp_hpc.jobs.submission import YOUNG_SECONDS, Submission
from yelp_hpc.jobs.verdict import AGAIN, REFUSED
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.paths import RunPaths

WAIT_SECONDS, ABSENT_SECONDS = 3.0, 9.0
LATE_SECONDS = 60.0
"""For so long NFS may keep an old listing of a folder."""


_BLIND = (
    "the jobs were submitted, but neither squeue nor scontrol can be asked here, so that nobody "
    "can follow them: see `python -m yelp_hpc status`"
)


def follow(paths: RunPaths, submissions: Sequence[Submission], say: Callable[[str], None]) -> None:
    """Wait until every job has ended, saying each change of state.

    Raises:
        RequestError: the first job that failed refused its input.
        SavedForRequeue: what did not end saved its state and was stopped; no job failed.
        StageError: a job failed, was lost, never started or never can.
    """
    shown: dict[str, str] = {}
    gone: dict[str, float] = {}
    final: dict[str, list[Row]] = {}
    stuck = ""
    down = False
    while True:
        try:
            rows, down = slurm.everything([item.job for item in submissions]), False
        except RequestError:  # no squeue here: scontrol tells
            if any(slurm.held(item.job) is None for item in submissions):
                raise StageError(_BLIND) from None
            rows = []
        except StageError as error:
            if not down:
                say(f"{str(error).splitlines()[0]}; still waiting")
            down = True
            time.sleep(WAIT_SECONDS)
            continue
        now = time.monotonic()
        waiting = False
        for item in submissions:
            mine = [row for row in rows if row.parent == item.job]
            final[item.job] = mine or final.get(item.job, [])
            live = [row for row in mine if row.live]
            absent = now - gone.setdefault(item.job, now) if not mine else 0.0
            held = slurm.held(item.job) if absent > ABSENT_SECONDS else None
            if mine or held:
                gone.pop(item.job, None)
                absent = 0.0
            over = attempts.over(paths, item.name, item.job, len(item.tasks), held is False)
            seen = item.job in shown and bool(final[item.job])
            limit = ABSENT_SECONDS if seen else YOUNG_SECONDS
            pending = bool(live) or not (mine or over or absent > limit)
            waiting |= pending
            text = _states(live) if live else "ended" if not pending else "not shown by squeue yet"
            if shown.get(item.job) != text and (live or not pending or item.job not in shown):
                shown[item.job] = text
                say(f"{item.name} (job {item.job}): {text}")
        if not waiting:
            break
        stuck = _stuck(submissions, rows, stuck)
        time.sleep(WAIT_SECONDS)
    _verdict(paths, submissions, final)


def _states(rows: Sequence[Row]) -> str:
    states = sorted(row.state.lower() for row in rows)
    text = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    reasons = {row.reason for row in rows if row.state == "PENDING" and never_starts(row.reason)}
    return text + "".join(f": {reason_in_words(reason)}" for reason in sorted(reasons))


def _stuck(submissions: Sequence[Submission], rows: Sequence[Row], before: str) -> str:
    """What can never start, when nothing else goes on; said twice in a row it ends the wait."""
    live = [row for row in rows if row.live]
    names = {item.job: item.name for item in submissions}
    blocked = [row for row in live if row.state == "PENDING" and never_starts(row.reason)]
    others = [row for row in live if row not in blocked and row.reason.strip("()") != "Dependency"]
    text = "; ".join(
        f"{names[row.parent]} (job {row.job}): {reason_in_words(row.reason)}" for row in blocked[:5]
    )
    if text and text == before and not others:
        raise StageError(
            f"this never starts by itself: {text}\nIt stays queued: mend it "
            "(scontrol release, scontrol update), or `python -m yelp_hpc cancel`."
        )
    return "" if others else text


def _verdict(
    paths: RunPaths, submissions: Sequence[Submission], final: dict[str, list[Row]]
) -> None:
    end = time.monotonic() + LATE_SECONDS
    while (found := _problems(paths, submissions))[0]:
        problems, verdicts = found
        # Slurm says that all went well: what tells so is on its way
        states = {row.state for rows in final.values() for row in rows}
        if states != {"COMPLETED"} or time.monotonic() > end:
            # as the local chain ends; what depends on a job that was stopped never starts
            kind: type[YelpHpcError] = StageError
            if verdicts[:1] == ["refused"]:
                kind = RequestError
            elif {*verdicts} == {"stopped"}:
                kind = SavedForRequeue
            raise kind("\n".join([*problems[:5], AGAIN]))
        time.sleep(WAIT_SECONDS)


def _problems(paths: RunPaths, submissions: Sequence[Submission]) -> tuple[list[str], list[str]]:
    """What is not done, and the verdicts of the attempts that say so; `refused`: its input."""
    problems: list[str] = []
    verdicts: list[str] = []
    for submission in submissions:
        last: dict[str, attempts.Attempt] = {}
        for attempt in attempts.read(paths, submission.name):
            if attempts.within(attempt.job, submission.job):
                last[attempt.job] = attempt
        bad = [a for a in last.values() if a.verdict != "done"]
        verdicts += ["refused" if a.reason.startswith(REFUSED) else a.verdict for a in bad]
        problems += [f"{submission.name} ({a.job}): {a.verdict or 'lost'}: {a.reason}" for a in bad]
        if len(last) < len(submission.tasks):
            missing = len(submission.tasks) - len(last)
            why = last_output(paths, submission.name, submission.job)
            text = f"{submission.name}: {missing} of its jobs never started"
            problems.append(f"{text}{f': {why}' if why else ''}")
    return problems, verdicts
