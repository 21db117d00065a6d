"""The ranks as they compute together: who this one is, on which device, and sums over all.

`join_world` meets the other ranks through accelerate (NCCL on GPUs, gloo on CPUs).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError


@dataclass(frozen=True)
class World:
    """This rank among all ranks, and where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def join_world(config: Config) -> World:
    """Meet the other ranks; accelerate picks the device and NCCL or gloo.

    Raises:
        RequestError: more ranks than GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus and config.train.nproc > gpus:
        raise RequestError(
            f"train.nproc is {config.train.nproc}, but this node shows {gpus} GPUs: "
            "one rank needs one GPU"
        )
    # A node that never comes is given up after this time; a rank that dies is seen at once.
    state = PartialState(cpu=not gpus, timeout=timedelta(minutes=10))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if gpus:
        torch.use_deterministic_algorithms(True, warn_only=True)
    return World(state.process_index, state.num_processes, state.device)
