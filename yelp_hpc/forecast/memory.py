"""Memory of a rank, by what holds it: weights, adapter, optimizer, activations. Pure.

The one formula of `plan` and of a training that chooses its own budget; the coefficients were
counted from the tensors that autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from yelp_hpc.config import Config
from yelp_hpc.forecast.model_shape import ModelShape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# A process that imports torch and opens a CUDA context or a CPU runtime, bytes.
RUNTIME_BYTES = {"cuda": 1_000_000_000, "cpu": 600_000_000}
# Of a memory, what a plan fills: the rest goes to fragments and to what others hold.
FILLED = 0.92
# A micro-batch of so many tokens keeps any card busy: more brings no time.
AUTO_TOKENS = 8192


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by what holds them."""

    weights: int
    adapter: int
    activations: int
    runtime: int
    checkpointing: bool
    """Whether the layers are computed twice to save memory."""

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.adapter + self.activations + self.runtime


def activation_bytes(shape: ModelShape, precision: str, cuda: bool) -> float:
    """Bytes a token that a layer keeps for its backward pass.

    Elements as counted from the tensors that autograd saves (packed batches, LoRA on q, k and v):
    16 bit: 11.3 h + 2.3 k + 3 f for ChatGLM3, 15.4 h + 2.3 k + 3 f for other decoders; fp32 on a
    CPU: 6.3 h + 2.3 k + 3 f, and 5.6 h + 2.3 k + 2 f for Llama's kin, whose dropout mask of a
    byte is 0.3 h of it (h: hidden, k: keys or values, f: MLP). These keep the attention's
    probabilities too (models/rows.py): of each head, for rows of 200 tokens, about 130.
    SmolLM2-135M grew by 28 to 30 kB a token and layer where this says 32.
    """
    chatglm = shape.model_type == "chatglm"
    if precision == "fp32" and not cuda:
        hidden, inner, seen = (6.3, 3, 0) if chatglm else (5.6, 2, 130)
    else:
        hidden, inner, seen = (11.3, 3, 0) if chatglm else (15.4, 3, 0)
    keys = 2.3 * shape.groups * shape.head_dim
    shares = seen * shape.heads
    return BYTES[precision] * (hidden * shape.hidden + keys + inner * shape.inner + shares)


def training_memory(
    shape: ModelShape, config: Config, tokens: int, recompute: bool, cuda: bool
) -> Memory:
    """Memory of a rank while it trains on micro-batches of `tokens`."""
    precision = config.train.precision  # the frozen weights are cast to it once, when loaded
    weights = weight_bytes(shape, precision, cuda, backward=True)
    # fp32 weights, gradients and Adam's two moments
    adapter = 16 * shape.adapter_parameters(config.lora.target, config.lora.rank)
    runtime = RUNTIME_BYTES["cuda" if cuda else "cpu"]
    layer = activation_bytes(shape, precision, cuda) * tokens
    kept = layer * shape.layers
    if recompute:
        kept = layer + BYTES[precision] * tokens * shape.layers * shape.hidden
    working = BYTES[precision] * tokens * (4 * shape.hidden + 4 * shape.inner)
    return Memory(weights, adapter, round(kept + working), runtime, recompute)


def choose_budget(
    shape: ModelShape, config: Config, memory: int, cuda: bool, largest: Callable[[int], int]
) -> tuple[int, bool]:
    """Tokens of a micro-batch, and whether layers are computed twice, on `memory` bytes a rank.

    `train.max_tokens: auto` is the largest budget whose activations are kept; layers are computed
    twice only where the longest sequence alone does not fit otherwise. `largest`: the tokens of a
    run's largest micro-batch under a budget.
    """
    asked, setting = config.train.max_tokens, config.train.gradient_checkpointing
    usable = FILLED * memory

    def total(tokens: int, recompute: bool) -> int:
        return training_memory(shape, config, tokens, recompute, cuda).total

    def most(recompute: bool) -> int:
        least, thousand = total(0, recompute), total(1000, recompute)
        return int(1000 * (usable - least) / (thousand - least))

    if asked == "auto":
        kept = most(False)
        if setting == "on" or (setting == "auto" and kept < largest(1)):
            kept = most(True)
        budget = max(64, min(AUTO_TOKENS, kept) // 64 * 64)
    else:
        budget = asked
    too_large = setting == "auto" and total(largest(budget), False) > usable
    return budget, setting == "on" or too_large


def infer_memory(shape: ModelShape, config: Config, cuda: bool) -> Memory:
    """Memory of a process that scores."""
    size = BYTES[config.infer.precision]
    tokens = config.infer.max_tokens
    working = size * tokens * (6 * shape.hidden + 4 * shape.inner)
    adapter = 4 * shape.adapter_parameters(config.lora.target, config.lora.rank)
    weights = weight_bytes(shape, config.infer.precision, cuda, backward=False)
    return Memory(weights, adapter, working, RUNTIME_BYTES["cuda" if cuda else "cpu"], False)


def weight_bytes(shape: ModelShape, precision: str, cuda: bool, backward: bool) -> int:
    """The frozen weights; fp32 on a CPU also keeps them laid out for each product's direction."""
    copies = 0 if cuda or precision != "fp32" else 1 + backward
    return BYTES[precision] * shape.parameters + 4 * copies * shape.layer_weights
