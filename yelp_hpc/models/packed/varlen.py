"""Packed attention by torch's variable-length kernel, which takes the tokens as they are (CUDA).

Reads and writes tensors only.
"""

from __future__ import annotations

from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from yelp_hpc.progress import say


def attend_varlen(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: tuple[Tensor | None, Tensor, Tensor, int, int],
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """Packed attention through a kernel with `torch.nn.attention.varlen.varlen_attn`'s signature.

    `[T, heads, head_dim]`, fewer key and value heads allowed; `places`: of `Layout.varlen`.
    With a `window` a query sees itself and the `window - 1` keys before it.
    """
    key_tokens, cu_q, cu_k, max_q, max_k = places
    if key_tokens is not None:
        key, value = key.index_select(0, key_tokens), value.index_select(0, key_tokens)
    out: Tensor = kernel(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        cu_q,
        cu_k,
        max_q,
        max_k,
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
