"""What a rank runs in: asked to save by signals and deadlines, its errors left for the launcher.

`launch.launch` starts the ranks; each calls `run_rank`. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from yelp_hpc.errors import RequestError, SavedForRequeue, YelpHpcError
from yelp_hpc.ranks.child import die_with_parent
from yelp_hpc.runtime import open_log

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
SAVED = SavedForRequeue.exit_code
# What the hardware or the network of a node did, in the words of the driver, CUDA and NCCL.
_NODE_FAULT = re.compile(
    r"uncorrectable ECC|\bXid\b|GPU is lost|fallen off the bus|ncclSystemError|ncclRemoteError|"
    r"ncclUnhandledCudaError|CUDA error: (unknown error|unspecified launch|hardware stack)",
    re.IGNORECASE,
)


def is_node_fault(text: str) -> bool:
    """Whether a library's message tells of a fault of this node's hardware or network."""
    return bool(_NODE_FAULT.search(text))


class Flag:
    """What a signal's handler may set: it has no lock that a second handler would wait for.

    threading.Event has one: Slurm's signal to every process and the supervisor's come together, and
    a handler that interrupts another inside `Event.set` never returns.
    """

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Set it."""
        self._set = True

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._set


@dataclass
class StopRequest:
    """Whether this rank was asked to save and stop: by a signal, or because the time is up.

    Until `ready` there is nothing to save, and a signal ends the process at once (code 75).
    """

    deadline: float | None = None
    """Unix time at which the process must be gone."""
    margin: float = 10.0
    """Seconds that stopping takes; the training loop keeps it up to date."""
    ready: bool = False
    signalled: bool = field(default=False, init=False)

    @property
    def pending(self) -> bool:
        """Whether to save and stop: a signal came, or the deadline is near."""
        late = self.deadline is not None and time.time() > self.deadline - self.margin
        return self.signalled or late

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the signal; before there is anything to save, leave at once."""
        self.signalled = True
        if not self.ready:
            os._exit(SAVED)


def deadline(environ: Mapping[str, str], now: float) -> float | None:
    """Unix time by which the job must have saved: YELP_HPC_DEADLINE, else Slurm's end of the job.

    One that has passed already is nobody's deadline any more.

    Raises:
        RequestError: it is no number.
    """
    value = environ.get("YELP_HPC_DEADLINE") or environ.get("SLURM_JOB_END_TIME")
    try:
        time_limit = float(value) if value else None
    except ValueError:
        raise RequestError(f"the deadline {value!r} is not in seconds since 1970") from None
    return time_limit if time_limit is not None and time_limit > now else None


def run_rank(work: Callable[[StopRequest], None]) -> int:
    """Run `work` as a rank under `launch` and return the exit code.

    The rank dies with its launcher. An error is left for the launcher to show.
    """
    _die_with_launcher()
    stop = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, stop.handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        stop.deadline = deadline(os.environ, time.time())
        work(stop)
        return 0
    except SavedForRequeue as error:
        print(error, flush=True)
        return error.exit_code
    except BaseException as error:
        code = _leave_report(error)
        if code != RequestError.exit_code:
            _log_traceback()
        return code


def _log_traceback() -> None:
    """Into the rank's log alone: the launcher says what was wrong, and whose fault it was."""
    log = os.environ.get("YELP_HPC_RANK_LOG")
    if log is None:
        traceback.print_exc()
        return
    with suppress(OSError), open_log(Path(log), "ab") as file:
        file.write(traceback.format_exc().encode(errors="replace"))


def _leave_report(error: BaseException) -> int:
    """Leave the error for the launcher; returns the exit code.

    What a library has not implemented is a request that cannot be met here.
    """
    path = os.environ.get("YELP_HPC_RANK_ERROR")
    known = isinstance(error, YelpHpcError | NotImplementedError)
    code = error.exit_code if isinstance(error, YelpHpcError) else 1
    code = RequestError.exit_code if isinstance(error, NotImplementedError) else code
    said = known and bool(str(error).strip())
    text = str(error) if said else f"{type(error).__name__}: {error}".rstrip(": ")
    peer_lost = not known and bool(
        re.search(r"gloo|nccl|connection (closed|reset)|process ?group|broken pipe", text, re.I)
    )
    report = {
        "node_fault": not known and is_node_fault(text),
        "message": text if known else text.strip()[:2000],
        "exit_code": code,
        "peer_lost": peer_lost,
        "time": time.time(),
    }
    if path:
        with suppress(OSError):
            Path(path).write_text(json.dumps(report))
    return code


def _die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher is gone, however it went."""
    launcher = os.environ.get("YELP_HPC_LAUNCHER")
    if launcher is None:
        return
    with suppress(OSError, AttributeError):
        die_with_parent()
    if os.getppid() != int(launcher):  # it died before the call
        os._exit(1)
