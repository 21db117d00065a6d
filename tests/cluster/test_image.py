"""A real image: two builds are equal, nothing of the host leaks in, errors leave nothing behind.

What needs builds of its own takes a light set (the host's packages of cpu.lock, no torch): the
recipe is the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster.conftest import wait_for, yelp_hpc
from yelp_hpc.cache import cache_folder
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.image.build import build
from yelp_hpc.image.check import check, info
from yelp_hpc.jobs.cluster import ClusterConfig, Container
from yelp_hpc.jobs.container import command, inside, stage_environment
from yelp_hpc.jobs.image import check_image, ready_image
from yelp_hpc.own_files import IMPORT_ROOT, SHARE
from yelp_hpc.rundir.paths import STAGES

AS_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def needed_by(name: str) -> set[str]:
    """The packages that a package needs without its extras, and what those need."""
    found: set[str] = set()
    todo = [name]
    while todo:
        for text in importlib.metadata.requires(todo.pop()) or ():
            need = Requirement(text)
            one = canonicalize_name(need.name)
            if one not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
                found.add(one)
                todo.append(one)
    return found


def light_lock(path: Path, more: str = "") -> Path:
    """What cpu.lock names of the host's packages and the build backend, and `more` at the end."""
    blocks = re.split(r"(?m)^(?=\S)", (SHARE / "containers" / "cpu.lock").read_text())
    light = needed_by("yelp-hpc") | {"setuptools"}
    chosen = [block for block in blocks if block.split("==")[0] in light]
    assert len(chosen) == len(light)
    path.write_text("".join(chosen) + more)
    return path


def light_build(image: Path, lock: Path) -> str:
    return build(image, lock, base="debootstrap", extras=())


@pytest.fixture
def container(image_sif: Path, tmp_path: Path) -> Container:
    (tmp_path / "cache").mkdir()
    return Container(image=str(image_sif), cache=str(tmp_path / "cache"))


def sh(argv: list[str], **env: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk that is soon full."""
    folder.mkdir()
    sh(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)])
    try:
        yield folder
    finally:
        sh(["umount", "-l", str(folder)])


def test_the_same_locks_give_the_same_image_and_another_line_another(
    apptainer: None, tmp_path: Path
) -> None:
    lock = light_lock(tmp_path / "light.lock")
    (tmp_path / "elsewhere").mkdir()
    first = light_build(tmp_path / "a.sif", lock)
    assert light_build(tmp_path / "elsewhere" / "b.sif", lock) == first
    light_lock(lock, "# one line more\n")
    assert light_build(tmp_path / "a.sif", lock) != first
    assert sorted(p.name for p in tmp_path.glob("*.sif")) == ["a.sif"]


def test_it_is_sound_says_what_it_is_and_holds_no_slurm(image_sif: Path) -> None:
    assert check(image_sif) == []
    found = json.loads(yelp_hpc("image", "info", "--json", str(image_sif)).stdout)
    assert found["sha256"] == info(image_sif)["sha256"]
    assert found["lock"] in ("cpu.lock", "cuda.lock")
    clients = "command -v sbatch srun scontrol squeue sacct || true"
    assert sh(["apptainer", "-s", "exec", str(image_sif), "sh", "-c", clients]) == ""
    assert "yelp_hpc" in sh(["apptainer", "-s", "run-help", str(image_sif)])
    assert "submit" in sh(["apptainer", "-s", "run", str(image_sif), "--help"])


@pytest.mark.parametrize("how", ["as a job", "by hand"])
def test_nothing_of_the_host_leaks_in(
    container: Container, image_sif: Path, tmp_path: Path, how: str
) -> None:
    home = tmp_path / "home"
    packages = home / ".local" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "click.py").write_text("raise SystemExit('leaked')")
    code = "import click, os, json, sys; print(json.dumps([dict(os.environ), sys.path]))"
    leaks = {
        "PYTHONPATH": str(packages),
        "LD_LIBRARY_PATH": "/leaked",
        "HOME": str(home),
    }
    argv = ["apptainer", "--silent", "exec", str(image_sif), "python", "-c", code]
    if how == "as a job":
        leaks["HF_TOKEN"] = leaks["APPTAINERENV_HF_TOKEN"] = "hf_leaked"
        leaks |= {"APPTAINER_BIND": "/leaked", "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1"}
        argv = inside(container, tmp_path, ["python", "-c", code], {**os.environ, **leaks})
        leaks = stage_environment(ClusterConfig(container=container), "train", leaks, None)
    variables, path = json.loads(sh(argv, **leaks))
    assert variables.get("NCCL_IB_HCA") == leaks.get("NCCL_IB_HCA")
    assert "leaked" not in str(variables)
    assert str(packages) not in path
    assert not variables.get("PYTHONPATH")


def test_by_hand_in_a_checkout_it_runs_its_own_code(image_sif: Path, tmp_path: Path) -> None:
    (tmp_path / "yelp_hpc").mkdir()
    (tmp_path / "yelp_hpc" / "__init__.py").write_text("raise SystemExit('the checkout')")
    argv = ["apptainer", "-s", "exec", "--pwd", str(tmp_path), "--bind", str(tmp_path)]
    said = sh([*argv, str(image_sif), "python", "-m", "yelp_hpc", "--version"])
    assert said.startswith("yelp_hpc, version")


def test_the_token_reaches_publish_alone_and_no_process_list(
    container: Container, tmp_path: Path
) -> None:
    cluster = ClusterConfig(container=container)
    for stage in STAGES:
        argv = inside(container, tmp_path, ["env"], {})
        env = stage_environment(cluster, stage, dict(os.environ), "hf_secret")
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=env)
        assert ("HF_TOKEN=hf_secret" in done.stdout.splitlines()) is (stage == "publish")
        assert "hf_secret" not in " ".join(argv)


def test_a_user_without_privileges_runs_it(image_sif: Path) -> None:
    argv = ["apptainer", "--silent", "exec", str(image_sif), "python", "-m", "yelp_hpc"]
    done = subprocess.run(
        [*AS_USER, *argv, "--version"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": os.environ["PATH"], "HOME": "/"},
    )
    assert done.returncode == 0, done.stderr


def test_jobs_refuse_an_image_that_is_missing_or_another(
    container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = info(Path(container.image))["sha256"]
    check_image(container, digest)
    with pytest.raises(StageError) as error:
        check_image(container, "0" * 64)
    assert digest in str(error.value)
    assert "0" * 64 in str(error.value)
    (tmp_path / "file").touch()
    wrong = Container(
        image=str(tmp_path / "no.sif"),
        binds=("/no/such:/data",),
        cache=str(tmp_path / "file" / "cache"),
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError) as error:
        check_image(wrong, None)
    for part in (
        "apptainer is not on",
        "no.sif does not exist",
        "/no/such:/data",
        "container.cache",
    ):
        assert part in str(error.value)


def test_a_node_keeps_one_verified_copy(
    container: Container, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    digest = info(Path(container.image))["sha256"]
    wanted = container.model_copy(update={"node_disk": "$NODE_DISK"})
    with ThreadPoolExecutor(3) as pool:  # three jobs that start on the node at once
        ready = list(pool.map(lambda _: ready_image(wanted, digest), range(3)))
    (copy,) = (tmp_path / "disk").rglob("*.sif")
    assert {Path(each.image) for each in ready} == {copy}
    before = copy.stat()
    assert ready_image(wanted, digest).image == str(copy)
    assert copy.stat().st_ino == before.st_ino
    copy.write_bytes(b"torn")
    copy.with_name(f".{copy.name}.1.tmp").write_bytes(b"of a killed job")
    assert ready_image(wanted, digest).image == str(copy)
    assert copy.stat().st_size == before.st_size
    assert not list(copy.parent.glob("*.tmp"))
    assert "yelp_hpc" in sh(command_version(ready_image(wanted, digest), tmp_path))


def command_version(container: Container, run: Path) -> list[str]:
    return command(ClusterConfig(container=container), run, ["--help"], {})


def test_a_full_node_disk_is_said_and_the_shared_image_used(
    container: Container, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = info(Path(container.image))["sha256"]
    with small_disk(tmp_path / "disk", "10m") as disk:
        wanted = container.model_copy(update={"node_disk": str(disk)})
        assert ready_image(wanted, digest).image == container.image
        assert not [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size]
    assert "No space left" in capsys.readouterr().out


def test_a_failed_build_keeps_the_old_image_and_leaves_nothing(
    apptainer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "bad.lock"
    lock.write_text(f"click==8.1.8 --hash=sha256:{'0' * 64}\n")
    image = tmp_path / "old.sif"
    image.write_bytes(b"the old one")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StageError, match=r"the wheels of .*bad\.lock"):
        build(image, lock, base=str(image), extras=())
    with pytest.raises(RequestError, match="does not exist"):
        build(image, tmp_path / "none.lock", base="docker")
    assert sorted(tmp_path.iterdir()) == before
    with small_disk(tmp_path / "cache", "1m") as cache:
        monkeypatch.setenv("YELP_HPC_CACHE", str(cache))
        with pytest.raises(StageError, match="No space left"):
            build(image, light_lock(lock), base=str(image), extras=())
        assert not [p for p in cache.rglob("*") if p.is_file() and p.parent.name != "locks"]
    assert image.read_bytes() == b"the old one"


BUILD = """
import sys
from pathlib import Path
from tests.cluster.test_image import light_build
light_build(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_keeps_the_old_image_and_ends_what_it_started(
    apptainer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    known, cache = cache_folder() / "image", tmp_path / "cache" / "image"
    cache.mkdir(parents=True)
    for name in ("bases", "wheels"):
        (known / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(known / name)
    monkeypatch.setenv("YELP_HPC_CACHE", str(cache.parent))
    (tmp_path / "out").mkdir()
    lock, image = light_lock(tmp_path / "light.lock"), tmp_path / "out" / "old.sif"
    image.write_bytes(b"the old one")
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(image), str(lock)], cwd=IMPORT_ROOT
    )

    def pids(*how: str) -> list[str]:
        return subprocess.run(["pgrep", *how], capture_output=True, text=True).stdout.split()

    # it leads a session of its own
    pid, *_ = wait_for(lambda: pids("-f", f"apptainer build.*{image.parent}"), 600, "a build")
    session = str(os.getsid(int(pid)))
    wait_for(lambda: len(pids("-s", session)) > 2, 60, "the build's own processes")
    builder.send_signal(number)
    assert builder.wait(60) != 0
    wait_for(lambda: not pids("-s", session), 60, "all of them to end")
    assert image.read_bytes() == b"the old one"
    if number == signal.SIGKILL:  # what nobody could remove, the next build does
        light_build(image, lock)
    assert [path.name for path in image.parent.glob("*.sif")] == ["old.sif"]
    assert not [path for path in image.parent.iterdir() if "partial" in path.name]
    assert not list((cache / "tmp").iterdir())
