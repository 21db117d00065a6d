"""The exact log-probability of every whole answer of a task, in one forward pass a prompt.

The tokens that answers begin with are computed once behind each packed prompt, each seen by its own
branch alone; the last token of an answer needs no row of its own. Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from yelp_hpc.data.answer_tree import AnswerTree
from yelp_hpc.models.packed.batch import base_model, forward_selected, pack

# Logits `[rows, vocabulary]` in fp32 that are held at once.
_LOGIT_BYTES = 512 * 1024**2
_NORMED_AT_ONCE = 16


def answer_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    prefix_length: int,
    tree: AnswerTree,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Log-probabilities `[N, answers]` of whole answers behind prompts, fp32.

    The sum of each token's log-probability over the whole vocabulary, given the prompt and the
    answer's tokens before it: what one forward pass an answer would give. Not divided by length.
    """
    vocabulary = base_model(model).get_output_embeddings().weight.shape[0]
    at_once = max(1, _LOGIT_BYTES // (4 * vocabulary * tree.rows_per_prompt))
    edges = sorted({edge for steps in tree.steps for edge in steps})
    place = {edge: i for i, edge in enumerate(edges)}
    owners = torch.tensor([i for i, steps in enumerate(tree.steps) for _ in steps], device=device)
    used = torch.tensor([place[edge] for steps in tree.steps for edge in steps], device=device)
    nodes = torch.tensor([node + 1 for node, _ in edges], device=device)
    tokens = torch.tensor([token for _, token in edges], device=device)
    scores = torch.zeros(len(prompts), len(tree.steps), device=device)
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        batch = pack(part, prefix_length, tree=tree.parents, tree_tokens=tree.tokens).to(device)
        logits = forward_selected(model, batch).float()
        # a few rows at a time: what it makes of each stays in a processor's cache
        norm = torch.cat([rows.logsumexp(-1) for rows in logits.split(_NORMED_AT_ONCE)])
        norm = norm.view(len(part), -1)[:, nodes]
        chances = logits.view(len(part), tree.rows_per_prompt, -1)[:, nodes, tokens] - norm
        scores[start : start + at_once].index_add_(1, owners, chances.index_select(1, used))
    return scores
