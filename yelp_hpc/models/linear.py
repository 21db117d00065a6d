"""Frozen linear layers with LoRA, and the random masks of its dropout, as fast as this CPU has
them.

torch multiplies fp32 matrices with MKL, which on processors of other makers reaches less than half
of their rate; oneDNN, which torch carries too, does not have that gap. Frozen weights are laid out
for it once, for the forward and for the backward product, and no gradient of theirs is ever made.
Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# 16 random bits decide one element: p is met to 1/65536.
_LEVELS = 2**16


def keep_mask(rows: int, features: int, p: float, seed: int, out: Tensor | None = None) -> Tensor:
    """What dropout keeps, `[rows, features]`: 1 where kept, 0 where dropped.

    The same on every machine for the same arguments (numpy keeps the stream of SFC64 fixed), and
    ten times faster than torch's Bernoulli draws on a CPU. Written into `out`, of any
    dtype, if given; fp32 otherwise.
    """
    count = rows * features
    draws = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count]
    if out is None:
        out = torch.empty(rows, features)
    threshold = round(p * _LEVELS) - _LEVELS // 2
    return torch.ge(torch.from_numpy(draws).view(rows, features), threshold, out=out)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; `weight` is `[out, in]`, packed by `pack_weight` or not."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def pack_weight(weight: Tensor) -> Tensor:
    """`[out, in]` in the layout that `matmul` is fastest with; a copy."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `matmul` works here: fp32 on a CPU, in a torch built with oneDNN's linear layers."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


@dataclass
class Part:
    """LoRA on output columns `start` to `stop` of a projection: `scaling * seen A^T B^T`."""

    start: int
    stop: int
    scaling: float
    """LoRA's, times that of the dropout, `1 / (1 - p)`."""
    order: Tensor | None
    """Where each of its columns stands in B, if they are not in B's order."""
    a: Tensor
    """`[rank, in]`."""
    b: Tensor
    """`[stop - start, rank]`."""


@dataclass
class Branch:
    """LoRA of layers that see the same input: `seen` is `kept * x`, or x if nothing is dropped."""

    kept: Tensor | None
    """1 where kept, 0 where dropped, `[T, in]`; in int8 once the forward pass is over, a quarter
    of the size."""
    parts: list[Part] = field(default_factory=list)

    def down(self) -> Tensor:
        """Every A below each other, `[sum of ranks, in]`."""
        return torch.cat([part.a.detach() for part in self.parts])

    def columns(self) -> list[tuple[Part, slice, Tensor]]:
        """Each part with its columns among all ranks, and its B in the order of the result."""
        found, start = [], 0
        for part in self.parts:
            stop = start + len(part.a)
            b = part.b.detach()
            found.append((part, slice(start, stop), b if part.order is None else b[part.order]))
            start = stop
        return found


class Projection:
    """Linear layers that read the same input, as one product; peft's LoRA on any of them.

    Holds laid-out copies of the frozen weights, made anew if a weight changes (as when an adapter
    is
    merged into it).
    """

    def __init__(
        self, *modules: nn.Module, owner: nn.Module | None = None, order: Tensor | None = None
    ) -> None:
        """`order` `[sum of out]` rearranges the columns of the result, each within its module."""
        self.modules = modules
        self.order = order
        # peft's layer around a module: merging changes the weight and leaves no trace on it.
        self.owners = modules if owner is None else (owner,)
        self._key: tuple[Any, ...] | None = None

    @staticmethod
    def supports(module: nn.Module) -> bool:
        """Whether it is a plain linear layer, or peft's plain LoRA of one, with a frozen weight."""
        base = _base(module)
        if not isinstance(base, nn.Linear) or base.weight.requires_grad:
            return False
        if base.bias is not None and base.bias.requires_grad:
            return False
        if base is module:
            return True
        return not any(getattr(module, "lora_variant", {})) and not any(
            getattr(module, "lora_bias", {}).values()
        )

    def _prepare(self) -> None:
        bases = [_base(module) for module in self.modules]
        key = tuple(
            (base.weight.data_ptr(), base.weight._version, tuple(getattr(m, "merged_adapters", ())))
            for base, m in zip(bases, self.owners, strict=True)
        )
        if key == self._key:
            return
        with torch.no_grad(), torch.inference_mode(False):
            self.forward_weight = pack_weight(self._weight())
            self._backward_weight: Tensor | None = None
            self.bias: Tensor | None = None
            if any(base.bias is not None for base in bases):
                self.bias = torch.cat(
                    [
                        b.weight.new_zeros(b.out_features) if b.bias is None else b.bias
                        for b in bases
                    ]
                )
                if self.order is not None:
                    self.bias = self.bias[self.order]
        self._key = key

    def backward_weight(self) -> Tensor:
        """The transposed weight, laid out when a gradient first asks for it: scoring never does."""
        if self._backward_weight is None:
            self._backward_weight = pack_weight(self._weight().t())
        return self._backward_weight

    def _weight(self) -> Tensor:
        weight = torch.cat([_base(module).weight.detach() for module in self.modules])
        return weight if self.order is None else weight[self.order]

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, in]` to `[T, sum of out]`."""
        self._prepare()
        branches = self._branches(x)
        matrices = [m for branch in branches for part in branch.parts for m in (part.a, part.b)]
        result: Tensor = _Projection.apply(x, self, branches, *matrices)
        return result

    def _branches(self, x: Tensor) -> list[Branch]:
        branches: dict[Any, Branch] = {}
        start = 0
        for module in self.modules:
            layer: Any = module
            stop = start + _base(module).out_features
            if hasattr(layer, "lora_A") and not layer.disable_adapters and not layer.merged:
                order = None if self.order is None else self.order[start:stop] - start
                for name in layer.active_adapters:
                    if name not in layer.lora_A:
                        continue
                    dropout, scaling = layer.lora_dropout[name], float(layer.scaling[name])
                    key, p = None, 0.0
                    if dropout.training and getattr(dropout, "p", 0.0):
                        p = dropout.p
                        key = getattr(dropout, "name", dropout), p
                    if key not in branches:
                        branches[key] = Branch(_kept(dropout, x) if p else None)
                    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                    part = Part(start, stop, scaling / (1 - p), order, a, b)
                    branches[key].parts.append(part)
            start = stop
        return list(branches.values())


def _base(module: nn.Module) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module


def _kept(dropout: Any, x: Tensor) -> Tensor:
    """What this dropout module keeps of `x`, drawn anew."""
    if hasattr(dropout, "kept"):
        kept: Tensor = dropout.kept(x)
        return kept
    # One draw of torch's generator seeds the mask: reproducible, and saved with torch's state.
    return keep_mask(x.shape[0], x.shape[1], dropout.p, int(torch.randint(2**62, ())))


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, projection: Projection, branches: Sequence[Branch], *matrices: Tensor
    ) -> Tensor:
        y = matmul(x, projection.forward_weight, projection.bias)
        lows = []
        for branch in branches:
            seen = x
            if branch.kept is not None:
                folded = branch.kept.to(torch.int8)
                seen, branch.kept = branch.kept.mul_(x), folded
            low = matmul(seen, branch.down())
            for part, columns, b in branch.columns():
                y[:, part.start : part.stop].addmm_(low[:, columns], b.t(), alpha=part.scaling)
            lows.append(low)
        ctx.projection, ctx.branches = projection, branches
        if branches:
            ctx.save_for_backward(x, *lows, *matrices)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs_dx = ctx.needs_input_grad[0]
        dx = matmul(dy, ctx.projection.backward_weight()) if needs_dx else None
        if not ctx.branches:
            return dx, None, None
        # the matrices are saved as well, so that autograd notices if one was changed
        x, *lows = ctx.saved_tensors[: 1 + len(ctx.branches)]
        gradients: list[Tensor | None] = []
        for branch, low in zip(ctx.branches, lows, strict=True):
            dlow = torch.empty_like(low)
            dbs = []
            for part, columns, b in branch.columns():
                dpart = dy[:, part.start : part.stop]
                torch.mul(matmul(dpart, b.t().contiguous()), part.scaling, out=dlow[:, columns])
                # the few rows first: four times faster than the other way round
                db = (low[:, columns].t() @ dpart).mul_(part.scaling).t()
                if part.order is not None:
                    db = torch.empty_like(b).index_copy_(0, part.order, db)
                dbs.append(db)
            seen = x
            if branch.kept is not None:
                kept = branch.kept.to(x.dtype)
                if dx is not None:
                    dx.addcmul_(matmul(dlow, branch.down().t().contiguous()), kept)
                seen = kept.mul_(x)
            elif dx is not None:
                dx.addmm_(dlow, branch.down())
            das = (dlow.t() @ seen).split([len(part.a) for part in branch.parts])
            for da, db in zip(das, dbs, strict=True):
                gradients += [da, db]
        return dx, None, None, *gradients


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` for a few rows and a large frozen `[out, in]`, of which no copy is laid out.

    Twice as fast as torch's own where `available`; that one is used elsewhere, and where autocast
    wants another precision.
    """
    usable = available(x.device, x.dtype) and not torch.is_autocast_enabled("cpu")
    if not usable or weight.requires_grad or not weight.is_contiguous():
        return F.linear(x, weight)
    result: Tensor = _FrozenLinear.apply(x, weight)
    return result


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        return matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return matmul(dy, ctx.weight.t()), None


class _FastLinear(nn.Linear):
    """A frozen linear layer on `Projection`; for architectures that have no fused layers here."""

    _projection: Projection

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.weight.requires_grad or not available(input.device, input.dtype):
            return F.linear(input, self.weight, self.bias)
        flat = self._projection(input.reshape(-1, input.shape[-1]))
        return flat.view(*input.shape[:-1], -1)


def speed_up_linears(model: nn.Module) -> None:
    """Let every plain, frozen linear layer of `model` multiply through `Projection`.

    peft must have wrapped the model before: a later merge would go unnoticed.
    """
    owners = {
        module.base_layer: module for module in model.modules() if hasattr(module, "base_layer")
    }
    for module in list(model.modules()):
        if type(module) is nn.Linear and not module.weight.requires_grad:
            projection = Projection(module, owner=owners.get(module))
            module.__class__ = _FastLinear
            object.__setattr__(module, "_projection", projection)
