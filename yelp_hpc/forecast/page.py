"""A plan as text: the forecast, and the forecast beside what happened. Pure."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from yelp_hpc.forecast.forecast import Forecast
from yelp_hpc.forecast.memory import Memory
from yelp_hpc.progress import clock


@dataclass(frozen=True)
class Happened:
    """What a run took, as far as its files tell; seconds, bytes and tokens."""

    steps: int | None = None
    train_tokens: int | None = None
    train_seconds: float | None = None
    """From the start to the end of the jobs."""
    train_memory: int | None = None
    infer_seconds: float | None = None
    gpu_hours: float | None = None
    disk: int | None = None
    restarts: int = 0


def duration(seconds: float | None) -> str:
    """`0:04:10`, or `?` for what is not known."""
    return "?" if seconds is None else clock(round(seconds))


def size(count: float | None) -> str:
    """Bytes for people, in powers of ten."""
    if count is None:
        return "?"
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB" if count < 1000 else f"{count / 1000:.2f} TB"


def amount(count: float | None) -> str:
    """Counts for people: 1,234 or 3.2e7."""
    if count is None:
        return "?"
    return f"{count:,.0f}" if count < 1e7 else f"{count:.3g}"


def page(plan: Forecast) -> str:
    """The forecast in lines of at most 80 characters."""
    rows = [
        ("machine", plan.machine),
        ("model", f"{amount(plan.parameters)} parameters, {amount(plan.adapter_parameters)} LoRA"),
        ("tokens", f"{plan.mean_tokens:.0f} a prompt, {plan.token_source}"),
        ("", ""),
        ("train", f"{amount(plan.steps)} steps, {amount(plan.train_tokens)} tokens"),
        ("  micro-batches", f"{plan.micro_batches} a step, of {plan.max_tokens:,} tokens at most"),
        ("  FLOPs", f"{plan.train_flops:.3g}"),
        ("  memory a rank", _memory(plan.train_memory, plan.card_memory)),
        ("", _parts(plan.train_memory)),
        ("  time", duration(plan.train_seconds)),
        ("infer", f"{amount(plan.infer_tokens)} tokens, all models"),
        ("  FLOPs", f"{plan.infer_flops:.3g}"),
        ("  memory", _memory(plan.infer_memory, plan.card_memory)),
        ("  time", f"{duration(plan.infer_seconds)}, one shard after the other"),
    ]
    if plan.gpu_hours is not None:
        rows.append((f"{_unit(plan)}-hours", f"{plan.gpu_hours:.2f}"))
    rows += [
        ("", ""),
        ("suggested", ""),
        ("  train.time", plan.train_limit or "?"),
        ("  infer.time", plan.infer_limit or "?"),
        ("  infer.shards", amount(plan.shards)),
        (
            "  train.save_every_minutes",
            f"{plan.checkpoint_minutes:.0f} (a save takes {plan.checkpoint_seconds:.1f} s)",
        ),
        ("disk", size(sum(plan.disk.values()))),
        *((f"  {name}", size(count)) for name, count in plan.disk.items()),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}".rstrip() for name, value in rows]
    notes = (textwrap.fill(f"note: {note}", 80, subsequent_indent="  ") for note in plan.notes)
    return "\n".join([*lines, *notes])


def _unit(plan: Forecast) -> str:
    return "GPU" if plan.card_memory is not None or "measured" not in plan.machine else "machine"


def _memory(memory: Memory, card: int | None) -> str:
    of = f" of {size(card)}" if card else ""
    again = ", layers computed twice" if memory.checkpointing else ""
    return f"{size(memory.total)}{of}{again}"


def _parts(memory: Memory) -> str:
    return (
        f"{size(memory.weights)} weights, {size(memory.adapter)} adapter, "
        f"{size(memory.activations)} kept"
    )


def comparison(plan: Forecast, happened: Happened) -> list[tuple[str, float | None, float | None]]:
    """`(what, forecast, happened)` of everything that both know the name of."""
    return [
        ("steps", plan.steps, happened.steps),
        ("tokens", plan.train_tokens, happened.train_tokens),
        ("train seconds", plan.train_seconds, happened.train_seconds),
        ("train memory", plan.train_memory.total, happened.train_memory),
        ("infer seconds", plan.infer_seconds, happened.infer_seconds),
        ("GPU-hours", plan.gpu_hours, happened.gpu_hours),
        (
            "disk at most",
            sum(n for name, n in plan.disk.items() if "cache" not in name),
            happened.disk,
        ),
    ]


def comparison_page(plan: Forecast, happened: Happened) -> str:
    """The table of `plan --compare`."""
    shown = {"train memory": size, "disk at most": size, "train seconds": duration}
    shown |= {"infer seconds": duration}
    lines = [f"{'':<15}{'forecast':>14}{'happened':>14}{'off by':>9}"]
    for what, before, after in comparison(plan, happened):
        form = shown.get(what, amount) if what != "GPU-hours" else _hours
        off = f"{before / after - 1:+.0%}" if before is not None and after else ""
        lines.append(
            f"{what.replace('seconds', 'time'):<15}{form(before):>14}{form(after):>14}{off:>9}"
        )
    if happened.restarts:
        lines.append(
            f"note: {happened.restarts} restarts; their starts and lost steps are included"
        )
    return "\n".join(lines)


def _hours(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"
