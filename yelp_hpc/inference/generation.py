"""Generate mode: greedy decoding in batches, stopped as soon as every answer is decided.

The prompts of a batch run once, packed behind the prefix that they share (`models/packed/`).
Their keys and values are then laid out as rows padded on the left, each row with its own positions,
and decoded a token at a time. Rows that have ended leave the batch. The tokens of a row are those
of transformers' greedy `generate` on that row alone, up to where it was stopped: before an end
token, after `max_new_tokens`, or once `decided` says that nothing that follows can change the
meaning. Takes a prepared model and token ids; reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from yelp_hpc.errors import RequestError
from yelp_hpc.models.packed.batch import PackedBatch, Way, pack, prefill, way_of
from yelp_hpc.models.packed.proof import PREFIX, rows
from yelp_hpc.models.packed.unpacked import generate_rows

# Padding costs no arithmetic in the prompt's pass, only memory of keys and values: at most as much
# again as the tokens need.
PADDING_ALLOWED = 0.5

Next = tuple[int, Sequence[int]]
"""A row's next token, and after which of its earlier ones, counted from 0, it comes."""


def plan_batches(lengths: Sequence[int], max_tokens: int, prefix_length: int) -> list[list[int]]:
    """Group prompts (by index; `lengths` without the prefix), longest first, for padded batches.

    `prefix_length` counts once a row, for each row keeps its own copy of the prefix's keys and
    values. A batch holds at most `max_tokens` so counted, padding included, and at most
    `PADDING_ALLOWED` of its tokens are padding. A longer prompt is a batch of its own.
    Deterministic.
    """
    batches: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches:
            longest, rows = lengths[batches[-1][0]], len(batches[-1]) + 1
            padding = 1 - (used + lengths[i]) / (longest * rows)
            if rows * (prefix_length + longest) <= max_tokens and padding <= PADDING_ALLOWED:
                batches[-1].append(i)
                used += lengths[i]
                continue
        batches.append([i])
        used = lengths[i]
    return batches


class GreedyDecoder:
    """Greedy decoding of prompts that share a prefix, by a model that `prepare_model` prepared.

    `decided` gets the tokens generated so far for a row and says whether they are enough.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix_length: int,
        eos_ids: Collection[int],
        max_new_tokens: int,
        decided: Callable[[list[int]], bool],
        device: torch.device | str = "cpu",
        way: Way | None = None,
    ) -> None:
        """`way`: None for that of the model."""
        self.model: Any = model
        self.way = way or way_of(model)
        self.prefix_length = prefix_length
        self.eos_ids = frozenset(eos_ids)
        self.max_new_tokens = max_new_tokens
        self.decided = decided
        self.device = torch.device(device)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The new tokens of each prompt, the end token left out.

        Raises:
            ValueError: a prompt does not begin with the prefix, or has nothing behind it.
        """
        if self.way != "packed":
            return generate_rows(
                self.model,
                prompts,
                self.eos_ids,
                self.max_new_tokens,
                self.decided,
                self.device,
                self.way == "alone",
            )
        answers: list[list[int]] = [[] for _ in prompts]

        def take(logits: Tensor, rows: list[int]) -> list[Next | None]:
            """Append each row's token to its answer, or end the row."""
            following: list[Next | None] = []
            for row, token in zip(rows, logits.argmax(dim=-1).tolist(), strict=True):
                before = range(len(answers[row]))
                ended = token in self.eos_ids
                if not ended:
                    answers[row].append(token)
                    ended = self.decided(answers[row])
                following.append(None if ended else (token, before))
            return following

        packed = pack(prompts, self.prefix_length).to(self.device)
        decode(self.model, packed, self.max_new_tokens, take)
        return answers


def decode(
    model: Any,
    packed: PackedBatch,
    steps: int,
    take: Callable[[Tensor, list[int]], list[Next | None]],
) -> None:
    """Run packed prompts, then a token a row and step, at most `steps` times in all.

    `take` gets the logits `[rows, V]` of some prompts' newest tokens and which prompts they are,
    and says what follows each; None where that prompt has ended: it is not asked of it again.
    """
    logits, states = prefill(model, packed)
    rows = list(range(len(logits)))  # the prompt that each row of the batch decodes
    following = take(logits, rows)
    if steps == 1 or not any(following):
        return
    cache, mask = padded_cache(packed, states)
    lengths = (packed.position_ids[packed.select] + 1).tolist()
    for step in range(1, steps):
        going = [i for i, one in enumerate(following) if one is not None]
        # A copy of the cache pays when it halves the batch.
        if len(going) <= len(rows) // 2:
            kept = torch.tensor(going, device=mask.device)
            cache.batch_select_indices(kept)
            mask, rows = mask[kept], [rows[i] for i in going]
            following, going = [following[i] for i in going], list(range(len(going)))
        tokens, positions = torch.zeros(2, len(rows), 1, dtype=torch.long)
        own = torch.zeros(len(rows), step, dtype=torch.long)
        for i, one in enumerate(following):
            token, before = one or (0, range(step - 1))
            tokens[i], positions[i] = token, lengths[rows[i]] + len(before)
            own[i, [*before, step - 1]] = 1
        output = model(
            input_ids=tokens.to(mask.device),
            attention_mask=torch.cat([mask, own.to(mask.device)], dim=1),
            position_ids=positions.to(mask.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        asked = torch.tensor(going, device=mask.device)
        taken = take(output.logits[asked, -1], [rows[i] for i in going])
        following = [None] * len(rows)
        for i, one in zip(going, taken, strict=True):
            following[i] = one
        if not any(following):
            break


def generation_way(model: nn.Module) -> Way:
    """How a prepared model's first six tokens are those that it gives alone: its own way, or rows.

    Raises:
        RequestError: it writes nothing even alone.
    """
    texts, device = rows(), next(model.parameters()).device

    def answers(way: Way) -> list[list[int]]:
        decoder = GreedyDecoder(model, PREFIX, (), 6, lambda _: False, device, way)
        return decoder.generate(texts)

    try:
        plain = answers("alone")
    except Exception as error:  # a model's own code may raise anything
        raise RequestError(
            f"{type(model).__name__} cannot generate ({type(error).__name__}: {error}): "
            "set infer.mode to score"
        ) from None
    ways: tuple[Way, ...] = (way_of(model), "rows")
    for way in dict.fromkeys(ways):
        with suppress(Exception):
            if answers(way) == plain:
                return way
    return "alone"


def padded_cache(
    batch: PackedBatch, states: list[tuple[Tensor, Tensor]]
) -> tuple[DynamicCache, Tensor]:
    """A cache of rows `[prefix; padding; own tokens]` and its attention mask `[B, L]`.

    `states`: each layer's keys and values of the packed tokens; emptied on the way, so that both
    forms of one layer only are in memory at once.
    """
    device = batch.input_ids.device
    prefix, width = batch.prefix_length, max(batch.lengths)
    ends = torch.tensor(batch.lengths, device=device).cumsum(0) + prefix
    own = torch.arange(-width, 0, device=device) + ends.unsqueeze(1)  # [B, width] places in T
    real = own >= (ends - torch.tensor(batch.lengths, device=device)).unsqueeze(1)
    shared = torch.arange(prefix, device=device).expand(len(ends), -1)
    places = torch.cat([shared, own.clamp(min=0)], dim=1)
    mask = torch.cat([real.new_ones(len(ends), prefix), real], dim=1).long()
    cache = DynamicCache()
    for i in range(len(states)):
        keys, values = states[i]
        cache.update(keys[places].transpose(1, 2), values[places].transpose(1, 2), i)
        states[i] = (keys[:0], values[:0])
    return cache, mask
