"""The answers of a task as a tree of tokens, and the exact log-probability of each in one pass.

The tokens that answers begin with are inner nodes, computed once behind each packed prompt; the
last token of an answer needs none of its own. Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yelp_hpc.models.packed.batch import forward_selected, pack

# Logits `[rows, vocabulary]` in fp32 that are held at once.
_LOGIT_BYTES = 512 * 1024**2


@dataclass(frozen=True)
class AnswerTree:
    """Answers of one task, merged where they begin alike; nodes in depth-first order."""

    tokens: tuple[int, ...]
    """Of each inner node."""
    parents: tuple[int, ...]
    """The node before each inner node, always an earlier one; -1 is the prompt's last token."""
    steps: tuple[tuple[tuple[int, int], ...], ...]
    """Of each answer: `(node that predicts it, token)` for every token."""

    @property
    def rows_per_prompt(self) -> int:
        """Positions whose logits a prompt needs: its last one and every inner node."""
        return 1 + len(self.tokens)

    def rows_at_once(self, vocabulary: int) -> int:
        """How many prompts' logits fit what is held at once, at least 1."""
        return max(1, _LOGIT_BYTES // (4 * vocabulary * self.rows_per_prompt))


def answer_tree(answers: Sequence[Sequence[int]]) -> AnswerTree:
    """The tree of the answers' tokens.

    Raises:
        ValueError: an answer has no token, or is the beginning of another (or the same).
    """
    texts = [tuple(answer) for answer in answers]
    inner = {text[:end] for text in texts for end in range(1, len(text))}
    if not all(texts) or len({*texts}) < len(texts) or inner & {*texts}:
        raise ValueError("an answer is empty, twice there or the beginning of another")
    order = sorted(inner)  # depth first: a beginning stands before what it begins
    place = {(): -1} | {text: i for i, text in enumerate(order)}
    return AnswerTree(
        tokens=tuple(text[-1] for text in order),
        parents=tuple(place[text[:-1]] for text in order),
        steps=tuple(
            tuple((place[text[:end]], text[end]) for end in range(len(text))) for text in texts
        ),
    )


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
    batch = pack(prompts, prefix_length, tree=tree.parents, tree_tokens=tree.tokens).to(device)
    logits = forward_selected(model, batch).float()
    logits = logits.view(len(prompts), tree.rows_per_prompt, -1)
    total = logits.logsumexp(-1)
    edges = sorted({edge for steps in tree.steps for edge in steps})
    place = {edge: i for i, edge in enumerate(edges)}
    nodes = torch.tensor([node + 1 for node, _ in edges], device=logits.device)
    tokens = torch.tensor([token for _, token in edges], device=logits.device)
    chances = logits[:, nodes, tokens] - total[:, nodes]
    owners = [i for i, steps in enumerate(tree.steps) for _ in steps]
    used = torch.tensor([place[edge] for steps in tree.steps for edge in steps])
    scores = chances.new_zeros(len(prompts), len(tree.steps))
    return scores.index_add_(
        1,
        torch.tensor(owners, device=scores.device),
        chances.index_select(1, used.to(scores.device)),
    )
