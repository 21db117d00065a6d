"""Frozen linear layers with LoRA, layers that read the same input as one product.

torch multiplies fp32 matrices with MKL, which on processors of other makers reaches less than half
of their rate; oneDNN, which torch carries too, does not have that gap. There frozen weights are
laid out for it once, for the forward and for the backward product. Elsewhere, as on a GPU, the
product is torch's own and the weights stay where they are. No gradient of theirs is ever made, and
LoRA is computed in the number format of its input. Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yelp_hpc.models.packed.masks import keep_mask, token_keys


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; `weight` is `[out, in]`, packed by `pack_weight` or not."""
    if not available(x.device, x.dtype):
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def pack_weight(weight: Tensor) -> Tensor:
    """`[out, in]` in the layout that `matmul` is fastest with: a copy, or where it is."""
    if not available(weight.device, weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `matmul` is oneDNN's: fp32 on a CPU, in a torch built with its linear layers."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


@dataclass
class Part:
    """LoRA on the columns `columns` of a projection, `scaling * seen A^T B^T`."""

    columns: slice
    ranks: slice
    """Its ranks among those of its branch."""
    scaling: float
    """LoRA's, times that of the dropout, `1 / (1 - p)`."""
    a: Tensor
    """`[rank, in]`."""
    b: Tensor
    """`[columns, rank]`."""


@dataclass
class Branch:
    """LoRA of layers that see the same input: `seen` is `kept * x`, or x if nothing is dropped."""

    kept: Tensor | None
    """1 where kept, 0 where dropped, `[T, in]`; in int8 once the forward pass is over, a quarter
    of the size."""
    parts: list[Part] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Of all parts together."""
        return self.parts[-1].ranks.stop if self.parts else 0

    def down(self, dtype: torch.dtype) -> Tensor:
        """Every A below each other, `[rank, in]`."""
        rows = [part.a.detach() for part in self.parts]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)

    def up(self, features: int, dtype: torch.dtype) -> Tensor:
        """Every scaled B in its own rows and columns, `[features, rank]`, zero elsewhere.

        A few multiplications by zero cost less than one thin product for each part.
        """
        if len(self.parts) == 1 and len(self.parts[0].b) == features:
            return (self.parts[0].b.detach() * self.parts[0].scaling).to(dtype)
        up = self.parts[0].b.new_zeros(features, self.rank)
        for part in self.parts:
            torch.mul(part.b.detach(), part.scaling, out=up[part.columns, part.ranks])
        return up.to(dtype)


class Projection:
    """Linear layers that read the same input, as one product; peft's LoRA on any of them.

    Holds laid-out copies of the frozen weights, made anew if a weight changes (as when an adapter
    is merged into it); where there is no layout for them, several weights become views of one.
    """

    def __init__(
        self, *modules: nn.Module, owner: nn.Module | None = None, order: Tensor | None = None
    ) -> None:
        """`order` `[sum of out]` rearranges the columns of the result, each within its module."""
        self.modules = modules
        self.order = order
        # peft's layer around a module: merging changes the weight and leaves no trace on it.
        self.owners = modules if owner is None else (owner,)
        self._bases = [_base(module) for module in modules]
        ends = list(accumulate((base.out_features for base in self._bases), initial=0))
        places = zip(modules, map(slice, ends, ends[1:]), strict=True)
        self._adapted: list[tuple[Any, slice]] = [
            (module, columns) for module, columns in places if hasattr(module, "lora_A")
        ]
        self._merging: list[Any] = [one for one in self.owners if hasattr(one, "merged_adapters")]
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
        bases = self._bases
        if self._state() == self._key:
            return
        with torch.no_grad(), torch.inference_mode(False):
            self.forward_weight = pack_weight(self._weight())
            self._backward_weight: Tensor | None = None
            bias: Tensor | None = None
            if any(base.bias is not None for base in bases):
                biases = [
                    b.weight.new_zeros(b.out_features) if b.bias is None else b.bias for b in bases
                ]
                bias = self.ordered(torch.cat(biases))
            self.bias = bias  # at once: another thread may multiply with it
        self._key = self._state()

    def _state(self) -> tuple[Any, ...]:
        weights = [base._parameters["weight"] for base in self._bases]  # a GPU waits for Python
        return (
            *((weight.data_ptr(), weight._version) for weight in weights),
            *(tuple(one.merged_adapters) for one in self._merging),
        )

    def backward_weight(self) -> Tensor:
        """The transposed weight, laid out when a gradient first asks for it: scoring never does."""
        if self._backward_weight is None:
            self._backward_weight = pack_weight(self._weight().t())
        return self._backward_weight

    def _weight(self) -> Tensor:
        bases = self._bases
        weights = [base.weight.detach() for base in bases]
        if available(weights[0].device, weights[0].dtype):
            return self.ordered(torch.cat(weights))
        if len(weights) == 1:
            return self.ordered(weights[0])
        sizes = [len(weight) for weight in weights]
        first, start = weights[0], weights[0].data_ptr()
        places = [start + first[0].nbytes * before for before in accumulate(sizes, initial=0)]
        # a GPU's allocator puts weights side by side that are no part of one
        shared = {weight.untyped_storage().data_ptr() for weight in weights}
        if len(shared) == 1 and [weight.data_ptr() for weight in weights] == places[:-1]:
            whole = first.as_strided((sum(sizes), first.shape[1]), first.stride())
        else:
            whole = torch.cat(weights)
            for base, part in zip(bases, whole.split(sizes), strict=True):
                base.weight.data = part
        return self.ordered(whole)

    def ordered(self, rows: Tensor) -> Tensor:
        """`[sum of out, ...]` in the order of the result."""
        return rows if self.order is None else rows[self.order]

    def unordered(self, columns: Tensor) -> Tensor:
        """`[..., sum of out]` of the result in the order of the modules."""
        if self.order is None:
            return columns
        return torch.empty_like(columns).index_copy_(-1, self.order, columns)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, in]` to `[T, sum of out]`."""
        self._prepare()
        branches = self._branches(x)
        if not branches and not available(x.device, x.dtype):  # keeps nothing of x either
            return F.linear(x, self.forward_weight, self.bias)
        matrices = [m for branch in branches for part in branch.parts for m in (part.a, part.b)]
        result: Tensor = _Projection.apply(x, self, branches, *matrices)
        return result

    def _branches(self, x: Tensor) -> list[Branch]:
        branches: dict[Any, Branch] = {}
        for layer, columns in self._adapted:
            if layer.disable_adapters or layer.merged:
                continue
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
                ranks = slice(branches[key].rank, branches[key].rank + len(a))
                part = Part(columns, ranks, scaling / (1 - p), a, b)
                branches[key].parts.append(part)
        return list(branches.values())


def _base(module: nn.Module) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module


def _kept(dropout: Any, x: Tensor) -> Tensor:
    """What this dropout module keeps of `x`, drawn anew."""
    if hasattr(dropout, "kept"):
        kept: Tensor = dropout.kept(x)
        return kept
    # One draw of torch's generator seeds the mask: reproducible, and saved with torch's state.
    keys = token_keys(torch.randint(2**62, ()), torch.arange(len(x))).to(x.device)
    return keep_mask(keys, 0, x.shape[1], dropout.p, x.dtype)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projection: Projection, branches: Sequence[Branch], *matrices: Tensor
    ) -> Tensor:
        y = matmul(x, projection.forward_weight, projection.bias)
        saved = []
        for branch in branches:
            seen = x
            if branch.kept is not None:
                folded = branch.kept.to(torch.int8)
                seen, branch.kept = branch.kept.mul_(x), folded
            down = branch.down(x.dtype)
            up = projection.ordered(branch.up(y.shape[1], x.dtype))
            low = matmul(seen, down)
            y.addmm_(low, up.t())
            saved += [low, down, up]
        ctx.projection, ctx.branches = projection, branches
        if branches:
            ctx.save_for_backward(x, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx = ctx.needs_input_grad[0]
        dx = matmul(dy, ctx.projection.backward_weight()) if needs_dx else None
        if not ctx.branches:
            return dx, None, None
        x, *saved = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for i, branch in enumerate(ctx.branches):
            low, down, up = saved[3 * i : 3 * i + 3]
            dlow = matmul(dy, up.t().contiguous())
            seen = x
            if branch.kept is not None:
                kept = branch.kept.to(x.dtype)
                if dx is not None:
                    dx.addcmul_(matmul(dlow, down.t().contiguous()), kept)
                seen = kept.mul_(x)
            elif dx is not None:
                dx.addmm_(dlow, down)
            ddown = dlow.t() @ seen
            # the few rows first: four times faster than the other way round
            dup = ctx.projection.unordered(low.t() @ dy)
            for part in branch.parts:
                gradients.append(ddown[part.ranks].to(part.a.dtype))
                scaled = dup[part.ranks, part.columns] * part.scaling
                gradients.append(scaled.to(part.b.dtype).t())
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
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return matmul(dy, ctx.weight.t()), None


class _FastLinear(nn.Linear):
    """A frozen linear layer on `Projection`; for architectures that have no fused layers here."""

    _projection: Projection

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        mine: Any = self.weight  # `in_fp32` puts a tensor here that is gone after the call
        lasting = isinstance(mine, nn.Parameter) and not mine.requires_grad
        if not lasting or not available(input.device, input.dtype):
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
