"""Score mode: one forward pass a prompt scores every label of the task.

Takes a prepared model (`models/packed`) and token ids, returns tensors; touches no file. Labels of
one token are compared by their logits at the answer's position: the argmax is that of the whole
answers' log-likelihoods (as the LM evaluation harness computes them), for the normaliser is shared.
Longer ones get their exact log-likelihoods. Neither is divided by the label's length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from yelp_hpc.data.answer_tree import AnswerTree
from yelp_hpc.errors import StageError
from yelp_hpc.models.in_fp32 import in_fp32, is_half
from yelp_hpc.models.packed.batch import forward_selected, pack
from yelp_hpc.models.packed.tree import answer_scores
from yelp_hpc.progress import say


@torch.inference_mode()
def label_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    prefix_length: int,
    tree: AnswerTree,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Scores `[N, labels]`, float32 on the CPU.

    Logits where each label is one token, else log-probabilities of the whole labels.

    The prompts are one micro-batch; their first `prefix_length` tokens are the same and computed
    once.

    Where half precision overflowed, the micro-batch is computed again in fp32.

    Raises:
        StageError: a logit is not finite in fp32 either.
    """

    def compute() -> Tensor:
        if tree.tokens:
            return answer_scores(model, prompts, prefix_length, tree, device).cpu()
        batch = pack(prompts, prefix_length).to(device)
        vocabulary = torch.tensor([steps[0][1] for steps in tree.steps], device=device)
        return forward_selected(model, batch, vocabulary=vocabulary).float().cpu()

    scores = compute()
    if not scores.isfinite().all() and is_half(model):
        say(f"scores of a batch of {len(prompts)} are not finite: computed again in fp32")
        with in_fp32(model):
            scores = compute()
    if not scores.isfinite().all():
        raise StageError(
            "the model's logits are not finite: its weights or the adapter's are damaged"
        )
    return scores


def best_labels(scores: Tensor) -> list[int]:
    """The label of the highest score in each row of `[N, labels]`; of equal ones the smallest."""
    return [row.index(max(row)) for row in scores.tolist()]
