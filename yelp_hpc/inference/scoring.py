"""Score mode: one forward pass a review, the logits of the five labels at the answer's position.

Takes a prepared model (`models/packed.py`) and token ids, returns tensors; touches no file.
The argmax equals that of the whole answers' log-likelihoods (as the LM evaluation harness computes
them), because each label is one token behind the same prompt: the normaliser is shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from yelp_hpc.errors import StageError
from yelp_hpc.models.packed.batch import forward_selected, pack


@torch.inference_mode()
def label_scores(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    prefix_length: int,
    label_ids: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Logits `[N, len(label_ids)]`, float32 on the CPU, of the labels as each prompt's next token.

    The prompts are one micro-batch; their first `prefix_length` tokens are the same and computed
    once.

    Raises:
        StageError: a logit is not finite (half precision overflowed).
    """
    batch = pack(prompts, prefix_length).to(device)
    vocabulary = torch.tensor(list(label_ids), device=device)
    scores = forward_selected(model, batch, vocabulary=vocabulary).float().cpu()
    if not scores.isfinite().all():
        raise StageError(
            "the model's logits are not finite; if infer.precision is fp16, use bf16 or fp32"
        )
    return scores


def best_labels(scores: Tensor) -> list[int]:
    """The label of the highest score in each row of `[N, labels]`; of equal ones the smallest."""
    return [row.index(max(row)) for row in scores.tolist()]
