"""Build the Apptainer image from Apptainer.def and a lock file.

Wheels are fetched on the host by pip's own configuration, each checked against the lock's hashes,
and handed to the build in a folder: the build itself asks no network. Reads Apptainer.def,
containers/ and the two packages of a checkout; writes the .sif, beside it what it holds
(IMAGE.cdx.json) and, in the cache, wheels and base.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from yelp_hpc.errors import RequestError, StageError, all_problems
from yelp_hpc.image.file import (
    EPOCH,
    image_sha256,
    no_apptainer,
    normalise,
    variables,
    why_no_image,
)
from yelp_hpc.image.sbom import write_sbom
from yelp_hpc.image.steps import call, folder_of, replaced, scratch, sole_builder
from yelp_hpc.own_files import IMPORT_ROOT, SHARE, package_files, version
from yelp_hpc.progress import say
from yelp_hpc.rundir.files import atomic_folder, sha256_file
from yelp_hpc.rundir.manifest import code_state
from yelp_hpc.rundir.modes import refuse_foreign
from yelp_hpc.runtime import program

# all files are root's: equal whoever builds, and a user without subordinate ids can unpack a base
SQUASHFS = f"-comp zstd -Xcompression-level 3 -all-root -mkfs-time {EPOCH} -all-time {EPOCH}"
# glibc of Debian 12 is 2.36: wheels for it and any older one run in the image. pip compares these
# tags as text, so each is named (pypa/pip#9127); PEP 600's begin with 2.5.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def build(
    image: Path,
    lock: Path = SHARE / "containers" / "cpu.lock",
    *,
    base: str = "docker",
    extras: Sequence[str] = ("job", "demo"),
    python: str = "3.11",
) -> str:
    """Build `image` and return its SHA-256, which is equal for builds from equal inputs.

    Args:
        lock: pip requirements with hashes.
        base: `docker` (the digest in Apptainer.def), `debootstrap` (this machine's Debian
            mirror) or the path of a local .sif with Python and its venv module.
        python: version of the base's Python, for the choice of wheels.

    Raises:
        RequestError: something that a build needs is missing; all problems at once.
        StageError: a step failed; an image that was there before is kept.
    """
    _check_request(image, lock, base)
    with sole_builder(image), scratch() as stage:
        wheels = fetch_wheels(lock, python)
        base_args = [] if base == "docker" else _local(base, stage)
        (stage / "wheels").mkdir()
        for wheel in wheels.glob("*.whl"):
            os.link(wheel, stage / "wheels" / wheel.name)
        _project_wheel(stage, lock)
        shutil.copy(SHARE / "containers" / "compile.py", stage)
        (stage / "locks").mkdir()
        shutil.copy(lock, stage / "locks" / lock.name)  # under its own name
        # a file, because a --build-arg cannot hold a comma
        (stage / "requirements.txt").write_text(f"yelp-hpc[{','.join(extras)}]\n")
        code = code_state()
        sha = (code["git_sha"] or "unknown") + ("-dirty" if code["dirty"] else "")
        arguments = {
            "VERSION": version(),
            "GIT_SHA": sha,
            "LOCK": lock.name,
            "LOCK_SHA256": sha256_file(lock),
        }
        for name, value in arguments.items():
            base_args += ["--build-arg", f"{name}={value}"]
        say(f"building {image} (base {base}, {lock.name})")
        with replaced(image) as temporary:
            _apptainer_build(temporary, SHARE / "Apptainer.def", base_args, stage)
            normalise(temporary)
        say(f"wrote {write_sbom(image, stage / 'wheels')}")
    return image_sha256(image)


def build_argv(
    target: Path, definition: Path, arguments: Sequence[str], binds: Sequence[tuple[Path, str]]
) -> list[str]:
    """The argv of `apptainer build`; flags stand before positionals, as it insists."""
    argv = [program("apptainer"), "build", "--force", "--fakeroot", f"--mksquashfs-args={SQUASHFS}"]
    for source, at in binds:
        argv += ["--bind", f"{source}:{at}"]
    return [*argv, *arguments, str(target), str(definition)]


def fetch_wheels(lock: Path, python: str) -> Path:
    """The folder with every wheel of `lock`, downloaded once and checked against its hashes.

    Raises:
        StageError: a package cannot be had, or is not what the lock names.
    """
    key = hashlib.sha256(f"{python}\n".encode() + lock.read_bytes()).hexdigest()[:16]
    folder = folder_of("wheels") / key
    known = set(re.findall(r"sha256:([0-9a-f]{64})", lock.read_text()))

    def as_named(wheels: Path) -> bool:
        return all(sha256_file(wheel) in known for wheel in wheels.glob("*.whl"))

    if folder.is_dir():
        if as_named(folder):
            return folder
        say(f"{folder} holds a wheel that the lock does not name: fetching all of them again")
    say(f"fetching the wheels of {lock.name}")
    argv = [*_PIP, "download", "--no-deps", "--require-hashes", *wheel_choice(python)]
    with atomic_folder(folder, as_named) as made:
        call([*argv, "--requirement", str(lock), "--dest", str(made)], f"the wheels of {lock}")
    return folder


def wheel_choice(python: str) -> list[str]:
    """pip's flags for wheels that run in the image, whatever machine fetches them."""
    # 3.11 counts as 3.11.0 here; the build's own pip checks what it installs
    argv = ["--only-binary=:all:", "--ignore-requires-python"]
    argv += ["--python-version", python, "--implementation", "cp"]
    for platform in _PLATFORMS:
        argv += ["--platform", platform]
    return argv


def _check_request(image: Path, lock: Path, base: str) -> None:
    problems = []
    if shutil.which(program("apptainer")) is None:
        problems.append(no_apptainer())
    if not (SHARE / "Apptainer.def").is_file():
        problems.append(f"{SHARE} holds no Apptainer.def: build from a checkout of the project")
    if not lock.is_file():
        problems.append(f"the lock file {lock} does not exist")
    if image.suffix != ".sif":
        problems.append(f"{image}: the name of an image ends in .sif")
    if not image.absolute().parent.is_dir():
        problems.append(f"the folder {image.absolute().parent} does not exist")
    if base not in ("docker", "debootstrap") and not Path(base).is_file():
        problems.append(f"base {base!r} is neither docker, debootstrap nor an image file")
    if base == "debootstrap" and shutil.which("debootstrap") is None:
        problems.append("debootstrap is not on PATH")
    try:
        refuse_foreign(image, lambda there: why_no_image(there) is None)
    except RequestError as error:
        problems.append(str(error))
    if problems:
        raise RequestError(all_problems("the image cannot be built:", problems))


def _local(base: str, stage: Path) -> list[str]:
    path = _debian_base(stage) if base == "debootstrap" else Path(base).absolute()
    # the image records this name: it must not say where a cache happens to be
    (stage / "base.sif").symlink_to(path)
    return ["--build-arg", "BOOTSTRAP=localimage", "--build-arg", "FROM=base.sif"]


def _debian_base(stage: Path) -> Path:
    """The Debian base, made once for each content of containers/base.def."""
    recipe = SHARE / "containers" / "base.def"
    base = folder_of("bases") / f"{sha256_file(recipe)[:16]}.sif"
    with sole_builder(base):
        if not base.is_file():
            say(f"making the base image {base} (once, a minute or two)")
            with replaced(base) as temporary:
                mirror = ["--build-arg", f"MIRROR={_debian_mirror()}"]
                _apptainer_build(temporary, recipe, mirror, stage)
                normalise(temporary)
    return base


def _debian_mirror() -> str:
    """The Debian mirror in this machine's own apt sources."""
    for path in [*Path("/etc/apt").glob("sources.list.d/*"), Path("/etc/apt/sources.list")]:
        with suppress(OSError):
            for word in path.read_text().split():
                if re.fullmatch(r"https?://\S+/debian/?", word):
                    return word
    raise RequestError("no Debian mirror in this machine's apt sources: use --base docker or FILE")


_OF_WHEEL = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")


def _project_wheel(stage: Path, lock: Path) -> None:
    """This project's wheel, built from a copy so that the checkout stays clean.

    With the lock's setuptools: a wheel says what it was made by.
    """
    copy = stage / "tree"
    for name in package_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMPORT_ROOT / name, copy / name)
    for own in _OF_WHEEL:  # an installed wheel brings them along, too
        shutil.copy(SHARE / own, copy / own)
    backend = stage / "backend"
    wheel = next((stage / "wheels").glob("setuptools-*.whl"), None)
    if wheel is None:
        raise StageError(f"{lock} names no setuptools, which builds this project")
    with zipfile.ZipFile(wheel) as archive:  # its hash was compared with the lock's
        archive.extractall(backend)
    argv = [*_PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    argv += ["--wheel-dir", str(stage / "wheels"), str(copy)]
    env = {"PYTHONPATH": str(backend), "SOURCE_DATE_EPOCH": str(EPOCH)}
    call(argv, "the wheel of this project", env)
    shutil.rmtree(backend)
    shutil.rmtree(copy)


def _apptainer_build(target: Path, definition: Path, arguments: list[str], stage: Path) -> None:
    empty = stage / "empty"
    scratch = stage / "apptainer"
    for folder in (empty, scratch):
        folder.mkdir(exist_ok=True)
    # the host's /tmp would be bound into %post otherwise, and be read and written there
    binds = [(stage, "/mnt"), (empty, "/tmp"), (empty, "/var/tmp")]
    argv = build_argv(target.absolute(), definition, arguments, binds)
    cache = f"{variables()}_CACHEDIR"
    env = {
        f"{variables()}_TMPDIR": str(scratch),
        cache: os.environ.get(cache) or str(folder_of("apptainer")),
        f"{variables()}_NO_MOUNT": "tmp",
    }
    call(argv, f"{argv[0]} build", env, stage)


_PIP = [sys.executable, "-P", "-m", "pip", "--quiet", "--disable-pip-version-check"]
