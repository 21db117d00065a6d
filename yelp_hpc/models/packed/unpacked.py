"""The way of models whose tokens mix outside of attention: each sequence in a row of its own.

A batch in the same form as packed ones becomes rows, padded behind their last token, where nothing
that is wanted can see it, and goes through the model in one call; or row by row, for models in
which rows of a batch touch. Logits are still computed at the wanted positions alone. Greedy
decoding runs rows of equal length together, by transformers' own `generate`: nothing is padded.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from yelp_hpc.models.packed.batch import PackedBatch

ROW: ContextVar[int | None] = ContextVar("yelp_packed_row", default=None)
"""The row that is computed alone; dropout draws its mask."""


def rows_of(batch: PackedBatch) -> tuple[list[Tensor], list[int], list[tuple[int, int]]]:
    """The whole sequences of a packed batch `[T]`, the shared prefix before each.

    Behind a sequence with a tree stands one way from its root to a leaf, in a row for each leaf.
    Returns the rows, the sequence of each, and for each selected position its row and place.
    """
    prefix, *own = batch.input_ids.split([batch.prefix_length, *batch.lengths])
    nodes = len(batch.tree)
    ways = _ways(batch.tree) or [[]]
    first = {node: way for way, path in reversed([*enumerate(ways)]) for node in path}
    rows, owners = [], []
    for i, tokens in enumerate(own):
        start = len(tokens) - nodes
        for path in ways:
            rows.append(torch.cat([prefix, tokens[:start], tokens[start:][path]]))
            owners.append(i)
    starts = list(accumulate(batch.lengths, initial=batch.prefix_length))
    places = []
    for position in batch.select.tolist():
        i = bisect_right(starts, position) - 1
        place, end = position - starts[i], batch.lengths[i] - nodes
        way = first[place - end] if place >= end else 0
        depth = end + ways[way].index(place - end) if place >= end else place
        places.append((i * len(ways) + way, batch.prefix_length + depth))
    return rows, owners, places


def _ways(tree: Sequence[int]) -> list[list[int]]:
    """The nodes from the root to each leaf."""
    found = []
    for leaf in sorted(set(range(len(tree))) - set(tree)):
        path: list[int] = []
        node = leaf
        while node >= 0:
            path.insert(0, node)
            node = tree[node]
        found.append(path)
    return found


def forward_rows(base: Any, batch: PackedBatch, alone: bool = False) -> Tensor:
    """Logits `[S, V]` at `batch.select`; `base` is the model inside peft's wrapper.

    `alone`: a call of the model for each row.
    """
    rows, owners, found = rows_of(batch)
    owner, places = torch.tensor(found, device=batch.input_ids.device).unbind(1)
    if not alone:
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=int(rows[0][-1]))
        return _logits(base, padded, owner, places)
    parts = []
    for i, row in enumerate(rows):
        mine = places[owner == i]
        if not len(mine):
            continue
        token = ROW.set(owners[i])
        try:
            parts.append(_logits(base, row.unsqueeze(0), torch.zeros_like(mine), mine))
        finally:
            ROW.reset(token)
    order = torch.argsort(owner, stable=True)
    return torch.cat(parts)[torch.argsort(order)]


def _logits(base: Any, rows: Tensor, owner: Tensor, places: Tensor) -> Tensor:
    """Logits `[S, V]` of padded rows `[B, W]` at `(owner[i], places[i])`."""
    options: dict[str, Any] = {"use_cache": False}
    wanted, index = places.unique(return_inverse=True)
    taken = inspect.signature(base.forward).parameters
    if "logits_to_keep" in taken:
        options["logits_to_keep"] = wanted
    logits: Tensor = base(input_ids=rows, **options).logits
    if logits.shape[1] != len(wanted):  # a model that gives all
        index = places
    return logits[owner, index]


class _Decided(StoppingCriteria):
    """Ends the rows whose answer nothing can change any more."""

    def __init__(self, start: int, decided: Callable[[list[int]], bool]) -> None:
        self.start, self.decided = start, decided

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        answers = input_ids[:, self.start :].tolist()
        ends = [self.decided(answer) for answer in answers]
        return torch.tensor(ends, device=input_ids.device)


def generate_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    eos_ids: Collection[int],
    max_new_tokens: int,
    decided: Callable[[list[int]], bool],
    device: torch.device,
    alone: bool = False,
) -> list[list[int]]:
    """Greedy new tokens of each prompt, up to an end token (left out) or until `decided`."""
    answers: list[list[int]] = [[] for _ in prompts]
    groups: dict[Any, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((len(prompt), i) if alone else len(prompt), []).append(i)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(eos_ids) or [2**31 - 1],  # None would be filled in from the model's own
        pad_token_id=min(eos_ids, default=0),
    )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, base.generation_config = base.generation_config, settings  # no penalties of its own
    try:
        _generate(model, prompts, groups, settings, eos_ids, decided, device, answers)
    finally:
        base.generation_config = own
    return answers


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    groups: Mapping[Any, list[int]],
    settings: GenerationConfig,
    eos_ids: Collection[int],
    decided: Callable[[list[int]], bool],
    device: torch.device,
    answers: list[list[int]],
) -> None:
    for members in groups.values():
        ids = torch.tensor([list(prompts[i]) for i in members], device=device)
        start = ids.shape[1]
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_Decided(start, decided)]),
        )
        for i, new in zip(members, made[:, start:].tolist(), strict=True):
            for token in new:
                if token in eos_ids:
                    break
                answers[i].append(token)
                if decided(answers[i]):
                    break
