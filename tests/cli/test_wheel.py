"""From a wheel, in an empty folder: the demo reaches its table, and its run can be verified."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from yelp_hpc.own_files import IMPORT_ROOT, package_files


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`yelp-hpc`, installed from a wheel beside the packages that these tests run with."""
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
    return folder / "venv" / "bin" / "yelp-hpc"


def test_the_demo_reaches_its_table(program: Path, tmp_path: Path) -> None:
    env = {**os.environ, "COLUMNS": "100"}
    env.pop("PYTHONPATH", None)
    told = subprocess.run([program, "--help"], env=env, capture_output=True, text=True)
    assert f"{program} demo" in told.stdout  # its name alone would not be found
    env["PATH"] = f"{program.parent}:{env['PATH']}"

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )

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
