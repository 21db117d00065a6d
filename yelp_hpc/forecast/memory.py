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


def kept_numbers(shape: ModelShape, config: Config, cuda: bool) -> float:
    """Numbers that a layer keeps of a token for its backward pass.

    As counted from the tensors that are held when a forward pass ends (packed batches; h: hidden,
    k: keys or values, f: MLP). Fused on a GPU (`packed/fused_gpu.py`): 2 h before the norms, q and
    the attention's result, 2.3 k, 2 f; and what LoRA reads with a mask of a byte, 1.5 h for q, k
    and v. On a CPU in fp32, Llama's kin: 5.6 h + 2.3 k + 2 f and the attention's probabilities, of
    each head about 130 in rows of 200 tokens; SmolLM2-135M grew by 28 to 30 kB a token and layer
    where this says 32. By the model's own code: 11.3 h + 2.3 k + 3 f for ChatGLM3 (fp32 on a CPU:
    6.3 h), 15.4 h + 2.3 k + 3 f for others.
    """
    chatglm = shape.model_type == "chatglm"
    hidden, inner = shape.hidden, shape.inner
    keys = 2.3 * shape.groups * shape.head_dim
    if cuda and fused_on_gpu(shape):
        query = shape.heads * shape.head_dim
        adapted = {shape.reads(name) for name in shape.lora_names(config.lora.target)}
        seen = {"hidden": 1.5 * hidden, "context": 0.5 * query, "mlp": 1.5 * hidden}
        lora = sum((seen | {"inner": 1.5 * inner})[what] for what in adapted)
        return 2 * hidden + 2 * query + keys + 2 * inner + lora
    if config.train.precision != "fp32" or cuda:
        return (11.3 if chatglm else 15.4) * hidden + keys + 3 * inner
    if chatglm:
        return 6.3 * hidden + keys + 3 * inner
    return 5.6 * hidden + keys + 2 * inner + 130 * shape.heads


def fused_on_gpu(shape: ModelShape) -> bool:
    """Whether a GPU computes the model's layers in the fused forms."""
    return shape.model_type in ("chatglm", "llama", "qwen2")


def activation_bytes(shape: ModelShape, config: Config, cuda: bool) -> float:
    """Bytes a token that a layer keeps for its backward pass."""
    return BYTES[config.train.precision] * kept_numbers(shape, config, cuda)


def traffic_bytes(shape: ModelShape, precision: str, train: bool) -> float:
    """Bytes a token and layer that a GPU's memory moves outside of matrix products.

    Elements as counted from what each operation reads and writes in a step (norms and attention as
    one kernel each): forward and backward 90 h + 35 k + 17 f fused, of which 30 h draw LoRA's
    masks; scoring 21 h + 9 k + 5 f. By the model's own code 380 h + 70 k + 14 f and 80 h + 40 k +
    5 f, as Llama's.
    """
    keys = shape.groups * shape.head_dim
    if fused_on_gpu(shape):
        parts = (90, 35, 17) if train else (21, 9, 5)
    else:
        parts = (380, 70, 14) if train else (80, 40, 5)
    numbers = parts[0] * shape.hidden + parts[1] * keys + parts[2] * shape.inner
    return BYTES[precision] * numbers


def training_memory(
    shape: ModelShape, config: Config, tokens: int, recompute: bool, cuda: bool
) -> Memory:
    """Memory of a rank while it trains on micro-batches of `tokens`."""
    precision = config.train.precision  # the frozen weights are cast to it once, when loaded
    weights = weight_bytes(shape, precision, cuda, backward=True)
    # fp32 weights, gradients and Adam's two moments
    adapter = 16 * shape.adapter_parameters(config.lora.target, config.lora.rank)
    runtime = RUNTIME_BYTES["cuda" if cuda else "cpu"]
    layer = activation_bytes(shape, config, cuda) * tokens
    kept = layer * shape.layers
    if recompute:
        kept = layer + BYTES[precision] * tokens * shape.layers * shape.hidden
    # the backward pass of an MLP; fused, the last one has the answer's positions alone
    each = (6 if recompute else 2) if cuda and fused_on_gpu(shape) else 4
    working = BYTES[precision] * tokens * each * (shape.hidden + shape.inner)
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
