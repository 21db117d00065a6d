"""Look at an Apptainer image: what it is (`info`) and whether jobs can trust it (`check`).

Host side, no torch: what only the image knows is asked of the Python inside it.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from yelp_hpc.errors import RequestError, StageError, all_problems, in_shell
from yelp_hpc.image.file import image_sha256, no_apptainer, why_no_image
from yelp_hpc.rundir.manifest import lock_hashes
from yelp_hpc.runtime import program

ISOLATED = ("--cleanenv", "--no-mount", "home,cwd", "--env", "PYTHONNOUSERSITE=1")
LABEL = "yelp-hpc."

_ASK = """
import importlib.metadata as m, json, platform, sys, pathlib, importlib.util as u
cuda = None
if u.find_spec("torch"):
    import torch
    cuda = torch.version.cuda
print(json.dumps({
    "python": platform.python_version(), "cuda": cuda,
    "packages": {d.metadata["Name"]: d.version for d in m.distributions()},
    "locks": {p.name: p.read_text() for p in
        pathlib.Path(u.find_spec("yelp_hpc").origin).parent.glob("share/containers/*.lock")},
}))
"""


def info(image: Path) -> dict[str, Any]:
    """Path, size in bytes, SHA-256 and labels (version, git-sha, lock, lock-sha256) of an image.

    Raises:
        RequestError: there is no such image or no apptainer.
        StageError: apptainer cannot read it.
    """
    _require(image)
    inspected = json.loads(_apptainer("inspect", "--json", "--labels", str(image)))
    labels = inspected["data"]["attributes"]["labels"]
    return {
        "path": str(image.absolute()),
        "bytes": image.stat().st_size,
        "sha256": image_sha256(image),
        **{k.removeprefix(LABEL): v for k, v in sorted(labels.items()) if k.startswith(LABEL)},
    }


def check(image: Path) -> list[str]:
    """Every reason not to run jobs in `image` here; an empty list when there is none.

    Compares the image's packages with the lock that it was built from, that lock and the project's
    version with the host's, the GPU driver with the image's CUDA, and runs the image's own test.

    Raises:
        RequestError: there is no such image or no apptainer.
        StageError: the image's Python does not start.
    """
    labels = info(image)
    inside = json.loads(_apptainer("exec", *ISOLATED, str(image), "python", "-c", _ASK))
    lock = str(labels.get("lock", ""))
    problems = version_problems(inside["locks"].get(lock, ""), inside["packages"])
    here = lock_hashes().get(lock)
    if here and here != labels.get("lock-sha256"):
        problems.append(f"it was built from another {lock} than the one here: build it again")
    versions = {normal_name(name): version for name, version in inside["packages"].items()}
    for name in ("yelp-hpc", "submitit"):
        host = importlib.metadata.version(name)
        if versions.get(name) != host:
            problems.append(f"{name} is {versions.get(name)} in the image and {host} on this host")
    problems += driver_problems(inside["cuda"], _driver_cuda())
    try:
        _apptainer("test", *ISOLATED, str(image))
    except StageError as error:
        problems.append(str(error))
    return problems


def require_sound(image: Path) -> None:
    """Raise `StageError` with every problem that `check` finds."""
    problems = check(image)
    if problems:
        raise StageError(all_problems(f"{image} should not be used:", problems))


def version_problems(lock: str, packages: dict[str, str]) -> list[str]:
    """Installed packages that a lock's text names in another version, in words."""
    if not lock:
        return ["it does not hold the lock that its label names"]
    if not _pins(lock).keys() & {normal_name(name) for name in packages}:
        return ["none of its lock's packages is installed in it"]
    return [
        f"{name} is {found} in the image, the lock says {wanted}"
        for name, (found, wanted) in other_versions(lock, packages).items()
    ]


def other_versions(lock: str, packages: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Package → the installed version, and the one that the lock's text names, where they differ.

    A local version (`2.13.0+cpu`) is the version that it is a build of, as for pip.
    """
    wanted = _pins(lock)
    found = {normal_name(name): version for name, version in packages.items()}
    return {
        name: (found[name], wanted[name])
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] not in (found[name], found[name].partition("+")[0])
    }


def _pins(lock: str) -> dict[str, str]:
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock, re.MULTILINE))
    return {normal_name(name): version for name, version in pins.items()}


def driver_problems(image_cuda: str | None, driver_cuda: str | None) -> list[str]:
    """Whether a driver that supports up to `driver_cuda` runs code built with `image_cuda`.

    Within a major version an older driver does (NVIDIA's minor version compatibility). A host
    without a driver, such as a login node, is no problem; a GPU with a CPU image is one.
    """
    if driver_cuda is None:
        return []
    if image_cuda is None:
        return ["this host has a GPU, but the image's torch is built for the CPU: use cuda.lock"]
    if int(image_cuda.partition(".")[0]) > int(driver_cuda.partition(".")[0]):
        return [f"the image needs CUDA {image_cuda}; this host's driver supports {driver_cuda}"]
    return []


def _driver_cuda() -> str | None:
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"CUDA Version: *([0-9.]+)", done.stdout)
    return match[1] if match else None


def _require(image: Path) -> None:
    problems = []
    if shutil.which(program("apptainer")) is None:
        problems.append(no_apptainer())
    if problem := why_no_image(image):
        problems.append(f"{problem}: python -m yelp_hpc image build {in_shell(image)}")
    if problems:
        raise RequestError(all_problems("the image cannot be looked at:", problems))


def _apptainer(verb: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program("apptainer"), "--silent", verb, *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        raise StageError(f"{program('apptainer')} cannot be started: {error.strerror}") from None
    if done.returncode != 0:
        tail = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-8:])
        raise StageError(f"{program('apptainer')} {verb} ended with {done.returncode}:\n{tail}")
    return done.stdout


def normal_name(name: str) -> str:
    """The normalised name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
