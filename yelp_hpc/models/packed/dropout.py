"""LoRA's dropout drawn per sequence, so that it depends on neither rank nor packing.

The mask of a sequence is a function of (seed, step, adapted layer, training row), the mask of the
shared prefix of (seed, step, adapted layer). Layers that read the same input, as q, k and v do,
count as one, which in ChatGLM3 they are: they see the same mask. Hence 1, 2 and 4 ranks train the
same adapter with dropout on, gradient checkpointing draws the same mask twice, and a resumed run
needs no state of a random number generator. Reads and writes tensors only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from yelp_hpc.models.packed.batch import PackedBatch
from yelp_hpc.models.packed.linear import keep_mask

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


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts, equal on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclass
class DropoutContext:
    """What is being computed now; shared by all dropout modules of a model."""

    seed: int = 0
    step: int = 0
    rows: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    """Tokens of each segment: the shared prefix (may be 0), then each row's own."""
    selected: tuple[int, ...] = ()
    """Positions selected in each row; a last layer may compute these alone."""
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    @contextmanager
    def batch(self, step: int, rows: Sequence[int], batch: PackedBatch) -> Iterator[None]:
        """Draw for this micro-batch inside the block (forward and backward)."""
        self.step, self.rows = step, tuple(rows)
        self.segments = (batch.prefix_length, *batch.lengths)
        self.selected = batch.selected
        try:
            yield
        finally:
            self.rows, self.segments = (), ()

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator for each device; only its seed matters."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        return self.generators[device]


class SequenceDropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014) on packed tokens.

    `[T, features]`, with a batch dimension of 1 before or behind T.
    """

    def __init__(self, p: float, name: str, context: DropoutContext) -> None:
        super().__init__()
        self.p = p
        self.name = name  # equal masks have equal names
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
        context = self.context
        segments, owners = context.segments, (_PREFIX, *context.rows)
        tokens, what = states.numel() // states.shape[-1], self.name
        if tokens != sum(segments):
            if tokens != sum(context.selected):
                raise RuntimeError(
                    f"dropout of {self.name}: {tokens} tokens are not those of this micro-batch"
                )
            segments, owners = context.selected, context.rows
            what += "/selected"
        kept = torch.empty(tokens, states.shape[-1], dtype=states.dtype, device=states.device)
        start = 0
        for length, owner in zip(segments, owners, strict=True):
            seed = derive_seed(context.seed, context.step, what, owner)
            self._fill(kept[start : start + length], seed)
            start += length
        return kept

    def _fill(self, kept: Tensor, seed: int) -> None:
        if not kept.numel():
            return
        if kept.device.type == "cpu":
            keep_mask(kept.shape[0], kept.shape[1], self.p, seed, out=kept)
            return
        generator = self.context.generator(kept.device)
        generator.manual_seed(seed)
        kept.bernoulli_(1 - self.p, generator=generator)


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
