"""The proof at the door: whether a model's answers in a batch are those that it gives alone.

Three short rows behind a shared prefix must give the plain model's logits, and the gradients of an
adapter, to rounding, and one row's text must not move another's logits. The way that passes first
is taken: packed, rows of a padded batch, one row a call. Asked of the model itself, or of its small
twin (`twin`), for which config.json is enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from yelp_hpc.errors import RequestError, first_line
from yelp_hpc.models.checkpoint import POSITIONS
from yelp_hpc.models.load import lora_targets, towers
from yelp_hpc.models.packed.batch import Way, base_model, forward_selected, pack, prepare_model
from yelp_hpc.models.packed.twin import ROWS, VOCABULARY, limits, twin

PREFIX = 4
LAST = 2  # the answer and its end, as in training
WAYS: tuple[Way, ...] = ("packed", "rows", "alone")
# Relative errors in fp32: of another row's logits when a text changes, of logits, of gradients.
LEAK, LOGITS, GRADIENTS = 2e-6, 1e-5, 1e-4
MOST = 0.1
"""No slack allows more."""
HALF = 0.3
"""In half precision, where each layer rounds and a router may change its mind: of the median."""


@dataclass(frozen=True)
class Verdict:
    """Which way a model takes, and what stood against the faster ones."""

    way: Way
    why: str = ""


def rows(vocabulary: int = VOCABULARY, seed: int = 0) -> list[list[int]]:
    """Three rows of random tokens that share their first `PREFIX`."""
    draw = torch.Generator().manual_seed(seed)
    low = 3 if vocabulary > 8 else 0
    ids = torch.randint(low, vocabulary, (max(ROWS) * (len(ROWS) + 1),), generator=draw).tolist()
    starts = [max(ROWS) * (i + 1) for i in range(len(ROWS))]
    return [
        ids[:PREFIX] + ids[at : at + length - PREFIX]
        for at, length in zip(starts, ROWS, strict=True)
    ]


def prove(
    model: nn.Module,
    ways: Sequence[Way] = WAYS,
    *,
    gradients: bool = False,
    slack: float = 1,
) -> Verdict:
    """The first of `ways` in which `model` answers as it does alone; leaves it prepared for that.

    Args:
        gradients: compare the gradients of the trainable parameters, too.
        slack: allows so many times the rounding of a small model: many layers round more.

    Raises:
        RequestError: what a token says depends on the tokens after it, or no way is right.
    """
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and p.ndim > 1)
    texts = rows(min(vocabulary_of(model), 50_000))
    with _as_it_is(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_model(model, way="alone")
        try:
            wanted, found = _plain(model, texts, device, gradients)
        except Exception as error:  # a model's own code may raise anything
            raise RequestError(
                f"{type(base_model(model)).__name__} cannot be computed: {first_line(error)}"
            ) from None
        if gradients and not found:
            raise RequestError(
                f"lora.target adapts nothing in {type(base_model(model)).__name__} that text goes "
                "through"
            )
        with torch.no_grad():
            batch = pack(texts, PREFIX, last=LAST).to(device)
            again = forward_selected(model, batch).float()
        same = again.shape == wanted.shape
        plain = _Answer(wanted, found, _off(again, wanted) if same else 0.0)
        if _sees_ahead(model, texts, plain, device):
            raise RequestError(
                f"{type(base_model(model)).__name__} is no decoder: what it says of a token "
                "depends on the tokens after it"
            )
        faults: list[str] = []
        for way in ways:
            fault = _fault(
                prepare_model(model, way=way), texts, plain, device, dtype, gradients, slack
            )
            if fault is None:
                break
            faults.append(f"{way}: {fault}")
        else:
            raise RequestError(
                f"{type(base_model(model)).__name__} does not answer in a batch as it does alone "
                f"({'; '.join(faults)}); use another model"
            )
    return Verdict(way, faults[0].partition(": ")[2] if faults else "")


def choose(
    config: Any, longest: int, target: Sequence[str] | None = None, *, train: bool = True
) -> tuple[Verdict, nn.Module] | None:
    """The way of an architecture by its twin, and the twin, prepared; None if none can be made.

    Args:
        config: transformers' object.
        longest: tokens of the longest row that the model is to read.
        target: names of the modules to adapt; None: the architecture's own.
        train: compare an adapter's gradients, too.

    Raises:
        RequestError: as `prove`; `target` names nothing.
    """
    model = twin(config, longest)
    if model is None:
        return None
    model.requires_grad_(False)
    if train:
        model = _adapted(model, lora_targets(model, list(target) if target else None))
    ways, text = WAYS, config.get_text_config(decoder=True)
    why = ""
    if (original := rotation_limit(text, "longrope")) is not None and longest > original:
        ways = ("alone",)
        why = f"the longest of a batch decides how all are turned beyond {original} (long RoPE)"
    found = prove(model, ways, gradients=train)
    found = replace(found, why=found.why or why)
    if train:
        _check_training(model)
    return found, model


def _check_training(model: nn.Module) -> None:
    """A step with dropout and whatever else an architecture does in training alone."""
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            forward_selected(model, pack(rows(), PREFIX, last=LAST)).sum().backward()
    except Exception as error:  # a model's own code may raise anything
        raise RequestError(
            f"{type(base_model(model)).__name__} cannot be trained: {first_line(error)}"
        ) from None
    finally:
        model.eval()
        model.zero_grad()


def _adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        exclude_modules=towers(model),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted: Any = get_peft_model(cast(Any, model), lora)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero, as it starts, it would hide the gradient of A
                parameter.data.normal_(0, 0.1)
    return cast(nn.Module, adapted.eval())


def rotation_limit(text: Any, kind: str) -> int | None:
    """The length up to which rotary positions of `kind` (dynamic, longrope) are as trained."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    named = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    for one in named:
        if kind in (one.get("rope_type"), one.get("type")):
            longest = one.get("original_max_position_embeddings")
            longest = longest or getattr(text, "original_max_position_embeddings", None)
            return int(longest or text.max_position_embeddings)
    return None


def limits_passed(text: Any, longest: int) -> list[str]:
    """The keys of windows, chunks and the like that a row of `longest` tokens passes."""
    return [key for key, limit in limits(text.to_dict()).items() if limit < longest]


def positions_of(text: Any) -> int | None:
    """How many positions the model has learnt; None if it can count on.

    Asked of a twin with few positions: a row that is longer fails in a table, not in a rotation.
    """
    key = next((key for key in POSITIONS if isinstance(getattr(text, key, None), int)), None)
    if key is None:
        return None
    model = twin(text, max(ROWS), {key: 2 * max(ROWS)})
    if model is None:
        return None
    few = twin(text, max(ROWS), {key: min(ROWS)})
    if few is None:
        return None
    try:
        with torch.no_grad():
            few(input_ids=torch.full((1, max(ROWS) + 4), 5), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return int(getattr(text, key))
    return None


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the input embedding."""
    return int(base_model(model).get_input_embeddings().weight.shape[0])


@dataclass(frozen=True)
class _Answer:
    logits: Tensor
    gradients: dict[str, Tensor]
    rounding: float
    """By how much they differ when they alone are asked for."""


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Without dropout, and with the gradients that were there before."""
    training = model.training
    kept = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = kept[name]
        model.train(training)


def _plain(
    model: nn.Module, texts: Sequence[Sequence[int]], device: torch.device, gradients: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    base = base_model(model)

    def logits() -> Tensor:
        parts = []
        for text in texts:
            out = base(input_ids=torch.tensor([text], device=device), use_cache=False).logits
            parts.append(out[0, -LAST:].float())
        return torch.cat(parts)

    return _with_gradients(model, logits, gradients)


def _with_gradients(
    model: nn.Module, logits: Callable[[], Tensor], gradients: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.set_grad_enabled(gradients):
        result = logits()
    if not gradients or not result.requires_grad:
        return result.detach(), {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = None
    targets = torch.arange(len(result), device=result.device) % result.shape[1]
    nn.functional.cross_entropy(result, targets).backward()
    found = {n: p.grad.detach().clone() for n, p in trained.items() if p.grad is not None}
    return result.detach(), found


def _sees_ahead(
    model: nn.Module, texts: Sequence[Sequence[int]], plain: _Answer, device: torch.device
) -> bool:
    """Whether another last token moves the logits before it."""
    text = list(texts[0])
    text[-1] = text[-2]
    with torch.no_grad():
        out = base_model(model)(input_ids=torch.tensor([text], device=device), use_cache=False)
    bound = 1e-4 if out.logits.dtype == torch.float32 else 0.02  # rounding of another batch shape
    return _off(out.logits[0, -LAST:-1].float(), plain.logits[: LAST - 1]) > bound


def _fault(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    plain: _Answer,
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool,
    slack: float,
) -> str | None:
    """What is wrong with the way that `model` is prepared for; None if nothing is."""
    batch = pack(texts, PREFIX, last=LAST).to(device)
    moved = [*texts[:-1], [*texts[-1][:PREFIX], *texts[0][PREFIX : len(texts[-1])]]]
    try:
        logits, found = _with_gradients(
            model, lambda: forward_selected(model, batch).float(), gradients
        )
        with torch.no_grad():
            other = forward_selected(model, pack(moved, PREFIX, last=LAST).to(device)).float()
    except Exception as error:  # a model's own code may raise anything
        return f"it fails ({type(error).__name__}: {str(error).strip().splitlines()[0][:100]})"
    if logits.shape != plain.logits.shape:
        return "its logits have another shape"
    own, half = len(logits) - LAST, dtype != torch.float32
    worst = median if half else max
    leak = worst(_off(a, b) for a, b in zip(other[:own], logits[:own], strict=True))
    if not leak <= (HALF if half else min(MOST, slack * LEAK)):
        return f"one review's text moves another's logits by {leak:.1e}"
    off = worst(_off(a, b) for a, b in zip(logits, plain.logits, strict=True))
    bound = max(LOGITS, min(3 * plain.rounding, 3 * LOGITS))
    if not off <= (HALF if half else min(MOST, slack * bound)):
        return f"its logits are off by {off:.1e}"
    for name, wanted in plain.gradients.items():
        if name not in found:
            return f"{name} gets no gradient"
        size = max(float(g.norm()) for g in plain.gradients.values())
        apart = float((found[name] - wanted).norm()) / max(float(wanted.norm()), 1e-4 * size, 1e-30)
        if not apart <= (2 * HALF if half else min(MOST, slack * GRADIENTS)):
            return f"the gradient of {name} is off by {apart:.1e}"
    return None


def _off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))
