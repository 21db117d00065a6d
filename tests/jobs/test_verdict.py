"""What the end of a stage means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from yelp_hpc.jobs.verdict import judge
from yelp_hpc.own_files import IMPORT_ROOT

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


@pytest.mark.parametrize(
    ("code", "received", "state", "reason"),
    [
        (75, None, "RUNNING", "saved, wants more time"),
        (75, USR2, "RUNNING", "saved after SIGUSR2"),
        (-USR2, USR2, "RUNNING", "interrupted by SIGUSR2 before it could save"),
        (75, TERM, "PENDING", "saved after SIGTERM; Slurm is ending the job (pending)"),
        (75, USR2, "UNREACHABLE", "saved after SIGUSR2"),
        (1, None, "RUNNING", "exit code 1\nlog"),
        (0, None, "RUNNING", "exit code 0\nlog"),
        (-9, None, "RUNNING",
         "killed by SIGKILL (out of memory? see `memory:` of the cluster config)\nlog"),
        (-TERM, None, "RUNNING", "killed by SIGTERM\nlog"),
        (-200, None, "RUNNING", "exit code -200\nlog"),
    ],
)  # fmt: skip
def test_what_is_said(code: int, received: int | None, state: str, reason: str) -> None:
    assert judge(code, received, state, 1, True, 5, "log").reason == reason


def test_what_is_said_of_a_stage_that_gets_nowhere() -> None:
    stuck = judge(75, TERM, "PENDING", 5, False, 5, "log")
    said = "saved after SIGTERM, but 5 starts in a row made no progress\nlog"
    assert (stuck.action, stuck.reason, stuck.ask) == ("failed", said, False)
    assert judge(75, TERM, "LOCAL", 1, True, 5, "").action == "stopped"
    assert judge(75, USR2, "UNREACHABLE", 1, True, 5, "").ask


def test_the_limit_of_cpu_time_of_a_login_node_is_named() -> None:
    code = (
        "import resource; from yelp_hpc.jobs.verdict import judge; "
        "resource.setrlimit(resource.RLIMIT_CPU, (900, 900)); "
        "print(judge(-9, None, 'LOCAL', 1, False, 5, 'log').reason)"
    )
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    argv = [sys.executable, "-c", code]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, env=env).stdout
    cause = "all 900 s of CPU time used that a process has here? see `ulimit -t`"
    assert said == f"killed by SIGKILL ({cause})\nlog\n"
