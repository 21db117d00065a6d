"""How long a machine takes for a run's work: a card of the table, or one that was measured. Pure.

Each of the three cases, the third being that no machine is named, gives the same `Times`.
"""

from __future__ import annotations

from dataclasses import dataclass

from yelp_hpc.config import Config, Precision
from yelp_hpc.forecast.memory import (
    BYTES,
    Memory,
    activation_bytes,
    traffic_bytes,
)
from yelp_hpc.forecast.model_shape import ModelShape
from yelp_hpc.forecast.work import Load, Work
from yelp_hpc.gpus import OLDEST_CARD, OLDEST_DRIVER, Card

# Shares of a card's rates that are reached, of dense matrix products and of its memory: assumed.
# `--efficiency` changes the first, a probe replaces both.
EFFICIENCY, MEMORY_EFFICIENCY = 0.7, 0.8
LAUNCH_SECONDS = 4e-3
"""Of a layer's kernels in a step, forward and backward: a micro-batch that a card computes faster
waits for its host. 3.2 to 6.4 ms beside an H200, of which `benchmarks/gpu.py` tells."""
START_SECONDS = 40.0  # interpreter, imports, CUDA; and the weights at …
READ_RATE = 1e9  # … bytes a second


@dataclass(frozen=True)
class Probe:
    """What `probe.py` measured on a machine; seconds, bytes, tokens of one rank."""

    device: str
    cuda: bool
    train_start: float
    train_token: float
    train_first: int
    """Memory after the first step."""
    train_memory: int
    """Memory after the last one."""
    train_largest: int
    """Tokens of the largest micro-batch of the measured steps."""
    train_shapes: int
    """Different sizes of micro-batches among them."""
    infer_start: float
    infer_token: float
    infer_memory: int
    precision: Precision | None = None
    """What `auto` was there; None: the configuration names it."""


@dataclass(frozen=True)
class Times:
    """What a machine takes; a time is None where it is not known."""

    machine: str
    train_memory: Memory
    infer_memory: Memory
    train_seconds: float | None = None
    infer_seconds: float | None = None
    """Of computing all predictions, without any start."""
    start_seconds: float | None = None
    """From the start of a job to its first batch."""
    notes: tuple[str, ...] = ()


def measured(
    probe: Probe, config: Config, shape: ModelShape, load: Load, train: Memory, infer: Memory
) -> Times:
    """On the machine of a probe; the memories are the computed ones, put right by its own."""
    work = load.training
    training = probe.train_start + work.critical * probe.train_token
    return Times(
        machine=f"{probe.device} (measured)",
        train_memory=_measured(train, _extrapolated(shape, config, work, probe)),
        infer_memory=_measured(infer, probe.infer_memory),
        train_seconds=training + load.validation_tokens / load.ranks * probe.infer_token,
        infer_seconds=load.models * load.scored_tokens * probe.infer_token,
        start_seconds=probe.infer_start,
    )


def on_card(
    card: Card,
    config: Config,
    shape: ModelShape,
    load: Load,
    train: Memory,
    infer: Memory,
    efficiency: float,
) -> Times:
    """On a card of the table: matrix products at its rate, all else at that of its memory."""
    notes = []
    if card.capability < OLDEST_CARD:
        notes.append(
            f"CUDA 13, which the image is built with, does not run on a {card.name}: it needs "
            f"compute capability {OLDEST_CARD[0]}.{OLDEST_CARD[1]} and driver {OLDEST_DRIVER}. "
            "`containers/lock.sh --index URL` makes a lock for an older CUDA"
        )
        return Times(f"{load.ranks} × {card.label}", train, infer, notes=tuple(notes))
    rates = [card.rate(p) for p in (config.train.precision, config.infer.precision)]
    for rate, key in zip(rates, ("train.precision", "infer.precision"), strict=True):
        if rate is None:
            notes.append(f"a {card.name} has no bf16: set {key} to fp16 or fp32")
    notes.append(
        f"{efficiency:.0%} of the card's rate in matrix products and {MEMORY_EFFICIENCY:.0%} of "
        "its memory's in all else are assumptions; --probe measures"
    )
    for what, memory in (("train", train), ("infer", infer)):
        if memory.total > 0.95 * card.memory:
            notes.append(
                f"{what} needs {memory.total / 1e9:.1f} GB, a {card.name} has "
                f"{card.memory / 1e9:.1f}: lower {what}.max_tokens or {what}.precision"
            )
    start = START_SECONDS + BYTES[config.model.precision] * shape.parameters / READ_RATE
    work, (trains, infers) = load.training, rates
    training = scoring = None

    def moved(tokens: float, precision: str, train: bool) -> float:
        """Seconds of what is no matrix product."""
        bytes_ = tokens * shape.layers * traffic_bytes(shape, precision, train)
        if train and load.training.recompute:
            bytes_ += tokens * shape.layers * traffic_bytes(shape, precision, False)
        return bytes_ / (card.bandwidth * MEMORY_EFFICIENCY)

    if trains:
        steps = work.critical * (load.train_flops / work.tokens)
        checked = load.validation_tokens / load.ranks
        checks = checked * load.forward_flops / work.tokens
        computed = moved(work.critical, config.train.precision, True)
        computed += steps / (trains * efficiency)
        launched = LAUNCH_SECONDS * shape.layers * work.micro_batches / load.ranks
        training = start + max(computed, launched) + checks / (trains * efficiency)
        training += moved(checked, config.train.precision, False)
        if launched > computed:
            notes.append(
                f"a {card.name} computes micro-batches of {work.tokens // work.micro_batches:,} "
                "tokens faster than its host launches them: fewer `train.micro_batches` (1 on one "
                "GPU) and a larger `train.max_tokens` would be faster"
            )
    if infers:
        scoring = load.infer_flops / (infers * efficiency)
        scoring += moved(load.models * load.scored_tokens, config.infer.precision, False)
    return Times(
        machine=f"{load.ranks} × {card.label}",
        train_memory=train,
        infer_memory=infer,
        train_seconds=training,
        infer_seconds=scoring,
        start_seconds=start if infers else None,
        notes=tuple(notes),
    )


def nowhere(train: Memory, infer: Memory) -> Times:
    """On a machine that nobody named: no times."""
    note = "no times: name a card with --gpu, or measure this machine with --probe"
    return Times("no machine named", train, infer, notes=(note,))


def _extrapolated(shape: ModelShape, config: Config, work: Work, probe: Probe) -> int:
    """Memory of the whole training from that of the measured steps.

    A larger micro-batch keeps more activations. On a CPU the libraries also keep something for each
    new size of batch, fewer and fewer of them as their caches fill: the growth over the measured
    steps goes on with the 0.7th power of the number of sizes (fitted to two runs; no law).
    """
    per_token = activation_bytes(shape, config, probe.cuda) * shape.layers
    beyond = max(0, work.largest - probe.train_largest) * per_token
    grown = probe.train_memory - probe.train_first
    if not probe.cuda:
        grown *= max(1.0, work.shapes / max(1, probe.train_shapes)) ** 0.7
    return round(probe.train_first + grown + beyond)


def _measured(memory: Memory, total: int) -> Memory:
    """The parts that can be computed, and the rest of a measured total as activations."""
    runtime = min(memory.runtime, max(0, total - memory.weights - memory.adapter))
    rest = max(0, total - memory.weights - memory.adapter - runtime)
    weights = total - memory.adapter - runtime - rest
    return Memory(weights, memory.adapter, rest, runtime, memory.checkpointing)
