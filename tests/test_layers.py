"""The layers: what the login node imports is light, what the image runs knows no scheduler."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import yelp_hpc.jobs
import yelp_hpc.stages

HEAVY = ("torch", "transformers", "datasets", "pandas", "pyarrow", "sklearn", "peft")
JOBS = [module.name for module in pkgutil.walk_packages(yelp_hpc.jobs.__path__, "yelp_hpc.jobs.")]
STAGES = [f"yelp_hpc.stages.{m.name}" for m in pkgutil.iter_modules(yelp_hpc.stages.__path__)]


def imported_by(modules: list[str]) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("modules", [["yelp_hpc.cli.main"], JOBS], ids=["cli", "jobs"])
def test_the_host_side_imports_nothing_heavy(modules: list[str]) -> None:
    assert not imported_by(modules) & set(HEAVY)


def test_the_stages_know_no_submitit() -> None:
    assert not imported_by(STAGES) & {"submitit", "yelp_hpc.jobs"}
