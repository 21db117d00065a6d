"""Ranks on this node: started together, stopped together, the guilty one's error shown first.

`launch` starts one process per rank and waits; rank.py is what each of them runs in. Signals are
handed on as a request to save that the ranks agree on (`training/gradients.py`). Several nodes
each run one launcher; `rendezvous` finds the others from the environment. Writes
`logs/train-rank-N.log`. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from yelp_hpc.errors import NodeFault, RequestError, SavedForRequeue, StageError, YelpHpcError
from yelp_hpc.progress import step_bar
from yelp_hpc.ranks.rank import SAVED, STOP_SIGNALS, Flag
from yelp_hpc.runtime import likely_cause, open_log, without_tokens

# After the first failure the others may write their own log lines so long (seconds) …
FAILURE_GRACE = 1.0
# … and after the first rank has saved, the others may still finish their writes so long.
SAVE_GRACE = 20.0


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of all nodes meet."""

    nodes: int
    node_rank: int
    address: str
    port: int

    def handed_on(self) -> dict[str, str]:
        """The variables by which a process without Slurm's finds it; none on one node."""
        if self.nodes == 1:
            return {}
        return {
            "YELP_HPC_NNODES": str(self.nodes),
            "YELP_HPC_NODE_RANK": str(self.node_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def rendezvous(environ: Mapping[str, str]) -> Rendezvous:
    """The meeting place of a job on one or several nodes; port 0 means any free one (one node).

    YELP_HPC_NNODES, YELP_HPC_NODE_RANK, MASTER_ADDR and MASTER_PORT win; without them the variables
    that Slurm sets in a job step count, the first node of the step being the master.

    Raises:
        RequestError: several nodes, but the variables are incomplete or no numbers.
    """
    try:
        nodes = int(environ.get("YELP_HPC_NNODES") or environ.get("SLURM_STEP_NUM_NODES") or 1)
        if nodes == 1:
            return Rendezvous(1, 0, "127.0.0.1", 0)
        rank = int(environ.get("YELP_HPC_NODE_RANK") or environ["SLURM_NODEID"])
        address = environ.get("MASTER_ADDR") or first_host(
            environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        )
        # Jobs that share a node meet at different ports.
        port = int(environ.get("MASTER_PORT") or 20000 + int(environ["SLURM_JOB_ID"]) % 20000)
    except KeyError as error:
        raise RequestError(
            f"training on {nodes} nodes, but {error.args[0]} is not set: start it through srun, or "
            "set YELP_HPC_NNODES, YELP_HPC_NODE_RANK, MASTER_ADDR and MASTER_PORT"
        ) from None
    except ValueError as error:
        raise RequestError(f"the rendezvous variables are not numbers: {error}") from None
    if not 0 <= rank < nodes:
        raise RequestError(f"node rank {rank} is outside 0..{nodes - 1}")
    return Rendezvous(nodes, rank, address, port)


def first_host(nodelist: str) -> str:
    """The first name of a Slurm host list: `n[03-05,9]` → `n03` (one bracket and more)."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    first = head[0] if head else nodelist
    return re.sub(r"\[([^\]]*)\]", lambda match: re.split(r"[-,]", match[1])[0], first)


def rank_environment(
    place: Rendezvous, local_rank: int, nproc: int, cores: int, environ: Mapping[str, str]
) -> dict[str, str]:
    """The variables that a rank gets beside the launcher's own."""
    values = {
        "RANK": str(place.node_rank * nproc + local_rank),
        "WORLD_SIZE": str(place.nodes * nproc),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        # cuBLAS is deterministic only with a fixed workspace (NVIDIA, "Results reproducibility").
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    # of a list for nested levels the first counts; what is no number is none to OpenMP either
    asked = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    wanted = int(asked) if asked.isdecimal() and len(asked) < 6 else 0
    values["OMP_NUM_THREADS"] = str(wanted or max(1, cores // nproc))
    if place.nodes == 1 and "GLOO_SOCKET_IFNAME" not in environ:
        values["GLOO_SOCKET_IFNAME"] = "lo"  # a node's own name need not resolve in a container
    return values


def free_port() -> int:
    """A TCP port of this host that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    error: Path
    relay: threading.Thread | None = None


def launch(command: Sequence[str], payload: bytes, nproc: int, logs: Path) -> None:
    """Run `command` once per rank of this node, `payload` on its standard input, and wait.

    Standard output and error of rank N go to `logs/train-rank-N.log`, those of this node's first
    rank also to this process's standard error. SIGUSR2, SIGTERM and SIGINT are handed to all ranks.

    Raises:
        SavedForRequeue: the ranks were asked to stop and saved, or (`NodeFault`) this node's
            hardware failed.
        RequestError, StageError: the first rank that failed, with its message and its log.
    """
    place = rendezvous(os.environ)
    if place.nodes == 1:
        place = Rendezvous(1, 0, place.address, free_port())
    logs.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    ranks: list[_Rank] = []
    stopped = Flag()

    def forward(signum: int, frame: FrameType | None) -> None:
        stopped.set()
        for rank in ranks:
            if rank.process.poll() is None:
                with suppress(ProcessLookupError):
                    rank.process.send_signal(signal.SIGUSR2)

    previous = {}
    # Blocked signals stay blocked across exec: a rank that is still starting keeps one pending
    # instead of dying of it; run_rank unblocks them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
        for local_rank in range(nproc):
            extra = rank_environment(place, local_rank, nproc, cores, os.environ)
            ranks.append(_start(command, payload, extra, logs, first=local_rank == 0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        _watch(ranks, stopped)
    finally:
        _end(ranks)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    command: Sequence[str], payload: bytes, extra: dict[str, str], logs: Path, first: bool
) -> _Rank:
    number = int(extra["RANK"])
    log, error = logs / f"train-rank-{number}.log", logs / f".train-rank-{number}.error.json"
    error.unlink(missing_ok=True)
    if log.is_symlink():
        log.unlink()  # it could lead anywhere
    try:
        opened = open_log(log, "ab", f"--- started {time.strftime('%Y-%m-%d %H:%M:%S %z')}")
    except OSError as why:
        raise StageError(f"cannot write the log {log}: {why.strerror}") from None
    with opened as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if first else file,
            stderr=subprocess.STDOUT,
            env={
                **without_tokens(os.environ),
                **extra,
                "YELP_HPC_RANK_ERROR": str(error),
                "YELP_HPC_RANK_LOG": str(log),
                "YELP_HPC_LAUNCHER": str(os.getpid()),
            },
        )
        rank = _Rank(number, process, log, error)
        if first and process.stdout is not None:
            own = (process.stdout, os.dup(file.fileno()))
            rank.relay = threading.Thread(target=_relay, args=own, daemon=True)
            rank.relay.start()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.write(payload)
            process.stdin.close()
    return rank


def _relay(stream: IO[bytes], log: int) -> None:
    """Copy a rank's output to its log, an open descriptor, and to standard error."""
    with stream, os.fdopen(log, "ab", buffering=0) as file, step_bar() as show:
        for line in stream:
            file.write(line)
            with suppress(OSError, ValueError):
                show(line.decode(errors="replace"))


def _watch(ranks: list[_Rank], stopped: Flag) -> None:
    """Wait for all ranks; at the first that fails give the verdict and leave the rest to `_end`."""
    ended: float | None = None
    kept = SavedForRequeue("the training state is saved; run the same command again")
    while True:
        codes = [rank.process.poll() for rank in ranks]
        if all(code is not None for code in codes) and set(codes) <= {0, SAVED}:
            if SAVED in codes:
                raise kept
            return
        now = time.monotonic()
        if any(code not in (None, 0) for code in codes):
            ended = ended or now
            saved = stopped.is_set() and SAVED in codes
            if saved and now - ended > SAVE_GRACE:
                raise kept
            failed = [
                rank
                for rank, code in zip(ranks, codes, strict=True)
                if code not in (None, 0, SAVED)
            ]
            alone = all(code is not None for code in codes)
            if failed and not saved and (alone or now - ended > FAILURE_GRACE):
                raise verdict([(rank, rank.process.returncode) for rank in failed])
            if alone and saved:
                raise kept
        time.sleep(0.02)


def verdict(failed: list[tuple[_Rank, int]]) -> YelpHpcError:
    """The error of the rank that failed first: a killed one, else the earliest own error.

    A rank that only lost its peers is never the culprit while another is known.
    """

    def order(item: tuple[_Rank, int]) -> tuple[int, float]:
        report = _report(item[0].error)
        if item[1] < 0 and report is None:
            return (0, 0.0)
        if report is None:
            return (1, 0.0)
        return (2 if report["peer_lost"] else 1, report["time"])

    rank, code = min(failed, key=order)
    report = _report(rank.error)
    where = f"\n  its log: {rank.log}"
    if report is None:
        how = f"exited with code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}{likely_cause(-code)}"
        tail = _tail(rank.log)
        return StageError(f"rank {rank.rank} {how}{where}" + (f"\n{tail}" if tail else ""))
    if report.get("node_fault"):
        return NodeFault(
            f"rank {rank.rank} on node {socket.gethostname()}: {report['message']}{where}\n"
            "  a fault of that node: what the last checkpoint holds is kept; run it again elsewhere"
        )
    if report["exit_code"] != RequestError.exit_code:
        return StageError(f"rank {rank.rank}: {report['message']}{where}")
    with suppress(OSError), open_log(rank.log, "ab") as log:  # the rank itself is silent then
        log.write(f"{report['message']}\n".encode())
    return RequestError(f"rank {rank.rank}: {report['message']}{where}")


def _report(path: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) else None


def _tail(log: Path) -> str:
    """The last five lines of what this start wrote."""
    with suppress(OSError), open_log(log) as file:
        content = file.read().decode(errors="replace").splitlines()
        started = max((i for i, x in enumerate(content) if x.startswith("--- started")), default=-1)
        return "\n".join("  | " + line for line in content[started + 1 :][-5:])
    return ""


def _end(ranks: list[_Rank]) -> None:
    """No rank outlives the launcher's verdict."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
    for rank in ranks:
        rank.process.wait()
        if rank.relay is not None:
            rank.relay.join(timeout=2)
        rank.error.unlink(missing_ok=True)
