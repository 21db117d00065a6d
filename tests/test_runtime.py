"""What a stage's process is told before torch is loaded, seen in what the kernel then gives it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# the order of `run`: all that it imports before its stage, then the defaults, then torch
CODE = """
import os
import yelp_hpc.cli, yelp_hpc.manifest, yelp_hpc.probe
from yelp_hpc.runtime import set_runtime_defaults
set_runtime_defaults()
import torch
kept = torch.ones(2**25)
print(os.environ["GOMP_SPINCOUNT"], open("/proc/self/smaps_rollup").read())
"""


def child(**given: str) -> tuple[str, int]:
    """The spin count and the kB in huge pages, of a process with so much more environment."""
    names = ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), **given}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True
    )
    found = re.search(r"AnonHugePages:\s+(\d+) kB", done.stdout)
    assert found
    return done.stdout.split()[0], int(found[1])


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel has no transparent huge pages")
def test_large_tensors_lie_in_huge_pages_where_the_kernel_gives_them_on_request():
    mode = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    assert mode
    spins, huge = child()
    assert spins == "10000"
    assert (huge >= 2**16) == (mode[1] != "never")  # half of the tensor's 128 MiB
    if mode[1] == "madvise":
        assert child(THP_MEM_ALLOC_ENABLE="0")[1] == 0


def test_what_the_user_set_stays():
    assert child(GOMP_SPINCOUNT="7")[0] == "7"
