"""What a stage's process is told before torch is loaded, seen in what the kernel then gives it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yelp_hpc.config import load_config
from yelp_hpc.rundir.manifest import record_run
from yelp_hpc.runtime import DEFAULTS

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# `run` itself, of a stage that finds nothing to do and needs no torch; then torch
CODE = """
import os
from yelp_hpc.cli.main import main
try:
    main()
except SystemExit:
    pass
import torch
assert torch.get_float32_matmul_precision() == "highest"
kept = torch.ones(2**25)
print(os.environ["GOMP_SPINCOUNT"], open("/proc/self/smaps_rollup").read())
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record_run(tmp_path / "run", load_config(DEMO), str(DEMO), [])
    return tmp_path / "run"


def child(run: Path, **given: str) -> tuple[str, int]:
    """The spin count and the kB in huge pages, of a process with so much more environment."""
    env = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), **given}
    command = [sys.executable, "-c", CODE, "run", "collect", "--run", str(run)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = re.search(r"AnonHugePages:\s+(\d+) kB", done.stdout)
    assert found
    return done.stdout.split()[0], int(found[1])


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel has no transparent huge pages")
def test_large_tensors_lie_in_huge_pages_where_the_kernel_gives_them_on_request(run: Any) -> None:
    mode = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    assert mode
    spins, huge = child(run)
    assert spins == "10000"
    assert (huge >= 2**16) == (mode[1] != "never")  # half of the tensor's 128 MiB
    if mode[1] == "madvise":
        assert child(run, THP_MEM_ALLOC_ENABLE="0")[1] == 0


def test_what_the_user_set_stays_but_what_makes_fp32_another_format(run: Any) -> None:
    child(run, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
    assert child(run, GOMP_SPINCOUNT="7")[0] == "7"
