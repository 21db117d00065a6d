"""Thin probes of one place: folders, Python, Apptainer, the driver, the Hub.

`python -m yelp_hpc.jobs.doctor.probes LOOK` prints a machine as JSON; so it is run inside an
image. Writes a few small files into each folder that it is told to look at, and removes them.
"""

from __future__ import annotations

import fcntl
import glob
import importlib.metadata
import os
import platform
import re
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from yelp_hpc.cache import cached_folders
from yelp_hpc.data.formats.csv_rows import DELIMITERS, csv_rows
from yelp_hpc.data.formats.first_bytes import disguise
from yelp_hpc.data.formats.json_rows import json_lines
from yelp_hpc.errors import RequestError, YelpHpcError
from yelp_hpc.image.check import info
from yelp_hpc.image.file import image_sha256, why_no_image
from yelp_hpc.jobs.doctor.facts import AllReduce, Driver, Folder, Image, Look, Machine, Quota
from yelp_hpc.jobs.doctor.hub import hub
from yelp_hpc.own_files import SHARE
from yelp_hpc.rundir.files import MARKER, parse_json
from yelp_hpc.rundir.manifest import package_versions
from yelp_hpc.runtime import program

WRITES, RACE_SECONDS = 9, 0.1
_LOOKED_AT = 20  # rows of a data file
HOST_PACKAGES = ("click", "pydantic", "pyyaml", "rich", "submitit", "yelp-hpc")
_IMPORTS = (
    "import sys, click, pydantic, submitit, yaml\n"
    "if sys.version_info < (3, 11): sys.exit(sys.version)"  # no assert, which -O leaves out
)


def look(what: Look) -> Machine:
    """Everything that `what` asks for, as this process sees it."""
    namespaces = answer(["unshare", "--user", "true"]) is not None
    return Machine(
        place=what.place,
        name=socket.gethostname(),
        python=platform.python_version(),
        python_problem=python_problem(what.python),
        packages=packages(everything=what.place == "image"),
        lock=_lock(),
        apptainer=apptainer_version(),
        root=os.geteuid() == 0,
        user_namespaces=namespaces,
        starter_suid=_starter_suid(),
        driver=driver(),
        folders={role: folder(Path(path), role == "run") for role, path in what.folders.items()},
        seen={path: seen(Path(path)) for path in what.paths},
        quotas=quotas(answer(["quota", "-wp"], any_exit=True) or ""),
        hub=hub(what.token_file) if what.hub else None,
        home_packages=tuple(
            entry
            for entry in sys.path
            if entry.startswith(os.path.expanduser("~/.local"))  # noqa: PTH111 - never raises
        ),
    )


def packages(everything: bool) -> dict[str, str]:
    """Versions of everything installed, or of what the host's side and a result depend on."""
    if everything:
        named = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
        return {name.lower(): version for name, version in named if name}
    versions = package_versions()
    for name in HOST_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def answer(argv: Sequence[str], timeout: float = 30, any_exit: bool = False) -> str | None:
    """What a command prints; None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            list(argv), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if any_exit or done.returncode == 0 else None


def last_line(argv: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[str, str]:
    """What a process printed last, and why it failed."""
    try:
        done = subprocess.run(
            list(argv),
            env=dict(env),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{argv[0]}: {getattr(error, 'strerror', None) or 'no answer'}"
    if done.returncode != 0:
        errors = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return "", errors[-1][:400]
    return done.stdout.strip().rpartition("\n")[2], ""


def all_reduce_argv(ranks: int) -> list[str]:
    """The module that sums over ranks, and its arguments; it imports torch, nothing here does."""
    return ["yelp_hpc.ranks.allreduce", "--ranks", str(ranks)]


def all_reduced(text: str, problem: str) -> AllReduce:
    """What `all_reduce_argv` found; an image may hold another version, which says more."""
    if problem:
        return AllReduce(problem=problem)
    known = {k: v for k, v in parse_json(text).items() if k in AllReduce.model_fields}
    return AllReduce.model_validate(known)


def folder(
    path: Path, manners: bool = True, replace: Callable[[Path, Path], None] = os.replace
) -> Folder:
    """Write, flush and rename small files in `path`, and read one while it is replaced.

    Args:
        manners: also whether renames are atomic and locks hold.
        replace: what renames.
    """
    if not is_folder(path):
        there = seen(path) == "file"
        return Folder(path=str(path), problem="it is no folder" if there else "it does not exist")
    kind, source = mount(path)
    try:
        space = os.statvfs(path)
    except OSError as error:  # a server that is gone
        return Folder(path=str(path), kind=kind, problem=error.strerror or str(error))
    facts = {
        "path": str(path),
        "kind": kind,
        "source": source,
        "free": space.f_bavail * space.f_frsize,
        "inodes": space.f_favail if space.f_files else None,
    }
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as scratch:
            times = []
            for _ in range(WRITES):
                start = time.perf_counter()
                _write(Path(scratch) / "new", b"x" * 4096)
                replace(Path(scratch) / "new", Path(scratch) / "old")
                times.append((time.perf_counter() - start) * 1000)
                if sum(times) > 2000:
                    break
            torn = _race(Path(scratch), replace) if manners else 0
            locks = _locks(Path(scratch) / "lock") if manners else True
    except OSError as error:
        return Folder.model_validate({**facts, "problem": error.strerror or str(error)})
    median = statistics.median(times)
    return Folder.model_validate({**facts, "milliseconds": median, "torn": torn, "locks": locks})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def whole(path: Path) -> bool:
    """Whether a file holds one letter, as often as `_race` and the node write it."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) == 65_536 and content.count(content[:1]) == len(content)


def turn(path: Path, count: int, replace: Callable[[Path, Path], None] = os.replace) -> None:
    """Replace `path` by a file of another letter."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(bytes([65 + count % 26]) * 65_536)
    replace(new, path)


def _race(scratch: Path, replace: Callable[[Path, Path], None]) -> int:
    path, torn, stop = scratch / "turning", 0, threading.Event()
    turn(path, 0)

    def writer() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            with suppress(OSError):
                turn(path, count, replace)

    thread = threading.Thread(target=writer)
    thread.start()
    end = time.monotonic() + RACE_SECONDS
    while time.monotonic() < end:
        torn += not whole(path)
    stop.set()
    thread.join()
    return torn


def _locks(path: Path) -> bool:
    try:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def mount(path: Path) -> tuple[str, str]:
    """File system type and source of the mount that `path` lies on."""
    found, longest = ("", ""), -1
    target = str(path.resolve())
    with suppress(OSError):
        for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
            before, _, after = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
            inside = target == point or target.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= longest:
                found, longest = (after.split()[0], after.split()[1]), len(point)
    return found


def seen(path: Path) -> str:
    """`folder`, `file`, `missing` or `unreadable`."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError:
        return "unreadable"
    inside = stat.S_ISDIR(mode)
    good = os.access(path, os.R_OK | os.X_OK if inside else os.R_OK)
    return ("folder" if inside else "file") if good else "unreadable"


def is_folder(path: Path) -> bool:
    """Like Path.is_dir, which raises where a folder above may not be entered."""
    try:
        return path.is_dir()
    except OSError:
        return False


def python_problem(python: str) -> str:
    """Why `python` cannot run the jobs, "" when it can."""
    if not python or python == sys.executable:
        return "" if sys.version_info >= (3, 11) else f"Python {platform.python_version()}"
    try:
        done = subprocess.run(
            [python, "-c", _IMPORTS],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return getattr(error, "strerror", None) or "it does not answer"
    return "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


def _lock() -> str:
    """The lock that this place was installed from: the image's own, else the source tree's.

    Both torch builds are pinned to the same versions of everything else.
    """
    top = SHARE / "containers"
    return "\n".join(path.read_text() for path in sorted(top.glob("c*.lock"))[:1])


def apptainer_version() -> str | None:
    """As `apptainer --version` says it; None where there is none."""
    match = re.search(r"\d+(\.\d+)+", answer([program("apptainer"), "--version"]) or "")
    return match[0] if match else None


def _starter_suid() -> bool:
    built = answer([program("apptainer"), "buildcfg"]) or ""
    match = re.search(r"^LIBEXECDIR=(.+)$", built, re.MULTILINE)
    return bool(match) and Path(match[1] if match else "", "apptainer/bin/starter-suid").is_file()


def driver() -> Driver | None:
    """The NVIDIA driver, None where there is none."""
    text = answer(["nvidia-smi"])
    if text is None:
        return None
    version = re.search(r"Driver Version: *([0-9.]+)", text)
    cuda = re.search(r"CUDA Version: *([0-9.]+)", text)
    names = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", answer(["nvidia-smi", "-L"]) or "", re.M)
    return Driver(
        version=version[1] if version else "", cuda=cuda[1] if cuda else "", gpus=tuple(names)
    )


def quotas(text: str) -> tuple[Quota, ...]:
    """Lines of `quota -wp` that have a limit: source, used*, quota, limit in kB."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*(\S+)\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", line + " ")
        if match:
            soft, hard = int(match[3]), int(match[4])
            if limit := soft or hard:
                found.append(Quota(source=match[1], used=int(match[2]), limit=limit))
    return tuple(found)


def image(path: Path) -> Image:
    """The image file, its SHA-256 and, where there is an apptainer, its labels."""
    if problem := why_no_image(path):
        return Image(path=str(path), problem=problem)
    try:
        labels = {k: str(v) for k, v in info(path).items() if k not in ("path", "bytes", "sha256")}
    except RequestError:
        labels = {}  # no apptainer here
    except (YelpHpcError, ValueError, KeyError) as error:
        text = str(error).strip().rpartition("\n")[2].strip()
        return Image(path=str(path), problem=f"{path}: apptainer cannot read it: {text}")
    return Image(path=str(path), sha256=image_sha256(path), labels=labels)


def data_columns(path: Path, header: bool) -> list[str] | None:
    """Columns of a csv, tsv or jsonl file by its first rows, None for another kind.

    Raises:
        RequestError: it cannot be read, or has no rows.
    """
    kind = path.suffix.lower()
    if kind not in (*DELIMITERS, ".jsonl", ".ndjson"):
        return None
    if what := disguise(path, (kind, "")):
        raise RequestError(f"it is {what}")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as text:
        csv = kind in DELIMITERS
        rows = csv_rows(text, DELIMITERS[kind], header) if csv else json_lines(text)
        try:
            first = [record for _, record in islice(rows, _LOOKED_AT)]
            if csv and not first:  # a header alone
                text.seek(0)
                lines = csv_rows(text, DELIMITERS[kind], header=False)
                first = [dict.fromkeys(names.values()) for _, names in lines]
        except ValueError as error:
            raise RequestError(f"it cannot be read: {error}") from None
    if not first:
        raise RequestError("it has no rows")
    return list(dict.fromkeys(str(key) for record in first for key in record if key is not None))


def first_file(place: Path) -> Path | None:
    """The first file of a folder or a glob, None where there is none; prepare reads all of them."""
    pattern = place / "*" if is_folder(place) else place
    names = (Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)))  # noqa: PTH207
    return next((path for path in names if seen(path) == "file" and path.suffix), None)


def cached_model(path: str) -> Path | None:
    """The folder of a Hub model, or of the demo's, in the cache; the newest that is complete."""
    sign = MARKER if path.startswith("demo:") else "config.json"
    return next((folder for folder in cached_folders(path) if (folder / sign).is_file()), None)


def disk(path: Path) -> Path:
    """The nearest folder above `path` that exists, or the file in its place."""
    path = path.expanduser().absolute()
    while not is_folder(path) and seen(path) != "file" and path != path.parent:
        path = path.parent
    return path


if __name__ == "__main__":
    print(look(Look.model_validate_json(sys.argv[1])).model_dump_json())
