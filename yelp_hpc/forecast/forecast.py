"""What a run will cost, before anything is queued: pure arithmetic on sizes and token counts.

`forecast` puts together the model's shape (its config.json), the lengths of the sequences and a
machine: a card of `cards.py`, or a `Probe` that `probe.py` measured. It follows how this engine
computes: a shared prefix once a micro-batch, no padding, the vocabulary projection at the answer
alone, no gradients of frozen weights. Reads and writes nothing, imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from yelp_hpc.config import Config
from yelp_hpc.data.packing import (
    DataPlan,
    deal,
    default_pieces,
    microbatch_tokens,
    plan_microbatches,
)
from yelp_hpc.forecast.memory import (
    BYTES,
    Memory,
    activation_bytes,
    choose_budget,
    infer_memory,
    training_memory,
)
from yelp_hpc.forecast.model_shape import ModelShape
from yelp_hpc.gpus import Card
from yelp_hpc.inference.shards import plan_shards

# Share of a card's dense peak that training reaches. An assumption: `--efficiency` changes it, a
# probe replaces it.
EFFICIENCY = 0.35
START_SECONDS = 40.0  # interpreter, imports, CUDA; and the weights at …
READ_RATE = 1e9  # … bytes a second
# Kokolis et al. 2024 (arXiv:2410.21680): 6.5 failures in 1,000 node-days on a large GPU cluster.
MTBF_HOURS = 24 * 1000 / 6.5
ROOMY = 10**15  # bytes of a machine whose memory is not known
SHARD_SECONDS = 1800.0  # a shard of half an hour: short in a queue, long beside its start


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence behind the prefix that all share; a training one has its answer."""

    train: Sequence[int]
    validation: Sequence[int]
    test: Sequence[int]
    prefix: int
    source: str
    """Where the numbers come from, for people."""


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


@dataclass(frozen=True)
class Forecast:
    """A plan, in seconds, bytes, FLOPs and tokens. A time is None where no machine is known."""

    machine: str
    parameters: int
    adapter_parameters: int
    token_source: str
    mean_tokens: float
    steps: int
    train_tokens: int
    train_flops: float
    infer_tokens: int
    infer_flops: float
    ranks: int
    micro_batches: int
    """Of a step, at least."""
    max_tokens: int
    """Of a micro-batch, at most."""
    train_memory: Memory
    infer_memory: Memory
    card_memory: int | None
    train_seconds: float | None
    infer_seconds: float | None
    """Of all shards of all models, one after the other."""
    gpu_hours: float | None
    train_limit: str | None
    infer_limit: str | None
    shards: int | None
    checkpoint_seconds: float
    checkpoint_minutes: float
    disk: dict[str, int]
    notes: list[str] = field(default_factory=list)


# --- the work -----------------------------------------------------------------------------------


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

    def cut(budget: int) -> Iterator[list[int]]:
        return microbatch_tokens(plan, lengths.train, pieces, budget, prefix)

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


def micro_batches(own: Sequence[int], max_tokens: int, prefix: int) -> list[int]:
    """Tokens of each micro-batch that the engine makes of sequences under a budget."""
    groups = plan_microbatches(own, max_tokens, prefix)
    return [prefix + sum(own[i] for i in group) for group in groups]


def computed(own: Sequence[int], max_tokens: int, prefix: int) -> int:
    """Tokens that the engine computes for sequences in micro-batches of at most `max_tokens`."""
    return sum(micro_batches(own, max_tokens, prefix))


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


def train_flops(shape: ModelShape, forward: float, checkpointing: bool) -> float:
    """FLOPs of training from those of its forward pass.

    Frozen weights have no gradient, so the backward pass costs what the forward costs; the layers
    are computed once more where activations are not kept. The adapter's own products (under 1 %)
    are left out.
    """
    return forward * (3 if checkpointing else 2)


# --- advice -------------------------------------------------------------------------------------


def checkpoint_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between checkpoints that lose least.

    Daly 2006 ("A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22(3), equation 37), whose first term is Young 1974's
    sqrt(2 δ M) (Communications of the ACM 17(9)).
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    first = math.sqrt(2 * save_seconds * mtbf_seconds)
    return first * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def time_limit(seconds: float) -> str:
    """A Slurm time limit that leaves room: half as much again and ten minutes, in quarter hours."""
    quarters = math.ceil((1.5 * seconds + 600) / 900)
    return f"{quarters // 4}:{quarters % 4 * 15:02d}:00"


def disk_bytes(config: Config, shape: ModelShape, lengths: Lengths) -> dict[str, int]:
    """Bytes on disk of a run directory and of the model in the cache.

    A review's text is about 4.5 bytes a token; it stands in parquet and in the alpaca records.
    """
    adapter = shape.adapter_parameters(config.lora.target, config.lora.rank)
    rows = len(lengths.train) + len(lengths.validation) + len(lengths.test)
    own = sum(lengths.train) + sum(lengths.validation) + sum(lengths.test)
    kept = config.train.keep_checkpoints + 2  # the best, and one that is being written
    return {
        "prepare": round(own * (4.5 * 1.6 + 1.6) + rows * 250),
        "checkpoints": kept * 12 * adapter,
        "adapter": 4 * adapter,
        "predictions": 60 * len(lengths.test) * len(config.infer.models),
        "model in the cache": BYTES[config.model.precision] * shape.parameters,
    }


# --- all of it ----------------------------------------------------------------------------------


def forecast(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    *,
    card: Card | None = None,
    probe: Probe | None = None,
    nodes: int = 1,
    gpus: int = 1,
    efficiency: float = EFFICIENCY,
    mtbf_hours: float = MTBF_HOURS,
) -> Forecast:
    """The plan of a run on `nodes` × `train.nproc` ranks of `card`, or on the probed machine.

    `gpus`: ranks a node where `train.nproc` is auto.

    Raises:
        ValueError: there are no training rows.
    """
    ranks = nodes * (gpus if config.train.nproc == "auto" else config.train.nproc)
    work = training_work(config, lengths, ranks, card, shape)
    cuda = probe.cuda if probe else card is not None
    memory = training_memory(shape, config, work.largest, work.recompute, cuda)
    scoring = infer_memory(shape, config, cuda)
    once = list(lengths.train) * config.train.epochs
    own = once[: work.sequences]
    forward = forward_flops(shape, own, work.tokens, lengths.prefix)
    training = train_flops(shape, forward, memory.checkpointing)
    checked_rows = lengths.validation[: config.train.evaluate_rows]
    sample, every = (
        computed(rows, work.budget, lengths.prefix) for rows in (checked_rows, lengths.validation)
    )
    validation = max(0, work.evaluations - 1) * sample + min(1, work.evaluations) * every
    scored = computed(lengths.test, config.infer.max_tokens, lengths.prefix)
    models = len(config.infer.models)
    scoring_flops = models * forward_flops(shape, lengths.test, scored, lengths.prefix)
    notes: list[str] = []
    train_seconds = infer_seconds = starts = None
    if probe is not None:
        machine = f"{probe.device} (measured)"
        train_seconds = probe.train_start + work.critical * probe.train_token
        train_seconds += validation / ranks * probe.infer_token
        starts = probe.infer_start
        infer_seconds = models * scored * probe.infer_token
        memory = _measured(memory, _extrapolated(shape, config, work, probe))
        scoring = _measured(scoring, probe.infer_memory)
    elif card is not None:
        machine = f"{ranks} × {card.label}"
        rates = [card.rate(p) for p in (config.train.precision, config.infer.precision)]
        for rate, key in zip(rates, ("train.precision", "infer.precision"), strict=True):
            if rate is None:
                notes.append(f"a {card.name} has no bf16: set {key} to fp16 or fp32")
        trains, infers = rates
        start = START_SECONDS + BYTES[config.model.precision] * shape.parameters / READ_RATE
        if trains:
            per_token = training / work.tokens
            checked = validation / ranks * forward / work.tokens
            train_seconds = start + (work.critical * per_token + checked) / (trains * efficiency)
        if infers:
            starts, infer_seconds = start, scoring_flops / (infers * efficiency)
        notes.append(f"{efficiency:.0%} of the card's peak is an assumption; --probe measures")
    else:
        machine = "no machine named"
        notes.append("no times: name a card with --gpu, or measure this machine with --probe")
    if card is not None:
        for what, used in (("train", memory.total), ("infer", scoring.total)):
            if used > 0.95 * card.memory:
                notes.append(
                    f"{what} needs {used / 1e9:.1f} GB, a {card.name} has {card.memory / 1e9:.1f}: "
                    f"lower {what}.max_tokens or {what}.precision"
                )
    if ranks > work.pieces:
        notes.append(
            f"{ranks} ranks share {work.pieces} micro-batches a step, the others wait: set "
            f"train.micro_batches to {ranks}"
        )
    shards = _shards(infer_seconds, models, starts)
    limits: list[str | None] = [None, None]
    hours = None
    if train_seconds is not None:
        limits[0] = time_limit(train_seconds)
    if infer_seconds is not None and starts is not None:
        parts = plan_shards([n + 1 for n in lengths.test], config.infer.shards)
        work_of = [sum(lengths.test[i] for i in part) for part in parts]
        largest = max(work_of) / max(1, sum(work_of))
        infer_seconds += starts * models * config.infer.shards
        limits[1] = time_limit(starts + infer_seconds / models * largest)
    if train_seconds is not None and infer_seconds is not None:
        hours = (ranks * train_seconds + infer_seconds) / 3600
    disk = disk_bytes(config, shape, lengths)
    # a snapshot of adapter and optimizer to a shared file system that writes 100 MB/s
    save = 0.2 + disk["checkpoints"] / (config.train.keep_checkpoints + 2) / 1e8
    interval = checkpoint_interval(save, mtbf_hours * 3600 / nodes)
    total = sum(lengths.train) + sum(lengths.validation) + sum(lengths.test)
    rows = len(lengths.train) + len(lengths.validation) + len(lengths.test)
    return Forecast(
        machine=machine,
        parameters=shape.parameters,
        adapter_parameters=shape.adapter_parameters(config.lora.target, config.lora.rank),
        token_source=lengths.source,
        mean_tokens=lengths.prefix + total / rows,
        steps=work.steps,
        train_tokens=work.tokens,
        train_flops=training,
        infer_tokens=models * scored,
        infer_flops=scoring_flops,
        ranks=ranks,
        micro_batches=work.pieces,
        max_tokens=work.budget,
        train_memory=memory,
        infer_memory=scoring,
        card_memory=card.memory if card else None,
        train_seconds=train_seconds,
        infer_seconds=infer_seconds,
        gpu_hours=hours,
        train_limit=limits[0],
        infer_limit=limits[1],
        shards=shards,
        checkpoint_seconds=save,
        checkpoint_minutes=interval / 60,
        disk=disk,
        notes=notes,
    )


def _extrapolated(shape: ModelShape, config: Config, work: Work, probe: Probe) -> int:
    """Memory of the whole training from that of the measured steps.

    A larger micro-batch keeps more activations. On a CPU the libraries also keep something for each
    new size of batch, fewer and fewer of them as their caches fill: the growth over the measured
    steps goes on with the 0.7th power of the number of sizes (fitted to two runs; no law).
    """
    per_token = activation_bytes(shape, config.train.precision, probe.cuda) * shape.layers
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


def _shards(seconds: float | None, models: int, start: float | None) -> int | None:
    """Shards of about half an hour, none so short that its start takes over a tenth of it."""
    if seconds is None or start is None:
        return None
    per_model = seconds / models
    most = max(1, int(per_model / (9 * start)))
    return max(1, min(most, math.ceil(per_model / SHARD_SECONDS)))
