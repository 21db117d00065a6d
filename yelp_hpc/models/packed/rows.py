"""Attention of a packed micro-batch on the CPU, forward and backward, as few large products.

Sequences of similar length are computed together. Their queries go in blocks, each against the
keys up to its end, so that little of the causal square's masked half is computed; the query heads
that share a key head lie below each other in one matrix. torch's flash kernel for CPUs multiplies
one head of one row at a time, at a third of the rate. Reads and writes tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from yelp_hpc.models.packed.attention import Layout

# Queries of a block. A block's masked part is half a square of this side: the smaller the less is
# wasted and the slower each product.
_BLOCK = 64
# Rows up to this many tokens keep their probabilities for the backward pass, longer ones compute
# them anew: these grow with the square of the length.
_KEPT_WIDTH = 512


@dataclass(frozen=True)
class _Block:
    """Queries computed together: some tokens of each of a group's sequences, of every head."""

    rows: slice
    """Its rows among all gathered queries."""
    height: int
    """Rows of one key head and sequence: query heads that share the key head, times tokens."""
    seen: int
    """Keys that its last query sees."""
    hidden: Tensor
    """Minus infinity where a query may not see one of the last keys: `[tokens, last keys]`, of a
    tree's rows `[sequences, 1, tokens, last keys]`."""


@dataclass(frozen=True)
class _Group:
    """Sequences computed together, padded to one length."""

    count: int
    prefix: int
    batch: int
    """Key heads times sequences."""
    seen: int
    """Keys of a sequence: the prefix, its own tokens and the tree's."""
    blocks: list[_Block]
    keys: slice
    """Its rows among all gathered operands."""
    values: slice


class RowPlan:
    """Where each head of each token stands in the products' operands; made once a micro-batch.

    The operands are gathered from `[T * (heads + 2 * groups), head_dim]`: all queries (of a group,
    of a block: `[key heads, sequences, query heads of a key head, tokens]`), then all keys (of a
    group: `[key heads, sequences, prefix + tokens]`), then all values.
    """

    def __init__(self, layout: Layout, heads: int, key_heads: int) -> None:
        self.heads, self.key_heads = heads, key_heads
        self.shared = heads // key_heads
        self.has_prefix = layout.prefix_length > 0
        self.has_tree = bool(layout.tree)
        nodes = len(layout.tree)
        every = heads + 2 * key_heads
        head = torch.arange(key_heads)[:, None]
        query_head = (head * self.shared + torch.arange(self.shared)).view(key_heads, 1, -1, 1)
        queries, keys, real_queries, real_keys = [], [], [], []
        sizes: list[_Size] = []
        members = [[-1]] if layout.prefix_length else []
        for rows in [*members, *layout.grouped]:
            prefix = 0 if rows == [-1] else layout.prefix_length
            starts = [0 if i < 0 else layout.starts[i] for i in rows]
            lengths = [layout.prefix_length if i < 0 else layout.lengths[i] - nodes for i in rows]
            width, behind = max(lengths), 0 if rows == [-1] else nodes
            sizes.append(_Size(prefix, width, tuple(lengths), behind))
            length = torch.tensor(lengths)[:, None]
            place = torch.arange(width)
            real = place < length
            # padding repeats the last token
            own = torch.tensor(starts)[:, None] + torch.minimum(place, length - 1)
            for begin, end in _cuts(width):
                block = own[:, begin:end].view(1, len(rows), 1, -1) * every + query_head
                queries.append(block.flatten())
                real_queries.append(
                    real[:, begin:end].view(1, len(rows), 1, -1).expand(block.shape).flatten()
                )
            tree = torch.tensor(starts)[:, None] + length + torch.arange(behind)
            for begin, end in _cuts(behind):
                block = tree[:, begin:end].view(1, len(rows), 1, -1) * every + query_head
                queries.append(block.flatten())
                real_queries.append(torch.ones(block.numel(), dtype=torch.bool))
            before = torch.arange(prefix).expand(len(rows), -1)
            tokens = torch.cat([before, own, tree], 1).expand(key_heads, -1, -1)
            keys.append((tokens * every + (heads + head)[:, :, None]).flatten())
            # the prefix's own group answers for its gradient, to which the others' is added
            shared = torch.zeros_like(before, dtype=torch.bool)
            answers = torch.cat([shared, real, torch.ones_like(tree, dtype=torch.bool)], 1)
            real_keys.append(answers.expand(tokens.shape).flatten())
        query, key = torch.cat(queries), torch.cat(keys)
        self.query_rows = len(query)
        self.groups = self._groups(sizes, len(key), layout.branches)
        self.gather = torch.cat([query, key, key + key_heads])
        real_query, real_key = torch.cat(real_queries), torch.cat(real_keys)
        self.padding = (~real_query).nonzero()[:, 0]
        valid = torch.cat([real_query, real_key, real_key])
        self.place = torch.empty(layout.total * every, dtype=torch.int64)
        self.place[self.gather[valid]] = valid.nonzero()[:, 0]
        # the same for the result, which has no heads of keys and values
        self.place_out = self.place.view(layout.total, every)[:, :heads].flatten()
        self.gather_out = query // every * heads + query % every

    def _groups(self, sizes: list[_Size], key_rows: int, branches: Tensor) -> list[_Group]:
        """The groups of these sizes."""
        masks: dict[int, Tensor] = {}
        groups: list[_Group] = []
        at, keys = 0, self.query_rows
        for size in sizes:
            prefix, width, count = size.prefix, size.width, len(size.lengths)
            batch = self.key_heads * count
            blocks = []
            for begin, end in _cuts(width):
                tokens = end - begin
                if tokens not in masks:
                    masks[tokens] = torch.full((tokens, tokens), float("-inf")).triu_(1)
                height = self.shared * tokens
                rows = slice(at, at + batch * height)
                blocks.append(_Block(rows, height, prefix + end, masks[tokens]))
                at = rows.stop
            for begin, end in _cuts(size.tree):
                height = self.shared * (end - begin)
                rows = slice(at, at + batch * height)
                hidden = _branches_hidden(size, branches[begin:end, :end])
                blocks.append(_Block(rows, height, prefix + width + end, hidden))
                at = rows.stop
            seen = prefix + width + size.tree
            own = slice(keys, keys + batch * seen)
            values = slice(own.start + key_rows, own.stop + key_rows)
            groups.append(_Group(count, prefix, batch, seen, blocks, own, values))
            keys = own.stop
        return groups


@dataclass(frozen=True)
class _Size:
    """A group's measures, in tokens: each sequence's own, without the prefix and the tree."""

    prefix: int
    width: int
    lengths: tuple[int, ...]
    tree: int


def _branches_hidden(size: _Size, branches: Tensor) -> Tensor:
    """What some rows of the tree may not see: the padding before it and other branches."""
    padded = size.width - min(size.lengths)
    place = torch.arange(padded) + min(size.lengths)
    padding = place >= torch.tensor(size.lengths)[:, None]
    tokens, nodes = branches.shape
    hidden = torch.zeros(len(size.lengths), 1, tokens, padded + nodes)
    hidden[..., :padded].masked_fill_(padding[:, None, None], float("-inf"))
    hidden[..., padded:].masked_fill_(~branches, float("-inf"))
    return hidden


def _cuts(width: int) -> list[tuple[int, int]]:
    """Begin and end of each block of queries among `width` tokens; [] for none."""
    if not width:
        return []
    count = -(-width // _BLOCK)
    edges = [round(i * width / count) for i in range(count + 1)]
    return list(pairwise(edges))


def rows_forward(
    states: Tensor, plan: RowPlan, scale: float, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Packed attention without autograd.

    `states` `[T, heads + 2 * groups, head_dim]` holds queries, keys and values side by side.
    Returns `[T, heads, head_dim]` and, if `keep`, what `rows_backward` needs.
    """
    if keep and plan.has_tree:
        raise NotImplementedError("a tree of answers is scored, never trained")
    operands = states.view(-1, states.shape[-1]).index_select(0, plan.gather)
    out = torch.empty_like(operands[: plan.query_rows])
    saved = [operands]
    for group in plan.groups:
        keys, values = _of(group, operands)
        for block in group.blocks:
            query = operands[block.rows].view(group.batch, block.height, -1)
            share = _probabilities(plan, block, query, keys[:, : block.seen], scale)
            torch.bmm(share, values[:, : block.seen], out=out[block.rows].view(query.shape))
            if keep and group.seen <= _KEPT_WIDTH:
                saved.append(share)
    joined = out.index_select(0, plan.place_out)
    return joined.view(states.shape[0], plan.heads, -1), saved if keep else []


def rows_backward(dout: Tensor, plan: RowPlan, scale: float, saved: list[Tensor]) -> Tensor:
    """The gradient of `states` of `rows_forward`, given that of its result."""
    operands = saved[0]
    kept = iter(saved[1:])
    head_dim = operands.shape[-1]
    gradients = torch.empty_like(operands)
    dqueries = dout.reshape(-1, head_dim).index_select(0, plan.gather_out)
    if len(plan.padding):
        dqueries.index_fill_(0, plan.padding, 0.0)
    first: tuple[Tensor, Tensor] | None = None
    for group in plan.groups:
        keys, values = _of(group, operands)
        dkeys, dvalues = _of(group, gradients)
        shares = [next(kept) if group.seen <= _KEPT_WIDTH else None for _ in group.blocks]
        # the last block sees all keys: it writes the gradients that the others add to
        for block, share in zip(group.blocks[::-1], shares[::-1], strict=True):
            query = operands[block.rows].view(group.batch, block.height, -1)
            dout_block = dqueries[block.rows].view(query.shape)
            key, value = keys[:, : block.seen], values[:, : block.seen]
            if share is None:
                share = _probabilities(plan, block, query, key, scale)
            dscore = torch.bmm(dout_block, value.transpose(1, 2)).mul_(share)
            # softmax's own backward rounds otherwise with another number of threads
            dscore.addcmul_(share, dscore.sum(-1, keepdim=True), value=-1)
            dquery = gradients[block.rows].view(query.shape)
            dquery.baddbmm_(dscore, key, beta=0, alpha=scale)
            if block.seen == group.seen:
                torch.bmm(share.transpose(1, 2), dout_block, out=dvalues)
                dkeys.baddbmm_(dscore.transpose(1, 2), query, beta=0, alpha=scale)
            else:
                dvalues[:, : block.seen].add_(torch.bmm(share.transpose(1, 2), dout_block))
                dkeys[:, : block.seen].add_(torch.bmm(dscore.transpose(1, 2), query), alpha=scale)
        if group.prefix and first is not None:
            for total, part in zip(first, (dkeys, dvalues), strict=True):
                shape = (plan.key_heads, group.count, -1, head_dim)
                total.add_(part.view(shape)[:, :, : group.prefix].sum(1))
        elif plan.has_prefix:
            first = dkeys, dvalues
    return gradients.index_select(0, plan.place).view(len(dout), -1, head_dim)


def _of(group: _Group, operands: Tensor) -> tuple[Tensor, Tensor]:
    """Views `[key heads * sequences, prefix + tokens, head_dim]` of a group's keys and values."""
    shape = (group.batch, group.seen, -1)
    return operands[group.keys].view(shape), operands[group.values].view(shape)


def _probabilities(
    plan: RowPlan, block: _Block, query: Tensor, key: Tensor, scale: float
) -> Tensor:
    """Attention of a block's queries to the keys up to its last one, `[batch, height, seen]`."""
    scores = query.new_empty(len(query), block.height, block.seen)
    scores.baddbmm_(query, key.transpose(1, 2), beta=0, alpha=scale)
    tokens, last = block.hidden.shape[-2:]
    # every query sees all keys but the last ones, of its own block
    shape = (plan.key_heads, -1, plan.shared, tokens, block.seen)
    scores.view(shape)[..., block.seen - last :].add_(block.hidden)
    return torch.softmax(scores, -1)
