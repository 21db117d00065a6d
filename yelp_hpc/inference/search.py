"""Answer mode: the label of the highest score, where the scores themselves are not wanted.

A best-first search of the tree of answers. A branch's log-probability is a bound of every answer in
it, for each further token lowers it; so the likeliest branch is gone into, a token at a time, until
what is likeliest is an answer: no other can be above it, and the other branches are never computed.
The answer is the one of the highest score, as far as two scores differ by more than rounding.
Takes a prepared model and token ids; touches no file.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yelp_hpc.data.answer_tree import AnswerTree
from yelp_hpc.inference.generation import Next, decode
from yelp_hpc.models.packed.batch import pack

STEPS_A_TOKEN = 2
"""Steps for each token of the longest answer; a row that needs more is scored whole instead."""


@torch.inference_mode()
def search_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    prefix_length: int,
    tree: AnswerTree,
    device: torch.device | str = "cpu",
) -> list[int | None]:
    """The place in `tree.steps` of each prompt's best answer.

    None where it was not found in reasonable time, or where a logit is not finite.
    """
    search = _Search(tree, len(prompts), torch.device(device))
    packed = pack(prompts, prefix_length).to(device)
    decode(model, packed, most_steps(tree), search.take)
    return search.found


def most_steps(tree: AnswerTree) -> int:
    """How many tokens a search puts behind a prompt at most."""
    return STEPS_A_TOKEN * max(map(len, tree.steps))


_Branch = tuple[float, int, int, tuple[int, ...]]
"""-log-probability, the first answer first, where it leads, the tokens before it."""


class _Search:
    """The branches of each prompt that may still win."""

    def __init__(self, tree: AnswerTree, prompts: int, device: torch.device) -> None:
        # where each token behind each node leads: to a node, or (negative) to an answer
        leads: list[dict[int, int]] = [{} for _ in range(tree.rows_per_prompt)]
        for answer, steps in enumerate(tree.steps):
            ends = [node for node, _ in steps[1:]] + [-1 - answer]
            for (node, token), end in zip(steps, ends, strict=True):
                leads[node + 1][token] = end
        self.leads = [list(behind.values()) for behind in leads]
        self.tokens = [torch.tensor(list(behind), device=device) for behind in leads]
        self.token_of = tree.tokens
        self.found: list[int | None] = [None] * prompts
        self.open: list[list[_Branch]] = [[] for _ in range(prompts)]
        # the score, node and tokens before of what was gone into last
        self.at: list[tuple[float, int, tuple[int, ...]]] = [(0.0, -1, ())] * prompts
        self.steps = 0

    def take(self, logits: Tensor, rows: list[int]) -> list[Next | None]:
        """Open the branches behind each row's newest token; go into the likeliest, if it is one."""
        following: list[Next | None] = []
        norms = logits.float().logsumexp(-1).tolist()
        for row, norm, own in zip(rows, norms, logits, strict=True):
            score, node, before = self.at[row]
            found = own[self.tokens[node + 1]].float().tolist()
            if not all(map(math.isfinite, [norm, *found])):
                following.append(None)
                continue
            branches = self.open[row]
            for lead, logit in zip(self.leads[node + 1], found, strict=True):
                branches.append((norm - logit - score, -lead, lead, before))
            heapq.heapify(branches)
            cost, _, lead, before = heapq.heappop(branches)
            if lead < 0:
                self.found[row] = -1 - lead
                following.append(None)
            else:
                self.at[row] = (-cost, lead, (*before, self.steps))
                following.append((self.token_of[lead], before))
        self.steps += 1
        return following
