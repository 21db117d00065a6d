"""Packed attention by torch's variable-length kernel, which takes the tokens as they are (CUDA).

Reads and writes tensors only.
"""

from __future__ import annotations

from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yelp_hpc.progress import say


class Places(NamedTuple):
    """Where a packed micro-batch's sequences lie for the kernel: of `Layout.varlen`."""

    gather: tuple[Tensor, ...] | None
    """The token of each key, `[K]`; where the keys hold the prefix again and again, `[rows + 1
    times prefix]`; where each other token, `[T - prefix]`. None: the keys are the tokens."""
    query_ends: Tensor
    """`[rows + 1]` or, with a prefix, which is a row itself, `[rows + 2]`; int32."""
    key_ends: Tensor
    most_queries: int
    most_keys: int


class _Keys(torch.autograd.Function):
    """Keys or values of each row: `states` `[T, heads, head_dim]`, the prefix before each row.

    Its gradient is gathered, too, and summed over the rows in their order: of an index with
    repetitions torch makes a sort, many kernels, where results must repeat.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, *gather: Tensor) -> Tensor:
        ctx.gather, ctx.prefix = gather, len(states) - len(gather[2])
        return states.index_select(0, gather[0])

    @staticmethod
    def backward(ctx: Any, dkeys: Tensor) -> tuple[Tensor | None, ...]:
        _, shared, own = ctx.gather
        prefix = dkeys.index_select(0, shared).view(-1, ctx.prefix, *dkeys.shape[1:]).sum(0)
        return torch.cat([prefix, dkeys.index_select(0, own)]), None, None, None


def attend_varlen(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Places,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """Packed attention through a kernel with `torch.nn.attention.varlen.varlen_attn`'s signature.

    `[T, heads, head_dim]`, fewer key and value heads allowed.
    With a `window` a query sees itself and the `window - 1` keys before it.
    """
    gather, *ends_and_most = places
    if gather is not None:
        key, value = (_Keys.apply(states, *gather) for states in (key, value))
    out: Tensor = kernel(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        *ends_and_most,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


@cache
def varlen_kernel(device: torch.device, head_dim: int, dtype: torch.dtype) -> Any:
    """torch's variable-length attention, or None where it does not run; tried once a process."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        kernel: Any = varlen_attn
        if "enable_gqa" not in signature(varlen_attn).parameters:
            kernel = partial(_without_gqa, varlen_attn)  # torch 2.11
        ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        made = torch.zeros(8, 4, head_dim, dtype=dtype, device=device, requires_grad=True)
        options: Any = {"scale": 1.0, "window_size": (-1, 0), "enable_gqa": True}
        with torch.enable_grad():
            few = made[:, :2]
            kernel(made, few, few, ends, ends, 5, 5, **options).sum().backward()
    except Exception as error:  # the import, the signature, the card, the head size, the format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        say(f"attention: padded rows, for torch's variable-length kernel does not run: {reason}")
        return None
    return kernel


def _without_gqa(kernel: Any, *states: Any, enable_gqa: bool, **options: Any) -> Any:
    """The kernel of a torch that takes fewer key and value heads without being told."""
    return kernel(*states, **options)
