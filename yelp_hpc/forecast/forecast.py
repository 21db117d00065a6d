"""What a run will cost, before anything is queued: pure arithmetic on sizes and token counts.

`forecast` puts together the model's shape (its config.json), the lengths of the sequences (`work`)
and a machine (`machine`): a card of `gpus.py`, or a `Probe` that `probe.py` measured. Reads and
writes nothing, imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from yelp_hpc.config import Config
from yelp_hpc.data.sense import warnings
from yelp_hpc.forecast.machine import EFFICIENCY, Probe, Times, measured, nowhere, on_card
from yelp_hpc.forecast.memory import (
    BYTES,
    Memory,
    infer_memory,
    training_memory,
)
from yelp_hpc.forecast.model_shape import ModelShape
from yelp_hpc.forecast.work import Lengths, load_of, training_work
from yelp_hpc.gpus import Card, auto_precision
from yelp_hpc.inference.shards import plan_shards
from yelp_hpc.rundir.manifest import in_precision, of_both

# Kokolis et al. 2024 (arXiv:2410.21680): 6.5 failures in 1,000 node-days on a large GPU cluster.
MTBF_HOURS = 24 * 1000 / 6.5
SHARD_SECONDS = 1800.0  # a shard of half an hour: short in a queue, long beside its start


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
    config, assumed = _with_precision(config, card, probe)
    if config.infer.mode == "generate":
        lengths = replace(lengths, test=[n - lengths.tree for n in lengths.test], tree=0)
        assumed.append(
            "infer.mode generate: what is written, "
            f"{config.infer.max_new_tokens} tokens an answer at most, is not counted in infer"
        )
    ranks = nodes * (gpus if config.train.nproc == "auto" else config.train.nproc)
    work = training_work(config, lengths, ranks, card, shape)
    cuda = probe.cuda if probe else card is not None
    training = training_memory(shape, config, work.largest, work.recompute, cuda)
    scoring = infer_memory(shape, config, cuda)
    load = load_of(config, shape, lengths, work, ranks, training.checkpointing)
    if probe is not None:
        times = measured(probe, config, shape, load, training, scoring)
    elif card is not None:
        times = on_card(card, config, shape, load, training, scoring, efficiency)
    else:
        times = nowhere(training, scoring)
    senseless = warnings(config, len(lengths.train), len(lengths.test))
    notes = [*senseless, *assumed, *times.notes]
    if ranks > work.pieces:
        notes.append(
            f"{ranks} ranks share {work.pieces} micro-batches a step, the others wait: set "
            f"train.micro_batches to {ranks}"
        )
    shards = _shards(times, load.models)
    scored, limit = _scoring(config, lengths, load.models, times, shards)
    hours = None
    if times.train_seconds is not None and scored is not None:
        hours = (ranks * times.train_seconds + scored) / 3600
    disk = disk_bytes(config, shape, lengths)
    # a snapshot of adapter and optimizer to a shared file system that writes 100 MB/s
    save = 0.2 + disk["checkpoints"] / (config.train.keep_checkpoints + 2) / 1e8
    total = sum(lengths.train) + sum(lengths.validation) + sum(lengths.test)
    total -= lengths.tree * len(lengths.test)
    rows = len(lengths.train) + len(lengths.validation) + len(lengths.test)
    return Forecast(
        machine=times.machine,
        parameters=shape.parameters,
        adapter_parameters=shape.adapter_parameters(config.lora.target, config.lora.rank),
        token_source=lengths.source,
        mean_tokens=lengths.prefix + total / rows,
        steps=work.steps,
        train_tokens=work.tokens,
        train_flops=load.train_flops,
        infer_tokens=load.models * load.scored_tokens,
        infer_flops=load.infer_flops,
        ranks=ranks,
        micro_batches=work.pieces,
        max_tokens=work.budget,
        train_memory=times.train_memory,
        infer_memory=times.infer_memory,
        card_memory=card.memory if card else None,
        train_seconds=times.train_seconds,
        infer_seconds=scored,
        gpu_hours=hours,
        train_limit=None if times.train_seconds is None else time_limit(times.train_seconds),
        infer_limit=limit,
        shards=shards,
        checkpoint_seconds=save,
        checkpoint_minutes=checkpoint_interval(save, mtbf_hours * 3600 / nodes) / 60,
        disk=disk,
        notes=notes,
    )


def _with_precision(
    config: Config, card: Card | None, probe: Probe | None
) -> tuple[Config, list[str]]:
    """The configuration with `auto` as that machine has it, and in words what was assumed."""
    chosen = probe.precision if probe else auto_precision(card.capability if card else None)
    planned, notes = in_precision(config, of_both(chosen)), []
    if planned != in_precision(config, {}):
        where = "on the probed machine" if probe else f"on a {card.name}" if card else "on a CPU"
        notes.append(f"precision auto is {chosen} {where}")
        if where == "on a CPU":
            notes[0] += ", which is assumed: name a card with --gpu"
    return planned, notes


def _scoring(
    config: Config, lengths: Lengths, models: int, times: Times, advised: int | None
) -> tuple[float | None, str | None]:
    """Seconds of all shards of all models with their starts, and the limit of the largest shard.

    The limit has room for a shard of the configuration, and for one of the `advised` number.
    """
    if times.infer_seconds is None or times.start_seconds is None or advised is None:
        return None, None
    parts = plan_shards([n + 1 for n in lengths.test], min(advised, config.infer.shards))
    work_of = [sum(lengths.test[i] for i in part) for part in parts]
    largest = max(work_of) / max(1, sum(work_of))
    seconds = times.infer_seconds + times.start_seconds * models * config.infer.shards
    return seconds, time_limit(times.start_seconds + times.infer_seconds / models * largest)


def _shards(times: Times, models: int) -> int | None:
    """Shards of about half an hour, none so short that its start takes over a tenth of it."""
    if times.infer_seconds is None or times.start_seconds is None:
        return None
    per_model = times.infer_seconds / models
    most = max(1, int(per_model / (9 * times.start_seconds)))
    return max(1, min(most, math.ceil(per_model / SHARD_SECONDS)))
