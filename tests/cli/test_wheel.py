"""From a wheel, in an empty folder: the demo reaches its table, and its run can be verified."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from yelp_hpc.rundir.files import read_json

Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(installed: Path, tmp_path: Path) -> Typed:
    """Types `yelp-hpc WORDS` in an empty folder, with what is installed on PATH."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "COLUMNS": "100", "PATH": f"{installed}:{os.environ['PATH']}"}
        env.pop("PYTHONPATH", None)
        return subprocess.run(
            ["yelp-hpc", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    return run


def test_off_the_path_the_program_names_itself_in_full(installed: Path, tmp_path: Path) -> None:
    program = installed / "yelp-hpc"
    told = subprocess.run([program, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert f"{program} demo" in told.stdout  # its name alone would not be found


def test_the_demo_reaches_its_table(typed: Typed, tmp_path: Path) -> None:
    small = ("train.max_steps=2", "data.train_rows=60", "data.test_rows=40", "infer.shards=1")
    sets = [word for change in small for word in ("--set", change)]
    done = typed("demo", *sets)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Outcome on the test set" in said and "F1 macro" in said
    assert "next: yelp-hpc verify --run runs/demo" in said
    assert (tmp_path / "runs/demo/report.html").is_file()
    assert typed("verify", "--run", "runs/demo").returncode == 0
    again = typed("demo", *sets)
    assert again.returncode == 0 and "nothing to do" in again.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_demo_learns(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the README says it, nothing made smaller: five minutes and more."""
    monkeypatch.delenv("OMP_NUM_THREADS")  # the tests', no user's
    done = typed("demo")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Outcome on the test set" in said
    models = read_json(tmp_path / "runs/demo/metrics.json")["models"]
    assert models["base"]["rows"] == models["tuned"]["answered"] == 500
    assert models["tuned"]["accuracy"] > 0.45 > 0.25 > models["base"]["accuracy"]
    assert typed("verify", "--run", "runs/demo").returncode == 0
