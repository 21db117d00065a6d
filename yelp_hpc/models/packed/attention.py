"""Attention over a packed micro-batch: every sequence sees the shared prefix and itself.

Registers `yelp_packed` with transformers, so that any decoder whose attention goes through
`ALL_ATTENTION_FUNCTIONS` runs on packed tokens unchanged. On the CPU the sequences are laid out as
causal rows `[prefix; own tokens; padding]` in groups of similar length (padding stands behind the
tokens, so the causal mask alone hides it); on CUDA torch's variable-length kernel takes the tokens
as they are. Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yelp_hpc.models.packed.varlen import Places, attend_varlen, varlen_kernel

IMPLEMENTATION = "yelp_packed"

# A group of rows is worth its padding up to this share: one kernel call on 8 rows costs less than 8
# calls, but padded tokens cost attention like any other.
_PADDING_ALLOWED = 0.04


@dataclass(frozen=True)
class Band:
    """How far back a row's tokens see: a window or chunk of `size` tokens, in a row of its own."""

    size: int
    chunked: bool
    mask: Tensor
    """`[1, 1, longest row, longest row]`, true where a query sees a key."""


def _near(query: Tensor, key: Tensor, size: int, chunked: bool) -> Tensor:
    """Whether positions lie in one chunk, or a key at most `size - 1` before a query."""
    return query // size == key // size if chunked else key > query - size


def depths_of(tree: Sequence[int]) -> list[int]:
    """How deep each node stands, 0 for one without a parent; `tree`: each node's parent or -1."""
    depths: list[int] = []
    for parent in tree:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


class Layout:
    """Where the tokens of a packed micro-batch lie.

    `prefix_length` shared tokens come first, then `lengths[i]` tokens of each sequence. Index
    tensors are made from it once and used by every layer.
    """

    def __init__(
        self,
        prefix_length: int,
        lengths: tuple[int, ...],
        device: torch.device,
        tree: tuple[int, ...] = (),
    ) -> None:
        self.prefix_length = prefix_length
        self.lengths = lengths
        self.device = device
        self.tree = tree
        self.total = prefix_length + sum(lengths)
        self.starts = [prefix_length]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
        self._bands: dict[tuple[int, bool], Band] = {}
        self._seen: dict[tuple[int, bool], list[Tensor | None]] = {}

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.prefix_length + max(self.lengths)

    def band(self, size: int, chunked: bool) -> Band | None:
        """The band of a window or chunk; None where no row reaches its edge."""
        if self.longest <= size:
            return None
        if (size, chunked) not in self._bands:
            place = torch.arange(self.longest, device=self.device)
            near = _near(place[:, None], place, size, chunked)
            mask = (place <= place[:, None]) & near
            self._bands[size, chunked] = Band(size, chunked, mask[None, None])
        return self._bands[size, chunked]

    def seen(self, band: Band | None) -> list[Tensor | None]:
        """`masks` within a band: bool `[rows or 1, 1, width, width]`, None where causality is all.

        A band counts positions, which branches of a tree share.
        """
        if band is None:
            return self.masks
        key = (band.size, band.chunked)
        if key not in self._seen:
            depths = depths_of(self.tree)
            found: list[Tensor | None] = []
            for group, mask in zip(self.grouped, self.masks, strict=True):
                width = self.prefix_length + self.lengths[group[0]]
                if mask is None:
                    found.append(band.mask[..., :width, :width])
                    continue
                place = torch.arange(width).repeat(len(group), 1)
                for row, i in zip(place, group, strict=True):
                    stop = self.prefix_length + self.lengths[i]
                    start = stop - len(depths)
                    row[start:stop] = start + torch.tensor(depths)
                place = place.to(self.device)
                near = _near(place[:, :, None], place[:, None, :], *key)
                found.append(mask & near.unsqueeze(1))
            self._seen[key] = found
        return self._seen[key]

    def band_of(self, mask: Tensor | None) -> Band | None:
        """The band whose mask, or a slice of it, a model hands to its attention."""
        if mask is None:
            return None
        bands = self._bands.values()
        return next((b for b in bands if b.mask.data_ptr() == mask.data_ptr()), None)

    @cached_property
    def grouped(self) -> list[list[int]]:
        """Sequences of similar length, longest first.

        As rows of one width they are padded by at most the share allowed.
        """
        order = sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i))
        groups: list[list[int]] = []
        for i in order:
            width = self.prefix_length + self.lengths[groups[-1][0] if groups else i]
            if groups and self._padding([*groups[-1], i], width) <= _PADDING_ALLOWED:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    @cached_property
    def groups(self) -> list[tuple[Tensor, int, int]]:
        """Rows for a padded causal kernel: `(tokens, rows, width)`.

        `tokens` is `[rows * width]` positions in T. Padding repeats the row's last token.
        """
        return [self._rows(group) for group in self.grouped]

    @cached_property
    def branches(self) -> Tensor:
        """`[nodes, nodes]`, whether a tree row sees another: itself and those on its way."""
        seen = torch.eye(len(self.tree), dtype=torch.bool)
        for node, parent in enumerate(self.tree):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For each group what its rows see, bool `[rows, 1, width, width]`.

        None without a tree: causality says it all.
        """
        if not self.tree:
            return [None] * len(self.grouped)
        nodes = len(self.tree)
        found: list[Tensor | None] = []
        for group in self.grouped:
            width = self.prefix_length + self.lengths[group[0]]
            mask = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(group), 1, 1, 1)
            for row, i in zip(mask, group, strict=True):
                stop = self.prefix_length + self.lengths[i]
                row[0, stop - nodes : stop, stop - nodes : stop] = self.branches
            found.append(mask.to(self.device))
        return found

    def _padding(self, group: list[int], width: int) -> float:
        used = sum(self.prefix_length + self.lengths[i] for i in group)
        return 1 - used / (width * len(group))

    def _rows(self, group: list[int]) -> tuple[Tensor, int, int]:
        width = self.prefix_length + self.lengths[group[0]]
        tokens: list[int] = []
        for i in group:
            tokens += range(self.prefix_length)
            tokens += range(self.starts[i], self.starts[i + 1])
            tokens += [self.starts[i + 1] - 1] * (width - self.prefix_length - self.lengths[i])
        return torch.tensor(tokens, device=self.device), len(group), width

    @cached_property
    def scatter(self) -> Tensor:
        """For every token of T, its place in the concatenation of all groups' rows; shape `[T]`."""
        place = torch.empty(self.total, dtype=torch.int64, device=self.device)
        rows = torch.cat([tokens for tokens, _, _ in self.groups])
        # Written backwards, the first occurrence wins: the token itself and not its copy as
        # padding.
        order = torch.arange(len(rows) - 1, -1, -1, device=self.device)
        place.scatter_(0, rows.flip(0), order)
        return place

    @cached_property
    def varlen(self) -> Places:
        """For a variable-length kernel, causal from the lower right.

        Queries are the T tokens in order: the prefix, then each sequence. Keys of each sequence are
        the prefix and its own; without a prefix the keys are the T tokens too.
        """
        prefix = self.prefix_length
        queries = [prefix, *self.lengths] if prefix else list(self.lengths)
        keys = [prefix, *(prefix + n for n in self.lengths)] if prefix else list(self.lengths)
        gather = None
        if prefix:
            tokens, shared, own = list(range(prefix)), list(range(prefix)), list[int]()
            for start, length in zip(self.starts, self.lengths, strict=False):
                shared += range(len(tokens), len(tokens) + prefix)
                own += range(len(tokens) + prefix, len(tokens) + prefix + length)
                tokens += [*range(prefix), *range(start, start + length)]
            every = torch.tensor([*tokens, *shared, *own]).to(self.device)
            gather = tuple(every.split([len(tokens), len(shared), len(own)]))

        def ends(lengths: list[int]) -> Tensor:
            return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(self.device, torch.int32)

        return Places(gather, ends(queries), ends(keys), max(queries), max(keys))


# Models that hand their keyword arguments on get the layout as `packed`, which survives the second
# forward of gradient checkpointing; the context variable serves those that do not.
_layout: ContextVar[Layout | None] = ContextVar("yelp_packed_layout", default=None)


@contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Make `layout` the one that `packed_attention` uses inside the block."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The interface of transformers: `[1, heads, T, head_dim]` in, `[1, T, heads, head_dim]` out.

    Outside a packed forward it is transformers' own sdpa, or what that lacks: `softcap`, and the
    sinks `s_aux` `[heads]`, as in transformers' eager attention.
    """
    layout = packed if packed is not None else _layout.get()
    softcap, sinks = kwargs.pop("softcap", None), kwargs.get("s_aux")
    plain = softcap is None and sinks is None
    if layout is None and plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if layout is None:
        visible = attention_mask
        if visible is None:
            seen, own = key.shape[2], query.shape[2]
            ones = torch.ones(own, seen, dtype=torch.bool, device=query.device)
            visible = ones.tril(seen - own)
        out = attend_explicitly(query, key, value, visible, scaling, dropout, softcap, sinks)
        return out.transpose(1, 2), None
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    band = layout.band_of(attention_mask)
    out = attend(q, k, v, layout, scaling, dropout, band=band, softcap=softcap, sinks=sinks)
    return out.unsqueeze(0), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float | None,
    dropout: float = 0.0,
    *,
    band: Band | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Packed attention on `[T, heads, head_dim]`, fewer key and value heads allowed.

    Returns the same shape as `query`.
    """
    plain = softcap is None and sinks is None
    half = query.dtype in (torch.float16, torch.bfloat16)
    fits = dropout == 0.0 and plain and not layout.tree and not (band and band.chunked)
    if query.is_cuda and half and fits and key.shape[-1] == value.shape[-1]:
        kernel = varlen_kernel(query.device, query.shape[-1], query.dtype)
        if kernel is not None:
            window = None if band is None else band.size
            return attend_varlen(kernel, query, key, value, layout.varlen, scale, window)
    heads = query.shape[1]
    gqa = heads != key.shape[1]
    outputs = []
    for (tokens, rows, width), mask in zip(layout.groups, layout.seen(band), strict=True):
        q, k, v = (
            states.index_select(0, tokens).view(rows, width, *states.shape[1:]).transpose(1, 2)
            for states in (query, key, value)
        )
        if plain:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=gqa
            )
        else:
            if mask is None:
                mask = torch.ones(width, width, dtype=torch.bool, device=q.device).tril()
            out = attend_explicitly(q, k, v, mask, scale, dropout, softcap, sinks)
        outputs.append(out.transpose(1, 2).reshape(rows * width, heads, -1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, layout.scatter)


def attend_explicitly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what the kernels lack: capped scores, and sinks.

    A cap makes `softcap * tanh(scores / softcap)` of scores; a head's sink takes its share and
    gives nothing (Xiao et al. 2023). Shapes are `[rows, heads, tokens, head_dim]`, fewer key and
    value heads allowed; `mask` is true, or zero, where a query sees a key.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(shared, 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask[..., : scores.shape[-1]]
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    share = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        share = share[..., :-1]
    return F.dropout(share, dropout) @ value


def _packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Inside a packed forward the mask of a window or chunk alone, elsewhere that of sdpa."""
    layout = _layout.get()
    if layout is None:
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    size = kwargs.get("local_size")
    if size is None:
        return None
    chunked = getattr(kwargs.get("config"), "attention_chunk_size", None) == size
    band = layout.band(size, chunked)
    return None if band is None else band.mask


def register() -> None:
    """Make `yelp_packed` an attention implementation of transformers (idempotent)."""
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _packed_mask)
