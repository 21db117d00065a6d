"""Packed micro-batches: no padding, the shared prefix computed once, few logits.

`pack` lays sequences one after the other behind the prefix that they share, `prepare_model`
switches a transformers causal LM (with or without peft's LoRA) to attention that keeps them apart,
and `forward_selected` returns the logits of the chosen positions. The model stays numerically the
one it was; its adapters stay peft's. Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from yelp_hpc.models.packed.attention import IMPLEMENTATION, Layout, depths_of, register, use_layout
from yelp_hpc.models.packed.fused import FusedDecoder
from yelp_hpc.models.packed.fused_gpu import GpuDecoder
from yelp_hpc.models.packed.linear import frozen_linear, speed_up_linears
from yelp_hpc.models.packed.unpacked import forward_rows

ModelT = TypeVar("ModelT", bound=nn.Module)
Way = Literal["packed", "rows", "alone"]
"""How sequences go through a model: packed, as rows of a padded batch, or one a call."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of T tokens, batch dimension 1.

    `input_ids` `[T]`: the shared prefix (`prefix_length` tokens, may be 0), then each sequence's
    remainder; `position_ids` `[T]`: 0..P-1, then P..P+len-1 for each sequence; `lengths`: the
    remainders' lengths; `select` `[S]`: the positions in T whose logits are wanted, `selected` of
    them in each sequence; `tree`: the parents of the tree rows at the end of each remainder.
    """

    input_ids: Tensor
    position_ids: Tensor
    prefix_length: int
    lengths: tuple[int, ...]
    select: Tensor
    selected: tuple[int, ...] = ()
    tree: tuple[int, ...] = ()

    @property
    def layout(self) -> Layout:
        """Where its tokens lie."""
        return Layout(self.prefix_length, self.lengths, self.input_ids.device, self.tree)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            select=self.select.to(device),
        )


def pack(
    sequences: Sequence[Sequence[int]],
    prefix_length: int,
    last: int | Sequence[int] = 1,
    *,
    tree: Sequence[int] = (),
    tree_tokens: Sequence[int] = (),
) -> PackedBatch:
    """Pack token sequences that share their first `prefix_length` tokens.

    Selects the last `last` positions of each (one number, or one a sequence). With a tree, its
    tokens follow each sequence and are selected too: node i comes after `tree[i]`, an earlier node
    or, at -1, the sequence, and sees no other branch.

    Raises:
        ValueError: there is no sequence, one does not share the prefix, or one has fewer than
            `last` tokens behind it (a shared position cannot be one sequence's answer).
    """
    if not sequences:
        raise ValueError("nothing to pack: no sequences")
    wanted = [last] * len(sequences) if isinstance(last, int) else list(last)
    if min(wanted) < 1:
        raise ValueError(f"last must be at least 1, not {min(wanted)}")
    depths = depths_of(tree)
    prefix = list(sequences[0][:prefix_length])
    ids, positions = list(prefix), list(range(prefix_length))
    lengths: list[int] = []
    select: list[int] = []
    for i, (sequence, last) in enumerate(zip(sequences, wanted, strict=True)):
        length = len(sequence) - prefix_length
        if length < last:
            raise ValueError(
                f"sequence {i} has {len(sequence)} tokens: too few for a prefix of "
                f"{prefix_length} and {last} selected"
            )
        if list(sequence[:prefix_length]) != prefix:
            raise ValueError(
                f"sequence {i} does not share the first {prefix_length} tokens with sequence 0"
            )
        ids += sequence[prefix_length:]
        positions += range(prefix_length, prefix_length + length)
        start = len(ids) - last
        ids += tree_tokens
        positions += [prefix_length + length + depth for depth in depths]
        lengths.append(length + len(depths))
        select += range(start, len(ids))
    return PackedBatch(
        torch.tensor(ids),
        torch.tensor(positions),
        prefix_length,
        tuple(lengths),
        torch.tensor(select),
        tuple(last + len(depths) for last in wanted),
        tuple(tree),
    )


def prepare_model(model: ModelT, *, fused: bool = True, way: Way = "packed") -> ModelT:
    """Switch a transformers causal LM (or peft's wrapper of one) to packed attention.

    `forward_selected` needs it. Ordinary calls (`generate`, padded batches) work as before. `fused`
    also replaces arithmetic by faster, equal one where the architecture is known. `way`: how
    `proof.prove` found that the model must be computed; unpacked it stays as it is. Returns the
    same model.
    """
    base = base_model(model)
    own = _own_attention.setdefault(base, base.config._attn_implementation)
    _ways[base] = way
    if way != "packed":
        _decoders.pop(base, None)
        base.config._attn_implementation = own
        return model
    register()
    base.config._attn_implementation = IMPLEMENTATION
    # Held outside of the module's state: it is no parameter, and deep copies must make their own.
    on_gpu = base.get_input_embeddings().weight.is_cuda
    if fused and FusedDecoder.supports(base):
        _decoders[base] = FusedDecoder(base.get_decoder())
    elif fused and on_gpu and GpuDecoder.supports(base):
        _decoders[base] = GpuDecoder(base)
    else:
        _decoders.pop(base, None)
        if fused:
            speed_up_linears(base)
    return model


_decoders: WeakKeyDictionary[nn.Module, FusedDecoder | GpuDecoder] = WeakKeyDictionary()
_ways: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()
_own_attention: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def by_its_own_code(model: nn.Module) -> Iterator[None]:
    """Have the model's own modules compute packed batches inside the block, no fused form."""
    base = base_model(model)
    decoder = _decoders.pop(base, None)
    try:
        yield
    finally:
        if decoder is not None:
            _decoders[base] = decoder


def way_of(model: nn.Module) -> Way:
    """How `forward_selected` takes sequences through a prepared model.

    Raises ValueError for one that is not prepared.
    """
    way = _ways.get(base_model(model))
    if way is None:
        raise ValueError("the model is not prepared: call prepare_model(model) first")
    return way


def base_model(model: nn.Module) -> Any:
    """The transformers model inside peft's wrapper, or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else model


def forward_selected(
    model: nn.Module, batch: PackedBatch, vocabulary: Tensor | None = None
) -> Tensor:
    """Logits `[S, V]` at `batch.select`; with `vocabulary`, `[S, its length]` of these rows."""
    base, way = base_model(model), way_of(model)
    if way != "packed":
        logits = forward_rows(base, batch, way == "alone")
        return logits if vocabulary is None else logits.index_select(1, vocabulary)
    layout = batch.layout
    decoder = _decoders.get(base)
    if decoder is not None:
        hidden = decoder(batch.input_ids, batch.position_ids, layout, batch.select)
        weight = base.get_output_embeddings().weight
        return frozen_linear(hidden, weight if vocabulary is None else weight[vocabulary])
    with use_layout(layout):
        output = base(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.select,
            packed=layout,
        )
    logits = cast(Tensor, output.logits[0])
    if len(logits) != len(batch.select):  # a model that gives all
        logits = logits.index_select(0, batch.select)
    return logits if vocabulary is None else logits.index_select(1, vocabulary)


def prefill(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits `[S, V]` at `batch.select`; each layer's keys and values `[T, groups, head_dim]`."""
    base = base_model(model)
    if way_of(model) != "packed":
        raise ValueError("the model is not packed: its keys and values cannot be laid out as rows")
    layout = batch.layout
    states: list[tuple[Tensor, Tensor]] = []
    decoder = _decoders.get(base)
    if decoder is not None:
        hidden = decoder(batch.input_ids, batch.position_ids, layout, batch.select, states)
        return frozen_linear(hidden, base.get_output_embeddings().weight), states
    cache = DynamicCache()
    with use_layout(layout):
        output = base(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=batch.select,
            packed=layout,
        )
    layers: Any = cache.layers
    for layer in layers:
        states.append((layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)))
    return output.logits[0], states
