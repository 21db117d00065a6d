"""What an exit of a stage means. Pure: exit code, signal and Slurm's state in, a verdict out."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from yelp_hpc.errors import RequestError, SavedForRequeue
from yelp_hpc.runtime import likely_cause

AGAIN = "When the cause is gone, run the same command again: what is finished is kept."
_STOPS = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


REFUSED = f"exit code {RequestError.exit_code}\n"
"""How the reason begins of a stage that refused its input: data that are none, say."""


@dataclass(frozen=True)
class Verdict:
    """`done`, `requeued`, `again` (here, at once), `stopped` (saved, not run again) or `failed`.

    `ask`: the supervisor has to ask Slurm for the requeue.
    """

    action: str
    reason: str
    ask: bool = False


def judge(
    code: int, received: int | None, state: str, stalled: int, progressed: bool, cap: int, log: str
) -> Verdict:
    """Judge a stage's process that did not end with 0.

    Args:
        code: exit code, negative for a signal as subprocess reports it.
        received: the signal that the supervisor got, if any.
        state: Slurm's state of the job now, `LOCAL` without Slurm.
        stalled: attempts in a row that began without new progress, this one included.
        progressed: whether this attempt changed anything.
        log: the end of the log, for the reason of a failure.
    """
    # before the stage has its handlers the signal simply ends it: nothing was begun, nothing lost
    ended_by_it = received is not None and any(code in (-s, 128 + s) for s in _STOPS)
    if code != SavedForRequeue.exit_code and not ended_by_it:
        return Verdict(
            "failed", f"exit code {code}\n{log}" if code > 0 else f"{_named(code)}\n{log}"
        )
    why = f"saved after {signal.Signals(received).name}" if received else "saved, wants more time"
    if ended_by_it:
        why = f"interrupted by {signal.Signals(received or 0).name} before it could save"
    if not progressed and stalled >= cap:
        return no_progress(why, stalled, log)
    if state == "LOCAL":
        stop = received in (signal.SIGTERM, signal.SIGINT)
        return Verdict("stopped" if stop else "again", why)
    if state in ("RUNNING", "UNREACHABLE"):
        return Verdict("requeued", why, ask=True)
    # COMPLETING or PENDING: cancelled, or preempted and already requeued by Slurm itself
    return Verdict("stopped", f"{why}; Slurm is ending the job ({state.lower()})")


def no_progress(why: str, stalled: int, log: str) -> Verdict:
    """A job that would be run again, but has been for nothing so often that it is given up."""
    return Verdict("failed", f"{why}, but {stalled} starts in a row made no progress\n{log}")


def _named(code: int) -> str:
    try:
        name = signal.Signals(-code).name
    except ValueError:  # it ended by itself
        return f"exit code {code}"
    return f"killed by {name}{likely_cause(-code)}"
