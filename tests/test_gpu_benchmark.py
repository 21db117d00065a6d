"""The benchmark of a GPU runs on a CPU too, in small: what it asserts holds there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yelp_hpc.rundir.files import read_json

ROOT = Path(__file__).parents[1]


def test_every_part_of_the_gpu_benchmark_holds_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--small", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "every part holds" in done.stdout
    found = read_json(out)
    assert found["determinism"]["found"]["strict"]["different of 6"] == 1
    assert {name.partition(",")[0] for name in found["whole_model"]["found"]} == {
        "bf16 kept", "bf16 computed twice",
    }  # fmt: skip
    assert found["scoring_and_generation"]["found"]["tokens_s"] > 0


@pytest.mark.slow
def test_the_commands_on_a_cpu_end_with_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    argv = ["benchmarks/gpu_commands.py", "--small", "--work", str(tmp_path / "work")]
    subprocess.run([sys.executable, *argv, "--out", str(out)], check=True, cwd=ROOT)
    assert read_json(out)["same bytes"] is True


def test_twins_are_asked_on_another_device_in_two_number_formats(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    argv = ["benchmarks/gpu_architectures.py", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *argv, "llama", "mamba", "bert"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 asked, 2 computed, 0 do not hold" in done.stdout
    found = {answer["kind"]: answer for answer in read_json(out)}
    assert found["llama"]["way"] == "packed" and found["llama"]["float32"]["packed"] < 1e-5
    assert 1e-4 < found["mamba"]["bfloat16"]["plain"] < 0.1


def test_a_part_that_fails_hides_no_other(tmp_path: Path) -> None:
    """Its error is in the file, the next part runs, the command ends with 1."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); sys.argv[1:] = ['--small', '--parts', "
        "'masks', 'no_silent_cpu', '--out', sys.argv[1]]; import gpu; "
        "gpu.keep_mask = lambda *_: 1 / 0; sys.exit(gpu.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "gpu.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    found = read_json(tmp_path / "gpu.json")
    assert "ZeroDivisionError" in found["masks"]["found"]["failed"]
    assert "refused" in found["no_silent_cpu"]["found"]
