"""A sample of benchmarks/faults.py: operations that fail, take half or are the last one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "faults.py"
SMALL = "append_jsonl,append_torn,write_json,marker,update_run,collected_anew"


def injected(*arguments: str) -> int:
    """Run it; returns how many injections there were. A lost record or the like fails the test."""
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("faults are injected by a C library, and there is no compiler")
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"^all +(\d+) +0 +0 +0 +0$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return int(found[1])


def test_small_units_struck_at_every_operation_in_every_way() -> None:
    assert injected("--only", SMALL) > 200


def test_a_submission_struck_anywhere_loses_no_job() -> None:
    assert injected("--only", "submit,cancel", "--injections", "16", "--seed", "3") == 16


@pytest.mark.slow
def test_stages_struck_at_places_drawn_by_a_seed() -> None:
    assert injected("--only", "freeze,record_run,settings,attempt") > 200
    stages = "prepare,train,infer,collect,publish,supervise"
    assert injected("--only", stages, "--injections", "60", "--seed", "7") == 60
