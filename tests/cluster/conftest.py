"""Brings a real Slurm up for the tests of this folder and takes it down again; builds one image.

Needs root on Debian 12 or 13; the packages are installed when they are missing. A cluster that is
up already (`make cluster`) is used and left as it is. One test session at a time uses it.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fake_run import FakeRun
from yelp_hpc.image.build import build
from yelp_hpc.jobs import slurm as client
from yelp_hpc.jobs.status import collect_status
from yelp_hpc.jobs.submission import process_start
from yelp_hpc.own_files import SHARE

HERE = Path(__file__).parent
RUN = Path("/run/yelp-hpc-cluster")
GPU = {"gpus": 1, "gpu_type": "rtx3090"}


class Cluster:
    """The cluster, and what can happen to it."""

    nodes = ("c1", "c2", "g1", "g2")

    def script(self, name: str) -> None:
        done = subprocess.run(
            ["bash", str(HERE / name)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    def up(self) -> bool:
        ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
        return ping.returncode == 0

    def sh(self, *argv: str) -> str:
        return subprocess.run(list(argv), capture_output=True, text=True, check=True).stdout.strip()

    def resume(self) -> None:
        """Every node serves again, whatever a test before left of it."""
        names = "drained,draining,down,fail"
        left = self.sh("sinfo", "-hN", "-p", "low", "-t", names, "-o", "%N").split()
        for node in left:
            self.sh("scontrol", "update", f"nodename={node}", "state=resume")

    def stop_controller(self) -> None:
        pid = int((RUN / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not process_start(pid), 30, "slurmctld to end")

    def kill_node(self, node: str, job: str) -> None:
        """A node dies: slurmd, the job's slurmstepd and everything below it, all at once."""
        doomed = [int((RUN / f"slurmd.{node}.pid").read_text())]
        doomed += descendants([pid for pid, line in processes() if f"slurmstepd: [{job}." in line])
        # All halt before any dies, then children die first: a half of srun that outlives the other
        # by a millisecond asks the controller to cancel the step, which it does a minute later,
        # when the node is back and the step is the requeued job's.
        for number, pids in ((signal.SIGSTOP, doomed), (signal.SIGKILL, doomed[::-1])):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def preempt(self, partition_nodes: int = 2) -> None:
        """Submit jobs of the higher tier that need every GPU."""
        for _ in range(partition_nodes):
            argv = ["sbatch", "--partition=gpu", "--gres=gpu:rtx3090:4", "--mem=100M", "--time=1"]
            self.sh(*argv, "--output=/dev/null", "--wrap", "sleep 4")


def processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                yield int(folder.name), line


def descendants(roots: list[int]) -> list[int]:
    """`roots` and all processes below them."""
    children: dict[int, list[int]] = {}
    for pid, _ in processes():
        with suppress(OSError, IndexError, ValueError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
    found, todo = [], list(roots)
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until `condition` is true and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s for {what}\n{clients_say()}")
        time.sleep(0.2)
    return value


def clients_say() -> str:
    """What the queue and the nodes look like, for a message: a node that is drained is seen."""
    said = []
    for argv in (["squeue", "-o", "%i %j %T %N %r"], ["sinfo", "-N"], ["sinfo", "-R"]):
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=15)
            said.append(done.stdout + done.stderr)
    return "\n".join(said)


def wait_ended(jobs: list[str], seconds: float) -> None:
    """Until Slurm holds none of `jobs` any more."""

    def ended() -> bool:
        try:
            return not client.queue(jobs)
        except Exception:  # the controller may be down for the moment
            return False

    wait_for(ended, seconds, f"jobs {jobs} to end")


def install(what: str, script: str) -> None:
    """Run the script; where it fails, the tests that need `what` are skipped and say why."""
    argv = ["bash", str(HERE / script)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{what} cannot be installed: {done.stderr[-500:]}")


def states_of(run: FakeRun) -> dict[str, str]:
    """Job name → state, as `status` has it."""
    return {line.name: line.state for line in collect_status(run.root, run.config)[0]}


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running cluster."""
    if os.geteuid() != 0:
        pytest.skip("a real Slurm can only be brought up by root")
    if not Path("/etc/debian_version").exists():
        pytest.skip("a real Slurm is installed from Debian's packages only")
    cluster = Cluster()
    with open("/run/lock/yelp-hpc-cluster.lock", "w") as lock:  # noqa: PTH123
        fcntl.flock(lock, fcntl.LOCK_EX)
        install("Slurm", "slurm_install.sh")
        was_up = cluster.up()
        cluster.script("slurm_up.sh")
        try:
            yield cluster
        finally:
            if not was_up:
                cluster.script("slurm_down.sh")


@pytest.fixture(autouse=True)
def serving_nodes(request: pytest.FixtureRequest) -> None:
    """Each test on the cluster begins with all of its nodes."""
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").resume()


@pytest.fixture(scope="session")
def apptainer() -> None:
    """A real Apptainer."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("Apptainer is installed by root on Debian only")
    install("Apptainer", "apptainer_install.sh")


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter too, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="yelp-hpc-image-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def image_sif(apptainer: None, open_folder: Path) -> Path:
    """The image that jobs run in, built once a session from the set that is installed here."""
    lock = "cpu.lock" if importlib.metadata.version("torch").endswith("+cpu") else "cuda.lock"
    image = open_folder / "yelp_hpc.sif"
    build(image, SHARE / "containers" / lock, base="debootstrap")
    return image


@pytest.fixture
def slurm_run(slurm: Cluster, tmp_path: Path) -> Callable[..., FakeRun]:
    """A maker of runs with played stages on the cluster."""

    def make(name: str = "run", shards: int = 3, cluster: Any = None, **plan: Any) -> FakeRun:
        defaults = {"partition": "cpu", "memory": "100M", "time": "10", "save_seconds": 30}
        settings = {"defaults": defaults, "train": {"partition": "gpu", **GPU}, **(cluster or {})}
        return FakeRun(tmp_path / name, shards, settings, **{"steps": 3, **plan})

    return make


def yelp_hpc(*argv: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "yelp_hpc", *argv],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done


def copy_run(source: Path, target: Path) -> Path:
    """A run directory with the same prepared data and nothing else done."""
    target.mkdir(parents=True)
    shutil.copy(source / "run.json", target / "run.json")
    shutil.copytree(source / "prepare", target / "prepare")
    return target


def read(path: Path) -> Any:
    return json.loads(path.read_text())
