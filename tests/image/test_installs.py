"""Installs are checked to the end: which lock, the build backend, and what an image holds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yelp_hpc.image.sbom import sbom

ROOT = Path(__file__).resolve().parents[2]
CUDA_LOCK = (ROOT / "containers" / "cuda.lock").read_text()
TORCH = re.findall(r"sha256:(\w+)", CUDA_LOCK.partition("\ntorch==")[2].partition("\n\n")[0])[0]
MISMATCH = """\
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the
 package versions, please update the hashes. Otherwise, examine the package contents carefully;
 someone may have tampered with them.
    {name} from https://files.example.org/a.whl (from -r containers/cpu.lock (line 9)):
        Expected sha256 {expected}
             Got        {got}
"""


def install_module() -> Any:
    spec = importlib.util.spec_from_file_location("install", ROOT / "containers" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("said", "falls_back"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0", True),
        (MISMATCH.format(name="torch==2.13.0", expected="0" * 64, got=TORCH), True),
        (MISMATCH.format(name="torch==2.13.0", expected=TORCH, got="0" * 64), False),
        (MISMATCH.format(name="numpy==2.1.0", expected="0" * 64, got=TORCH), False),
        ("ERROR: No matching distribution found for numpy==2.1.0", False),
        ("ERROR: Could not install packages due to an OSError: No space left on device", False),
        ("", False),
    ],
)
def test_the_gpu_set_is_taken_only_where_there_is_no_cpu_build(said: str, falls_back: bool) -> None:
    assert install_module().no_cpu_build(said, CUDA_LOCK) is falls_back


@pytest.mark.slow
def test_a_hash_mismatch_ends_with_pips_own_words(tmp_path: Path) -> None:
    """A lock of one small package whose hash is wrong; the GPU set is not tried."""
    containers = tmp_path / "containers"
    containers.mkdir()
    (containers / "install.py").write_bytes((ROOT / "containers" / "install.py").read_bytes())
    (containers / "cpu.lock").write_text(f"tqdm==4.70.1 --hash=sha256:{'0' * 64}\n")
    (containers / "cuda.lock").write_text("no lock at all, so that trying it would be seen\n")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run(
        [str(python), str(containers / "install.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr and "Got" in done.stderr
    assert "GPU set" not in done.stderr


def test_both_locks_hold_the_build_backend_with_its_hashes() -> None:
    for name in ("cpu.lock", "cuda.lock"):
        text = (ROOT / "containers" / name).read_text()
        assert re.search(r"^setuptools==[\w.]+ \\\n +--hash=sha256:", text, re.MULTILINE)


def test_the_document_names_every_package_with_the_hash_that_it_was_installed_by() -> None:
    content = sbom(
        "a.sif",
        "f" * 64,
        [("torch", "2.13.0+cpu"), ("scikit_learn", "1.5.0"), ("yelp-hpc", "0.1.0")],
        [("libc6", "2.36-9+deb12u9", "amd64")],
        {("torch", "2.13.0+cpu"): "a" * 64, ("scikit-learn", "1.5.0"): "b" * 64},
    )
    assert content["bomFormat"] == "CycloneDX" and content["specVersion"] == "1.6"
    assert content["metadata"]["component"]["hashes"][0]["content"] == "f" * 64
    found = {c["purl"]: c.get("hashes", [{}])[0].get("content") for c in content["components"]}
    assert found == {
        "pkg:pypi/scikit-learn@1.5.0": "b" * 64,
        "pkg:pypi/torch@2.13.0%2Bcpu": "a" * 64,
        "pkg:pypi/yelp-hpc@0.1.0": None,
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u9?arch=amd64": None,
    }
    references = [c["bom-ref"] for c in content["components"]]
    assert len(set(references)) == len(references)
