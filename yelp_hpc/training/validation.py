"""What a model under training answers on validation rows. Reads and writes tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yelp_hpc.data.answer_tree import AnswerTree
from yelp_hpc.data.packing import deal, plan_microbatches
from yelp_hpc.models.in_fp32 import in_fp32
from yelp_hpc.models.packed.batch import forward_selected, pack
from yelp_hpc.models.packed.tree import answer_scores
from yelp_hpc.ranks.rank import StopRequest
from yelp_hpc.ranks.world import World, tree_sum
from yelp_hpc.training.data import Rows
from yelp_hpc.training.gradients import autocast


@dataclass
class Validation:
    """The rows, and how one rank computes its share of them."""

    model: Any
    data: Rows
    tree: AnswerTree
    """Of the answers, as scores count them."""
    precision: str
    world: World
    stop: StopRequest

    def sums(self, rows: Sequence[int], max_tokens: int) -> list[float] | None:
        """Confusion matrix (row by row) and loss, summed over `rows` and ranks, and a 0.

        Micro-batches are added in a fixed order, so any number of ranks finds the same bits. None
        when some rank was asked to stop meanwhile.
        """
        data, device = self.data, self.world.device
        own = [data.own_length(row) for row in rows]
        groups = plan_microbatches(own, max_tokens, data.prefix_length)
        shares = deal([sum(own[i] for i in group) for group in groups], self.world.size)
        count = len(data.answers)
        mine = torch.zeros(max(map(len, shares)), 2, dtype=torch.float64, device=device)
        # exact in any order; of a thousand labels too large for one a micro-batch
        confusion = torch.zeros(count * count, dtype=torch.float64, device=device)
        self.model.eval()
        with torch.no_grad():
            for sums, piece in zip(mine, shares[self.world.rank], strict=False):
                if self.stop.pending:
                    mine[0, -1] = 1
                    break
                group = [rows[i] for i in groups[piece]]
                logits, scores = self._computed(group, self.precision)
                finite = logits.isfinite().all() and scores.isfinite().all()
                if not finite and self.precision != "fp32":  # as when they are scored
                    with in_fp32(self.model):
                        logits, scores = self._computed(group, "fp32")
                targets = data.targets(group).to(device)
                sums[0] = F.cross_entropy(logits, targets, reduction="sum").double()
                truth = torch.tensor([data.labels[row] for row in group], device=device)
                confusion += torch.bincount(
                    truth * count + scores.argmax(1), minlength=count * count
                )
        self.model.train()
        parts, asked = self.world.in_order(mine, shares)
        confusion = self.world.sum(confusion)
        if asked[:, -1].any():
            return None
        return [*confusion.tolist(), *tree_sum(parts).tolist()]

    def _computed(self, rows: list[int], precision: str) -> tuple[Tensor, Tensor]:
        """The supervised logits, fp32, and the scores `[len(rows), labels]`.

        Answers of one token are compared where the supervised logits are; longer ones need a pass
        of their own, with every answer behind each prompt.
        """
        data, device = self.data, self.world.device
        supervised = data.supervised(rows)
        sequences = [data.sequence(row) for row in rows]
        batch = pack(sequences, data.prefix_length, last=supervised).to(device)
        with autocast(device, precision):
            logits = forward_selected(self.model, batch).float()
            if not self.tree.tokens:
                tokens = torch.tensor([answer[0] for answer in data.answers], device=device)
                return logits, logits[:: supervised[0]][:, tokens]
            prompts = [data.prompt(row) for row in rows]
            prefix = data.prefix_length
            return logits, answer_scores(self.model, prompts, prefix, self.tree, device)
