"""One thread for every test, markers by place, and no test left out in CI.

Tiny models gain nothing from more threads, and sums taken in another order differ in the last bit,
which tests of exact resume would see; processes that tests start inherit the number.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Generator
from pathlib import Path

import pytest

from yelp_hpc.own_files import IMPORT_ROOT, package_files

os.environ.setdefault("OMP_NUM_THREADS", "1")
# As a user's shell: unbuffered output would hide what is lost when a process ends.
os.environ.pop("PYTHONUNBUFFERED", None)
CLUSTER = Path(__file__).parent / "cluster"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of tests/cluster is `cluster`; `root` is skipped for anybody else."""
    for item in items:
        if item.path.is_relative_to(CLUSTER):
            item.add_marker(pytest.mark.cluster)
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="only root may do what this test does"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skip is a failure: what is not tested there is tested nowhere."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, which CI does not allow: {reason}"
    return report


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh virtual environment: the wheel, beside the packages that tests run with."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in [*package_files(), *map(Path, ("pyproject.toml", "README.md", "LICENSE"))]:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMPORT_ROOT / name, folder / "tree" / name)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join({*here, sysconfig.get_paths()["purelib"]}))
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "tree")]
    subprocess.run(wheel, check=True)
    shutil.rmtree(folder / "tree")
    (made,) = folder.glob("*.whl")
    argv = [*pip, "install", "--no-deps", "--force-reinstall", str(made)]
    subprocess.run(argv, check=True)
    return folder / "venv" / "bin"
