"""LoRA's dropout drawn per sequence, so that it depends on neither rank nor packing.

What is kept of a token is a function of (seed, step, training row, position, adapted layer); of a
token of the shared prefix, of (seed, step, position, adapted layer). Layers that read the same
input, as q, k and v do, count as one, which in ChatGLM3 they are: they see the same mask. Hence any
number of ranks trains the same adapter with dropout on, a step that is repeated in smaller parts or
on another device has the same masks, gradient checkpointing draws them twice, and a resumed run
needs no state of a random number generator. Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from yelp_hpc.models.packed.batch import PackedBatch
from yelp_hpc.models.packed.masks import derive_seed, keep_mask, token_keys
from yelp_hpc.models.packed.unpacked import ROW, rows_of

# Layers that read the same input. ChatGLM3 has each of these as one layer; its LoRA has one mask.
_JOINED = {
    "q_proj": "query_key_value",
    "k_proj": "query_key_value",
    "v_proj": "query_key_value",
    "gate_proj": "dense_h_to_4h",
    "up_proj": "dense_h_to_4h",
}
# Any number that no training row has.
_PREFIX = 2**63 - 1


@dataclass
class DropoutContext:
    """What is being computed now; shared by all dropout modules of a model."""

    seed: int = 0
    keys: Tensor | None = None
    """Of every token of the micro-batch, `[T]`; None outside of one."""
    selected: Tensor | None = None
    """Of the selected positions; a last layer may compute these alone."""
    layout: PackedBatch | None = None

    @contextmanager
    def batch(self, step: int, rows: Sequence[int], batch: PackedBatch) -> Iterator[None]:
        """Draw for this micro-batch inside the block (forward and backward)."""
        owners = (_PREFIX, *rows)
        seeds = torch.tensor([derive_seed(self.seed, step, owner) for owner in owners])
        lengths = (batch.prefix_length, *batch.lengths)
        of_token = torch.repeat_interleave(
            seeds, torch.tensor(lengths), output_size=sum(lengths)
        ).to(batch.input_ids.device)
        self.keys = token_keys(of_token, batch.position_ids)
        self.selected = self.keys.index_select(0, batch.select)
        self.layout = batch
        try:
            yield
        finally:
            self.keys = self.selected = self.layout = None

    def candidates(self) -> Iterator[Tensor]:
        """The keys of tokens as they may lie: packed, selected, as padded rows, or of one row.

        Two of them that have the same length are the same tokens.
        """
        if self.keys is None or self.selected is None or self.layout is None:
            return
        row = ROW.get()
        if row is None:
            yield self.keys
            yield self.selected
        place = torch.arange(len(self.keys), device=self.keys.device)
        rows, _, _ = rows_of(replace(self.layout, input_ids=place))
        if row is None:
            rows = list(nn.utils.rnn.pad_sequence(rows, batch_first=True))
            yield self.keys[torch.cat(rows)]
        else:
            yield self.keys[rows[row]]


class SequenceDropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014) on packed tokens.

    `[T, features]`, with a batch dimension of 1 before or behind T.
    """

    def __init__(self, p: float, name: str, context: DropoutContext) -> None:
        super().__init__()
        self.p = p
        self.name = name  # equal masks have equal names
        self.layer = derive_seed(name)
        self.context = context

    def extra_repr(self) -> str:
        """What torch's `repr` shows."""
        return f"p={self.p}"

    def forward(self, states: Tensor) -> Tensor:
        """Drop as the masks of the sequences say.

        Raises:
            RuntimeError: states are neither all tokens nor the selected ones.
        """
        if not self.training or self.p == 0:
            return states
        return states * self.kept(states).div_(1 - self.p).view_as(states)

    def kept(self, states: Tensor) -> Tensor:
        """1 where kept and 0 where dropped; `[T, features]`."""
        tokens = states.numel() // states.shape[-1]
        for keys in self.context.candidates():
            if len(keys) == tokens:
                return keep_mask(keys, self.layer, states.shape[-1], self.p, states.dtype)
        raise RuntimeError(
            f"dropout of {self.name}: {tokens} tokens are not those of this micro-batch"
        )


def use_sequence_dropout(model: nn.Module, seed: int) -> DropoutContext:
    """Replace the `lora_dropout` of every adapted module; returns the context to set per batch."""
    context = DropoutContext(seed=seed)
    for name, module in model.named_modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for adapter, dropout in list(dropouts.items()):
                if isinstance(dropout, nn.Dropout):
                    layer, _, last = name.rpartition(".")
                    joined = f"{layer}.{_JOINED.get(last, last)}"
                    dropouts[adapter] = SequenceDropout(dropout.p, joined, context)
    return context
