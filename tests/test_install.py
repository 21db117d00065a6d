"""What is installed: one name, whole, and nothing of the user's folder in its way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from yelp_hpc.jobs.snapshot import freeze
from yelp_hpc.own_files import package_files, version
from yelp_hpc.rundir.paths import RunPaths

ROOT = Path(__file__).parent.parent
SHADOWS = ("jobs", "random", "config", "yaml", "click", "token", "torch", "numpy", "fnmatch")
"""Names that a user's folder may hold: a folder of ours, modules of Python and of libraries."""
BUILD = "import sys; from setuptools import build_meta as b; b.build_{0}(sys.argv[1])"


def tracked(folder: Path) -> Path:
    """The files that belong to the repository, links as links, without what was built here."""
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=skipped)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tracked(tmp_path_factory.mktemp("checkout") / "yelp_hpc")


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the source archive, by kind."""
    folder = tmp_path_factory.mktemp("dist")
    for kind in ("wheel", "sdist"):
        argv = [sys.executable, "-c", BUILD.format(kind), str(folder)]
        done = subprocess.run(argv, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what pip unpacks."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built["wheel"]) as wheel:
        wheel.extractall(folder)
    return folder


def test_the_wheel_holds_one_name_and_all_of_it(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir()}
    assert tops == {"yelp_hpc", f"yelp_hpc-{version()}.dist-info"}
    names = {f"{path.relative_to(installed)}" for path in installed.rglob("*") if path.is_file()}
    wanted = {str(path) for path in package_files()}  # through the links of the checkout
    assert {"yelp_hpc/jobs/status.py", "yelp_hpc/share/containers/cpu.lock"} <= wanted
    assert {"yelp_hpc/share/configs/demo.yaml", "yelp_hpc/share/Apptainer.def"} <= wanted
    assert wanted <= names
    assert not [path for path in installed.rglob("*") if path.is_symlink()]


def test_the_source_archive_builds_the_same_wheel(
    built: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    argv = [sys.executable, "-c", BUILD.format("wheel"), str(tmp_path)]
    subprocess.run(argv, cwd=source, capture_output=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("RECORD")}
        for name in names:
            assert wheel.read(name) == (installed / name).read_bytes(), name
    assert names >= {"yelp_hpc/jobs/status.py", "yelp_hpc/share/configs/demo.yaml"}


@pytest.mark.parametrize("place", ["checkout", "wheel"])
def test_no_file_of_the_users_folder_stands_in_our_way(
    place: str, checkout: Path, installed: Path, tmp_path: Path
) -> None:
    here = checkout if place == "checkout" else tmp_path
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if place == "wheel":
        env["PYTHONPATH"] = str(installed)

    def ask(*argv: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, *argv], cwd=here, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    reduce = "from yelp_hpc.ranks.allreduce import all_reduce; print(all_reduce(2)['correct'])"
    commands = [
        ["-m", "yelp_hpc", "--version"],
        ["-m", "yelp_hpc", "config", "show", "--config", str(ROOT / "configs" / "demo.yaml")],
        ["-m", "yelp_hpc", "status", "--run", str(tmp_path / "none")],
        ["-m", "yelp_hpc", "image", "info", str(tmp_path / "none.sif")],
        ["-m", "yelp_hpc", "plan", "--config", str(ROOT / "configs" / "yelp_chatglm3.yaml")],
    ]
    before = [ask(*argv) for argv in commands]
    for name in SHADOWS:
        (here / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')\n")
    try:
        assert [ask(*argv) for argv in commands] == before
        code = f"import sys; sys.path.remove(''); sys.path.append({str(here)!r}); {reduce}"
        if place == "wheel":
            code = f"import sys; sys.path.remove(''); {reduce}"
        assert ask("-c", code)[1] == "True\n"
        doctor = ask("-m", "yelp_hpc", "doctor", "--json")
        assert doctor[1].startswith("{"), doctor
    finally:
        for name in SHADOWS:
            (here / f"{name}.py").unlink()
    assert before[0][1] == f"yelp_hpc, version {version()}\n"
    assert before[1][0] == before[4][0] == 0


def test_frozen_code_says_the_version_that_it_is(tmp_path: Path) -> None:
    frozen = freeze(RunPaths(tmp_path))
    metadata = next(frozen.glob("*.dist-info")) / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"Version: {version()}", "Version: 9.8.7"))
    code = "import yelp_hpc; print(yelp_hpc.__version__)"
    env = {**os.environ, "PYTHONPATH": str(frozen)}
    argv = [sys.executable, "-P", "-c", code]
    assert subprocess.check_output(argv, env=env, text=True, cwd=tmp_path) == "9.8.7\n"


def test_a_release_is_made_of_what_is_committed(tmp_path: Path) -> None:
    def sh(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)

    shutil.copy(ROOT / "Makefile", tmp_path)
    assert sh("git", "init", "-q").returncode == 0
    done = sh("make", "release", f"VENV={tmp_path / 'none'}")
    assert done.returncode == 2
    assert "commit or remove these first:\n?? Makefile" in done.stdout
    assert not (tmp_path / "none").exists()


def test_every_page_that_names_the_version_names_this_one() -> None:
    assert f"\nversion: {version()}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version()}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_in_ci_a_skip_is_a_failure(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test(): pytest.skip('no such thing')\n"
    )
    for ci, code in (("true", 1), ("", 0)):
        env = {**os.environ, "CI": ci}
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, "no such thing" in done.stdout) == (code, bool(ci)), done.stdout
