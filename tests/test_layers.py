"""The layers: what the login node imports is light, what the image runs knows no scheduler."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

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


ROOT = Path(__file__).parents[1]


def tree_of_the_readme() -> dict[Path, str]:
    """Folder → what the README says of it."""
    tree = re.search(r"## The house\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree
    said: dict[Path, str] = {}
    above: list[str] = []
    for indent, name, text in re.findall(r"^( *)([\w-]+)/ +(.*)$", tree[1], re.M):
        above = [*above[: len(indent) // 4], name]
        said[Path(*above)] = text
    return said


def test_the_tree_of_the_readme_names_every_folder_and_what_may_not_enter_it() -> None:
    said = tree_of_the_readme()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout: there is no list of the files that belong to it")
    folders = {Path(name).parent for name in listed.stdout.splitlines() if name[0] != "."}
    tests = {folder for folder in folders if folder.parts[:1] == ("tests",)}
    for folder in sorted(folders - tests - {Path()}):
        assert folder in said, folder
    for folder in tests - {Path("tests")}:  # they mirror the rooms, and what does not is named
        room = folder.parts[1]
        assert (ROOT / "yelp_hpc" / room).is_dir() or f"{room}/" in said[Path("tests")], folder
    for folder in said:
        assert (ROOT / folder).is_dir(), folder
        if folder.parts[0] in ("yelp_hpc", "jobs"):
            forbids = r"\. (No|Never|Nothing|Changes nothing|Knows no|Writes nothing)\b"
            assert re.search(forbids, said[folder]), folder


def test_no_folder_is_a_corridor() -> None:
    for folder in (ROOT / "yelp_hpc").rglob("*/"):
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        most = 22 if folder == ROOT / "yelp_hpc" / "jobs" else 14
        assert len(modules) <= most, f"{folder}: {sorted(modules)}"
