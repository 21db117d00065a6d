"""What the end of a stage means."""

from __future__ import annotations

import signal

import pytest

from yelp_hpc.jobs.verdict import judge

USR2, TERM, INT = signal.SIGUSR2, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("code", "received", "state", "action", "ask"),
    [
        (75, USR2, "RUNNING", "requeued", True),
        (75, TERM, "RUNNING", "requeued", True),  # a site that sends SIGTERM only
        (75, None, "RUNNING", "requeued", True),  # the stage saw its deadline coming
        (75, TERM, "COMPLETING", "stopped", False),  # scancel, or Slurm requeues it itself
        (75, TERM, "PENDING", "stopped", False),
        (-USR2, USR2, "RUNNING", "requeued", True),  # died of it before its handlers stood
        (128 + USR2, USR2, "RUNNING", "requeued", True),  # the same through apptainer
        (75, USR2, "LOCAL", "again", False),
        (75, INT, "LOCAL", "stopped", False),
        (1, None, "RUNNING", "failed", False),
        (1, USR2, "RUNNING", "failed", False),
        (-9, None, "RUNNING", "failed", False),
        (-USR2, None, "RUNNING", "failed", False),  # nobody told it to stop
    ],
)
def test_judge(code: int, received: int | None, state: str, action: str, ask: bool) -> None:
    verdict = judge(code, received, state, 1, True, 5, "log")
    assert (verdict.action, verdict.ask) == (action, ask)


def test_the_cap_counts_starts_without_progress_only() -> None:
    assert judge(75, USR2, "RUNNING", 99, True, 5, "log").action == "requeued"
    assert judge(75, USR2, "RUNNING", 4, False, 5, "log").action == "requeued"
    stuck = judge(75, USR2, "RUNNING", 5, False, 5, "the log")
    assert stuck.action == "failed"
    assert "no progress" in stuck.reason
    assert "the log" in stuck.reason
