"""The gradients of a global batch: computed in micro-batches, gathered, added in a fixed order.

What one micro-batch gives is the same wherever it is computed, and the sum of all is made by the
same operations on every rank: the number of ranks changes no byte. Reads and writes tensors only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yelp_hpc.data.packing import cut_batch, deal
from yelp_hpc.models.packed.batch import forward_selected, pack
from yelp_hpc.models.packed.dropout import DropoutContext
from yelp_hpc.models.packed.masks import derive_seed
from yelp_hpc.ranks.rank import StopRequest
from yelp_hpc.ranks.world import World, tree_sum
from yelp_hpc.training.budget import Budget
from yelp_hpc.training.data import Rows
from yelp_hpc.training.throughput import Meter

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What a micro-batch's gradient is sent with: loss, tokens; and what its rank asks for.
SUMS, FLAGS = 2, 3


@dataclass(frozen=True)
class Summed:
    """What the ranks found together; the gradients are in place if `complete`."""

    loss: float = 0.0
    """Divided by the number of supervised tokens of the global batch."""
    tokens: int = 0
    stopping: bool = False
    """Some rank was asked to stop."""
    complete: bool = True
    """Every rank computed its share."""
    too_large: tuple[int, bool] | None = None
    """Some rank ran out of memory: tokens of the largest micro-batch, and whether it holds one
    sequence alone."""


@dataclass
class Gradients:
    """How one rank computes its share of a step."""

    precision: str
    seed: int
    world: World
    model: Any
    dropout: DropoutContext
    scaler: torch.amp.GradScaler
    train: Rows
    stop: StopRequest
    meter: Meter
    parameters: dict[str, Any]

    def of(self, step: int, rows: tuple[int, ...], budget: Budget) -> Summed:
        """Leave the gradients of a global batch in the parameters, equal on every rank."""
        own = [self.train.own_length(row) for row in rows]
        cut = cut_batch(
            own, budget.pieces, budget.max_tokens, self.train.prefix_length, budget.more
        )
        work = [self.train.prefix_length + sum(own[i] for i in piece) for piece in cut]
        shares = deal(work, self.world.size)
        supervised = sum(self.train.supervised(rows))
        size = sum(p.numel() for p in self.parameters.values())
        slots = max(map(len, shares))
        mine = torch.zeros(slots, size + SUMS + FLAGS, device=self.world.device)
        complete, fits = True, True
        for slot, piece in enumerate(shares[self.world.rank]):
            if self.stop.pending:
                complete = False
                break
            # Whatever else the model draws (attention dropout, say) depends on these alone too.
            torch.manual_seed(derive_seed(self.seed, step, piece))
            try:
                self._compute(step, [rows[i] for i in cut[piece]], supervised, mine[slot])
            except torch.OutOfMemoryError:
                fits = False
            if not fits:  # behind the handler, which still holds what was computed
                self._forget_gradients()
                if self.world.device.type == "cuda":
                    torch.cuda.empty_cache()
                break
        flags = [float(self.stop.pending), float(not complete), float(not fits)]
        mine[0, -FLAGS:] = torch.tensor(flags, device=self.world.device)
        parts, asked = self.world.in_order(mine, shares)
        stopping, incomplete, too_large = (asked[:, -FLAGS:].sum(0) > 0).tolist()
        largest = max(range(len(cut)), key=work.__getitem__)
        if incomplete:
            return Summed(stopping=stopping, complete=False)
        if too_large:
            return Summed(complete=False, too_large=(work[largest], len(cut[largest]) == 1))
        total = tree_sum(parts)
        start = 0
        for parameter in self.parameters.values():
            end = start + parameter.numel()
            parameter.grad = total[start:end].view_as(parameter).to(parameter.dtype, copy=True)
            start = end
        loss, tokens = total[start : start + SUMS].tolist()
        return Summed(loss, int(tokens), stopping)

    def _compute(self, step: int, group: list[int], count: int, out: Tensor) -> None:
        """One micro-batch: its gradients, loss and tokens into `out`.

        The loss is divided by `count`, the supervised tokens of the global batch.
        """
        self._forget_gradients()
        batch = pack(
            [self.train.sequence(row) for row in group],
            self.train.prefix_length,
            last=self.train.supervised(group),
        ).to(self.world.device)
        targets = self.train.targets(group).to(self.world.device)
        with self.dropout.batch(step, group, batch):
            with autocast(self.world.device, self.precision):
                logits = forward_selected(self.model, batch)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
            self.scaler.scale(loss).backward()
        found = [
            (p.new_zeros(p.shape) if p.grad is None else p.grad).flatten()
            for p in self.parameters.values()
        ]
        size = sum(map(len, found))
        torch.cat(found, out=out[:size])
        out[size] = loss.detach()
        out[size + 1] = len(batch.input_ids)
        self.meter.add(batch)

    def _forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What a forward pass in a number format runs in."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
