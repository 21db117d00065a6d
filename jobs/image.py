"""The image on a compute node: refuse a wrong one, and keep a verified copy on the node's own disk.

Reads the image that was submitted; writes NODE_DISK/yelp_hpc-UID/SHA256.sif, once a node.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from yelp_hpc.errors import StageError, all_problems, in_shell
from yelp_hpc.image.file import image_sha256, no_apptainer, why_no_image
from yelp_hpc.jobs.cluster import Container
from yelp_hpc.rundir.files import atomic_path, sha256_file
from yelp_hpc.runtime import program


def ready_image(container: Container, expected: str | None) -> Container:
    """The container as it is started on this node: checked, its image copied if that was asked for.

    Raises:
        StageError: see `check_image`.
    """
    check_image(container, expected)
    if container.node_disk is None or not expected:
        return container
    disk = Path(os.path.expandvars(container.node_disk)).expanduser()  # as this node knows them
    try:
        copy = _copy(Path(container.image), disk, expected)
    except (OSError, StageError) as error:  # a full disk must not cost the job
        print(f"no copy of the image on {disk}, {container.image} is used: {error}", flush=True)
        return container.model_copy(update={"node_disk": None})
    return container.model_copy(update={"image": str(copy), "node_disk": str(disk)})


def check_image(container: Container, expected: str | None) -> None:
    """Refuse to start in an image that is missing or not the one that was submitted.

    Also makes `container.cache`, if it is not there.

    Raises:
        StageError: apptainer or the image is missing, a bind's source is, the cache cannot be made,
            or the hash differs. All but the last are said at once.
    """
    problems = []
    if shutil.which(program("apptainer")) is None:
        problems.append(no_apptainer())
    image = Path(container.image)
    if problem := why_no_image(image):
        problems.append(f"{problem}: python -m yelp_hpc image build {in_shell(image)}")
    for bind in container.binds:
        if not os.path.exists(bind.split(":")[0]):  # noqa: PTH110 - never raises
            problems.append(f"container.binds: {bind} does not exist on this node")
    try:
        Path(container.cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problems.append(f"container.cache: {container.cache} cannot be made: {error.strerror}")
    if problems:
        raise StageError(all_problems("the stage cannot start in the image:", problems))
    if expected:
        found = image_sha256(image)
        if found != expected:
            raise StageError(
                f"{image} is not the image that this run was submitted with: its SHA-256 is "
                f"{found}, submitted was {expected}. Submit again to use the new one."
            )


def _copy(image: Path, disk: Path, expected: str) -> Path:
    """The copy on this node; one process copies, the others wait for it."""
    if not disk.is_absolute() or "$" in str(disk):  # a variable that is not set on this node
        raise StageError("container.node_disk is no absolute path here")
    folder = disk / f"yelp_hpc-{os.getuid()}"  # a node's disk is often everybody's
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
        raise StageError(f"{folder} belongs to another user")
    copy = folder / f"{expected}.sif"
    with (folder / f"{expected}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.is_file() and image_sha256(copy) == expected:
            return copy
        for torn in folder.glob(f".{copy.name}.*.tmp"):  # of a job that was killed
            torn.unlink()
        with atomic_path(copy) as temporary:
            shutil.copyfile(image, temporary)
            if (found := sha256_file(temporary)) != expected:
                raise StageError(f"the copy has SHA-256 {found}, not {expected}")
    return copy
