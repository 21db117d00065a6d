"""Of processes: what libraries read once, what no child gets, names of programs, logs.

`set_runtime_defaults` is to be called before torch is imported. Imports nothing of the package.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

DEFAULTS = {
    # Its default spins for long at every barrier, which on a node that is shared with other work
    # costs many times the arithmetic.
    "GOMP_SPINCOUNT": "10000",
    # Huge pages for large tensors where the kernel gives them on request (PyTorch, "Inference
    # Performance Tuning on AWS Graviton Processors"): a step on a CPU takes 2 % less time and 8 %
    # more memory.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Micro-batches differ in size: segments that grow leave fewer holes ("CUDA semantics" of
    # PyTorch's notes).
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}

CARDS, GIVEN_CARDS = "CUDA_VISIBLE_DEVICES", "YELP_HPC_GIVEN_CARDS"
"""The GPUs that are seen, and under which name a local chain hands them on: submitit hides all."""
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""What the Hub's client reads a token from."""
TOKENS = tuple(
    prefix + name
    for name in (*TOKEN_VARIABLES, "HUGGINGFACEHUB_API_TOKEN")
    for prefix in ("", "APPTAINERENV_", "SINGULARITYENV_")
)
"""The Hub's tokens, also as they are handed into an image: publish alone gets one."""


def set_runtime_defaults() -> None:
    """Set what the user's environment does not; a process started later inherits it.

    What would have fp32 computed as TF32, which run.json does not say, is taken out of it.
    """
    for name in ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"):
        os.environ.pop(name, None)
    older = "PYTORCH_CUDA_ALLOC_CONF"  # the name before torch 2.9: who set it meant it
    for name, value in DEFAULTS.items():
        if name == "PYTORCH_ALLOC_CONF" and older in os.environ:
            continue
        os.environ.setdefault(name, value)


def undo_inherited() -> None:
    """Undo what a shell or a daemon may leave to a process.

    The next file that is opened takes the place of a closed stream (`2>&-`), and what is printed
    would go into it; where SIGCHLD is ignored, every child seems to have ended well.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest number that is free is taken
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


_SPOILS = ("PYTHONOPTIMIZE", "PYTHONINSPECT")


def in_plain_python() -> None:
    """Start this very process again where the shell's settings of Python would spoil it.

    -OO and PYTHONOPTIMIZE leave docstrings out, which `--help` shows and transformers reads;
    PYTHONINSPECT ends every process at a prompt, so that its exit code is lost; where a locale is
    not UTF-8, what a config names in UTF-8 cannot be opened, or is another file on the node.
    """
    inspected = sys.flags.inspect and "PYTHONINSPECT" in os.environ
    utf8 = sys.getfilesystemencoding() == "utf-8"
    if utf8 and sys.flags.optimize < 2 and not inspected:
        return
    env = {name: value for name, value in os.environ.items() if name not in _SPOILS}
    env |= {} if utf8 else {"PYTHONUTF8": "1"}
    options = sys.orig_argv[1 : -len(sys.argv) or None]
    kept = [option for option in options if option not in ("-O", "-OO")]
    given = sys.orig_argv[1 + len(options) :]
    if env != dict(os.environ) or kept != options:
        os.execve(sys.executable, [sys.executable, *kept, *given], env)


def without_tokens(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without the Hub's tokens."""
    return {name: value for name, value in env.items() if name not in TOKENS}


def likely_cause(number: int) -> str:
    """What may have made the system send a process this signal, in brackets; "" for most."""
    seconds = resource.getrlimit(resource.RLIMIT_CPU)[0]
    if seconds != resource.RLIM_INFINITY and number in (signal.SIGKILL, signal.SIGXCPU):
        return f" (all {seconds} s of CPU time used that a process has here? see `ulimit -t`)"
    oom = number == signal.SIGKILL
    return " (out of memory? see `memory:` of the cluster config)" if oom else ""


def open_log(path: Path, mode: Literal["rb", "ab"] = "rb", head: str = "") -> BinaryIO:
    """Open a log; a link in its place, which could lead anywhere, is an `OSError`.

    Args:
        head: the first line of what is appended; where it cannot be written nothing is opened.
    """
    flags = os.O_RDONLY if mode == "rb" else os.O_WRONLY | os.O_APPEND | os.O_CREAT
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if head:
            os.write(descriptor, f"{head}\n".encode())
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, mode)


def in_image() -> bool:
    """Whether this process runs inside an image."""
    return "APPTAINER_CONTAINER" in os.environ or "SINGULARITY_CONTAINER" in os.environ


_programs: dict[str, str] = {}


def use_programs(programs: Mapping[str, str]) -> None:
    """Take up what the site calls its programs (`programs` of the cluster file)."""
    _programs.clear()
    _programs.update(programs)


def program(name: str) -> str:
    """What the site calls the program `name`."""
    return _programs.get(name, name)
