"""What every step of an image build goes through: run whole, ended whole, nothing left behind.

Writes below `CACHE/image`: `tmp` (one folder a build, removed after it) and `locks`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from yelp_hpc.cache import cache_folder, made
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.ranks.child import die_with_parent
from yelp_hpc.rundir.files import sync_directory, write_failure
from yelp_hpc.runtime import without_tokens


def call(
    argv: list[str], what: str, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> None:
    """Run a step to its end; its last lines become the error's message.

    The step runs in its own session, so that whatever it started can be ended with it.
    """
    with tempfile.TemporaryFile() as output:
        try:
            child = subprocess.Popen(
                argv,
                cwd=folder,
                env={**without_tokens(os.environ), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # ended when the builder is killed, so that nothing goes on alone
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            )
        except OSError as error:
            raise StageError(f"{what}: {argv[0]} cannot be started: {error.strerror}") from None
        try:
            code = child.wait()
        except BaseException:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(20)
            raise
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code != 0:
        raise StageError(f"{what}: {argv[0]} ended with {code}:\n{_cause(text)}")


def _cause(text: str) -> str:
    """The lines that say why: from apptainer's FATAL on, or the last; no bars or warnings."""
    lines = [line for line in text.splitlines() if line.strip() and "[==" not in line]
    lines = [line for line in lines if not line.startswith("WARNING")] or lines
    fatal = next((i for i, line in enumerate(lines) if line.startswith("FATAL")), None)
    chosen = lines[-12:] if fatal is None else lines[fatal : fatal + 12]
    return "\n".join(f"  {line}" for line in chosen)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one build; those of builds that were killed outright are removed first."""
    parent = folder_of("tmp")
    for old in parent.iterdir():
        with suppress(OSError), old.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.with_suffix(""), ignore_errors=True)
            old.unlink()
    with tempfile.NamedTemporaryFile(dir=parent, suffix=".lock", delete=False) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stage = Path(lock.name).with_suffix("")
        try:
            stage.mkdir()
            yield stage
        except OSError as error:
            raise StageError(write_failure(stage, error)) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.stem}.partial.sif")  # one builder at a time: one name
    temporary.unlink(missing_ok=True)  # of a build that was killed outright
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.absolute().parent)
    except OSError as error:
        raise StageError(write_failure(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def sole_builder(path: Path) -> Iterator[None]:
    """One build of a file at a time; SIGTERM ends it as Ctrl-C does, with everything tidied."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    with (folder_of("locks") / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{path} is being built by another process") from None
        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def folder_of(name: str) -> Path:
    """A folder of the image build's own in the cache, made if need be."""
    return made(cache_folder() / "image" / name)
