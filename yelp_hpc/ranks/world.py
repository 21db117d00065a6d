"""The ranks as they compute together: who this one is, on which device, and sums over all.

`join_world` meets the other ranks through accelerate (NCCL on GPUs, gloo on CPUs).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor

from yelp_hpc.errors import StageError
from yelp_hpc.ranks.device import usable_gpus


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

    def gather(self, values: Tensor) -> Tensor:
        """`values` of all ranks below each other, rank 0's first; the same shape on every rank."""
        if self.size == 1:
            return values
        gathered = values.new_empty(self.size, *values.shape)
        dist.all_gather(list(gathered), values)
        return gathered.flatten(0, 1)

    def in_order(self, mine: Tensor, shares: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The rows of all ranks, in the order of the pieces, and every rank's first row.

        `mine`: this rank's, as many on every rank; `shares`: the pieces of each rank.
        """
        gathered = self.gather(mine)
        place = {
            piece: rank * len(mine) + slot
            for rank, pieces in enumerate(shares)
            for slot, piece in enumerate(pieces)
        }
        order = torch.tensor([place[piece] for piece in sorted(place)], device=mine.device)
        return gathered.index_select(0, order), gathered[:: len(mine)]

    def agree(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def join_world() -> World:
    """Meet the other ranks; accelerate picks the device and NCCL or gloo.

    Raises:
        RequestError: more ranks than GPUs.
    """
    gpus = usable_gpus()
    # A node that never comes is given up after this time; a rank that dies is seen at once.
    state = PartialState(cpu=not gpus, timeout=timedelta(minutes=10))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if gpus:
        # strict: with warnings alone flash attention's backward keeps its atomics. Filling every
        # new tensor, which comes with it, only helps to find reads of what was not written.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    world = World(state.process_index, state.num_processes, state.device)
    meant = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if (world.rank, world.size) != meant or (world.device.type == "cuda") != bool(gpus):
        raise StageError(
            f"this is rank {meant[0]} of {meant[1]} by its launcher, but rank {world.rank} of "
            f"{world.size} on {world.device} by accelerate: several trainings would write over "
            "each other"
        )
    return world


def tree_sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension, neighbours first: the same operations wherever it is."""
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        pairs = parts[: len(parts) // 2 * 2].unflatten(0, (-1, 2))
        parts = torch.cat([pairs[:, 0] + pairs[:, 1], odd])
    return parts[0]
