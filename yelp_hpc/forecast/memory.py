"""Memory of a rank, by what holds it: weights, adapter, optimizer, activations. Pure.

Used by `plan.py`; the coefficients were counted from the tensors that autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from yelp_hpc.config import Config
from yelp_hpc.forecast.model_shape import ModelShape
from yelp_hpc.gpus import Card

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# A process that imports torch and opens a CUDA context or a CPU runtime, bytes.
RUNTIME_BYTES = {"cuda": 1_000_000_000, "cpu": 600_000_000}


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
    shape: ModelShape, config: Config, largest: int, card: Card | None, cuda: bool
) -> Memory:
    """Memory of a rank while it trains."""
    weights = weight_bytes(shape, config.model.precision, cuda, backward=True)
    # fp32 weights, gradients and Adam's two moments
    adapter = 16 * shape.adapter_parameters(config.lora.target, config.lora.rank)
    runtime = RUNTIME_BYTES["cuda" if cuda else "cpu"]
    layer = activation_bytes(shape, config.train.precision, cuda) * largest
    kept = layer * shape.layers
    setting = config.train.gradient_checkpointing
    checkpointing = setting == "on"
    if setting == "auto" and card is not None:
        # the engine's own rule (stages/train.py): 20 h + 5 f elements against 80 % of what is free
        size = BYTES[config.train.precision]
        wanted = largest * shape.layers * (20 * shape.hidden + 5 * shape.inner) * size
        checkpointing = wanted > 0.8 * (card.memory - weights - adapter - runtime)
    if checkpointing:
        inputs = largest * shape.layers * shape.hidden * BYTES[config.model.precision]
        kept = inputs + layer
    working = BYTES[config.train.precision] * largest * (4 * shape.hidden + 4 * shape.inner)
    return Memory(weights, adapter, round(kept + working), runtime, checkpointing)


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
