"""Which device this process computes on: a GPU that was given and cannot be used is an error.

`torch.cuda.device_count` asks the driver's library how many cards there are, `is_available` whether
CUDA starts: they can disagree, and then a CPU would do a GPU's work unseen. Reads the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from yelp_hpc.config import Precision
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.gpus import auto_precision
from yelp_hpc.progress import say

# What says that GPUs were given: CUDA's own list, and what Slurm sets for `gpus` of a cluster file.
_GIVEN = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
_NONE = ("", "-1", "NoDevFiles", "none", "void")
CPU_WANTED = "YELP_HPC_CPU"
_NAME_CARDS = """
import json, torch
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[card.name, card.major, card.minor] for card in cards]))
"""


def given_gpus(environ: Mapping[str, str]) -> str | None:
    """The variable that says that this process was given GPUs, `NAME=VALUE`; None without any."""
    for name in _GIVEN:
        value = environ.get(name, "").strip()
        nothing = value in _NONE or (name == "SLURM_GPUS_ON_NODE" and value == "0")
        if name in environ and name == "CUDA_VISIBLE_DEVICES" and nothing:
            return None  # hidden on purpose
        if not nothing:
            return f"{name}={value}"
    return None


def usable_gpus() -> int:
    """GPUs that this process can use; 0 where it was given none, or a CPU is wanted.

    Raises:
        RequestError: there are GPUs, but torch cannot use them; with torch's own reason.
    """
    if os.environ.get(CPU_WANTED, "0") not in ("", "0"):
        return 0
    counted, given = torch.cuda.device_count(), given_gpus(os.environ)
    if torch.cuda.is_available():
        return counted
    if not counted and given is None:
        return 0
    if _stand_in(counted):
        say(f"warning: {given}, but this node has no NVIDIA device: computing on the CPU")
        return 0
    said = given or f"the driver counts {counted} GPUs"
    raise RequestError(
        f"GPUs were given ({said}), but torch {torch.__version__} cannot use them: {_reason()}\n"
        "  a CPU would take many times as long: mend the driver or the image (`doctor --on-node` "
        f"says which), give no GPUs, or set {CPU_WANTED}=1 to compute on the CPU all the same"
    )


def device_name(device: torch.device) -> str:
    """What computes: a card's name, or a CPU by the instructions that torch takes of it.

    The last digits of a product may differ between two of them.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


def precision_here() -> tuple[Precision, str]:
    """What `precision: auto` is on this machine, and the machine's name: of its oldest card.

    Raises:
        RequestError: there are GPUs that torch cannot use.
        StageError: torch does not name its cards.
    """
    if not usable_gpus():
        return auto_precision(None), device_name(torch.device("cpu"))
    # in a child: what asks CUDA keeps some of each card's memory, and this process starts ranks
    argv = [sys.executable, "-c", _NAME_CARDS]
    done = subprocess.run(argv, capture_output=True, text=True)
    try:
        cards = json.loads(done.stdout.splitlines()[-1])
        name, major, minor = min(cards, key=lambda card: card[1:])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()[-1:] or ["no answer"]
        raise StageError(f"torch does not name this machine's GPUs: {said[0]}") from None
    return auto_precision((major, minor)), name


def _stand_in(counted: int) -> bool:
    """Whether a Slurm job's GPUs are names without devices, as in a cluster for tests."""
    devices = any(Path("/dev").glob("nvidia*"))
    return "SLURM_JOB_ID" in os.environ and not (counted or devices or torch.version.cuda)


def _reason() -> str:
    """Why CUDA does not start, as torch says it."""
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
    except Exception as error:  # whatever torch and the driver raise
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return "CUDA is not available"
