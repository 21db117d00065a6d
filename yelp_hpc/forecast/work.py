"""What a run computes: tokens, micro-batches and FLOPs, cut as the engine cuts them. Pure.

A shared prefix counts once a micro-batch, nothing is padded, the vocabulary projection runs at the
answer alone, frozen weights have no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from yelp_hpc.config import Config
from yelp_hpc.data.packing import (
    DataPlan,
    deal,
    default_pieces,
    microbatch_tokens,
    more_pieces,
    plan_microbatches,
)
from yelp_hpc.forecast.memory import (
    choose_budget,
)
from yelp_hpc.forecast.model_shape import ModelShape
from yelp_hpc.gpus import Card

ROOMY = 10**15  # bytes of a machine whose memory is not known


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence behind the prefix that all share; a training one has its answer."""

    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]
    prefix: int
    source: str
    """Where the numbers come from, for people."""
    tree: int = 0
    """Tokens of the answers behind each test prompt, which stand in `test`; none are generated."""


@dataclass(frozen=True)
class Work:
    """What a training computes, over all steps."""

    steps: int
    sequences: int
    tokens: int
    """Over all ranks, the shared prefix counted once a micro-batch."""
    critical: int
    """Of the rank that computes most in each step: the others wait for it."""
    largest: int
    """The largest micro-batch."""
    shapes: int
    """Different sizes of micro-batches of the first rank."""
    evaluations: int
    pieces: int
    """Into which a global batch is cut, at least."""
    budget: int
    """Tokens of a micro-batch at most."""
    recompute: bool
    """Whether layers are computed twice."""
    micro_batches: int
    """Over all steps and ranks."""


def training_work(
    config: Config, lengths: Lengths, ranks: int, card: Card | None, shape: ModelShape
) -> Work:
    """Steps, tokens and micro-batches of a training on `ranks` ranks, cut as the engine does."""
    settings, prefix = config.train, lengths.prefix
    plan = DataPlan(
        len(lengths.train), settings.global_batch, settings.epochs, config.seed, settings.max_steps
    )
    pieces = settings.micro_batches
    if pieces == "auto":
        mean = sum(lengths.train) / len(lengths.train) * settings.global_batch
        pieces = default_pieces(mean, prefix, settings.global_batch)

    more = more_pieces(cuda=card is not None)

    def cut(budget: int) -> Iterator[list[int]]:
        return microbatch_tokens(plan, lengths.train, pieces, budget, prefix, more)

    def largest(budget: int) -> int:
        return max(map(max, cut(budget)))

    memory = card.memory if card else ROOMY
    budget, recompute = choose_budget(shape, config, memory, card is not None, largest)
    tokens = critical = most = count = 0
    sizes: set[int] = set()
    for work in cut(budget):
        loads = deal(work, ranks)
        tokens += sum(work)
        critical += max(sum(work[i] for i in load) for load in loads)
        most = max(most, *work)
        count += len(work)
        sizes.update(work[i] for i in loads[0])
    sequences = sum(len(plan.batch(step)) for step in range(plan.steps))
    every = settings.evaluate_every or max(1, plan.steps // 10)
    evaluations = -(-plan.steps // every) if lengths.validation else 0
    return Work(
        plan.steps, sequences, tokens, critical, most, len(sizes), evaluations, pieces, budget,
        recompute, count,
    )  # fmt: skip


def computed(own: Sequence[int], max_tokens: int, prefix: int) -> int:
    """Tokens that the engine computes for sequences in micro-batches of at most `max_tokens`."""
    return prefix * len(plan_microbatches(own, max_tokens, prefix)) + sum(own)


def forward_flops(shape: ModelShape, own: Sequence[int], tokens: int, prefix: int) -> float:
    """FLOPs of the forward pass of `tokens` computed tokens that belong to sequences `own`.

    2 a weight and token (Kaplan et al. 2020, arXiv:2001.08361), the last layer's MLP and attention
    output at the answer only; attention's own products causal over each sequence and its prefix.
    """
    products = 2.0 * (shape.layer_weights - shape.last_layer_saved) * tokens
    pairs = sum(n * prefix + n * n / 2 for n in own)
    attention = 4.0 * shape.heads * shape.head_dim * shape.layers * pairs
    head = 2.0 * shape.vocabulary * shape.hidden * 2 * len(own)
    return products + attention + head


def train_flops(forward: float, adapter: float, checkpointing: bool) -> float:
    """FLOPs of training from those of the forward passes of the frozen model and of its adapter.

    Frozen weights have no gradient, so the backward pass costs what the forward costs, and the
    adapter's twice that; the layers are computed once more where activations are not kept.
    """
    return forward * (2 + checkpointing) + adapter * (3 + checkpointing)


@dataclass(frozen=True)
class Load:
    """The work of a run on its ranks, in tokens and FLOPs."""

    ranks: int
    training: Work
    forward_flops: float
    """Of training's tokens."""
    train_flops: float
    validation_tokens: int
    """Over all evaluations."""
    scored_tokens: int
    """Of a model's predictions."""
    models: int
    infer_flops: float
    """Of all models."""


def load_of(
    config: Config, shape: ModelShape, lengths: Lengths, work: Work, ranks: int, recompute: bool
) -> Load:
    """What training and predictions compute; `recompute`: layers twice, to save memory."""
    own = (list(lengths.train) * config.train.epochs)[: work.sequences]
    forward = forward_flops(shape, own, work.tokens, lengths.prefix)
    sampled = lengths.validation[: config.train.evaluate_rows]
    sample = computed(sampled, work.budget, lengths.prefix)
    every = computed(lengths.validation, work.budget, lengths.prefix)
    validation = max(0, work.evaluations - 1) * sample + min(1, work.evaluations) * every
    scored = computed(lengths.test, config.infer.max_tokens, lengths.prefix)
    models = len(config.infer.models)
    adapter = 2.0 * shape.adapter_parameters(config.lora.target, config.lora.rank)
    # in fp32 it is merged into the weights before they are asked
    beside = "tuned" in config.infer.models and config.infer.precision != "fp32"
    asked = forward_flops(shape, lengths.test, scored, lengths.prefix)
    return Load(
        ranks=ranks,
        training=work,
        forward_flops=forward,
        train_flops=train_flops(forward, adapter * work.tokens, recompute),
        validation_tokens=validation,
        scored_tokens=scored,
        models=models,
        infer_flops=models * asked + beside * adapter * scored,
    )
