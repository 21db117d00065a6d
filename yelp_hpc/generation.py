"""Generate mode: greedy decoding in batches, stopped as soon as every answer is decided.

The prompts' shared prefix is run once and its keys and values reused by every batch. A batch is
padded on the left behind the prefix (prompts of like length go together, see `plan_batches`), each
row keeps its own positions, and rows that have ended leave the batch. The tokens of a row are
those of transformers' greedy `generate` on that row alone, up to where the row was stopped: before
an end token, after `max_new_tokens`, or once `decided` says that nothing that follows can change
the meaning.
Takes a model and token ids; reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

# Padding costs like any token; up to this share it is cheaper than another forward pass.
PADDING_ALLOWED = 0.1


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
    """Greedy decoding of prompts that share a prefix.

    `decided` gets the tokens generated so far for a row and says whether they are enough.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix: Sequence[int],
        eos_ids: Collection[int],
        max_new_tokens: int,
        decided: Callable[[list[int]], bool],
        device: torch.device | str = "cpu",
    ) -> None:
        self.model: Any = model
        self.prefix = list(prefix)
        self.eos_ids = frozenset(eos_ids)
        self.max_new_tokens = max_new_tokens
        self.decided = decided
        self.device = torch.device(device)
        self._prefix_states: list[tuple[Tensor, Tensor]] | None = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The new tokens of each prompt, the end token left out.

        Raises:
            ValueError: a prompt does not begin with the prefix, or has nothing behind it.
        """
        start = len(self.prefix)
        for i, prompt in enumerate(prompts):
            if len(prompt) <= start or list(prompt[:start]) != self.prefix:
                raise ValueError(f"prompt {i} does not begin with the prefix or ends with it")
        answers: list[list[int]] = [[] for _ in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(lengths.max()) - start
        ids = torch.tensor(
            # Any id serves as padding: the mask hides it. The row's own cannot be out of range.
            [[*[p[-1]] * (width - len(p) + start), *p[start:]] for p in prompts],
            device=self.device,
        )
        column = torch.arange(width, device=self.device)
        own = column >= (width - (lengths - start)).unsqueeze(1)
        mask = torch.cat([own.new_ones(len(prompts), start), own], dim=1).long()
        positions = (column + (lengths.unsqueeze(1) - width)).clamp(min=0)
        cache = self._prefix_cache(len(prompts))
        rows = list(range(len(prompts)))  # the prompt that each row of the batch decodes
        ended = [False] * len(prompts)

        for step in range(self.max_new_tokens):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = output.logits[:, -1].argmax(dim=-1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if ended[row]:
                    continue
                if token in self.eos_ids:
                    ended[row] = True
                else:
                    answers[row].append(token)
                    ended[row] = self.decided(answers[row])
            going = [i for i, row in enumerate(rows) if not ended[row]]
            if not going or step + 1 == self.max_new_tokens:
                break
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            ids = tokens.unsqueeze(1)
            if len(going) <= len(rows) // 2:  # a copy of the cache pays when it halves the batch
                kept = torch.tensor(going, device=self.device)
                cache.batch_select_indices(kept)
                positions, mask, ids = positions[kept], mask[kept], ids[kept]
                rows = [rows[i] for i in going]
        return answers

    def _prefix_cache(self, rows: int) -> DynamicCache:
        """The keys and values of the prefix, for `rows` rows; computed at the first call."""
        cache = DynamicCache()
        if not self.prefix:
            return cache
        if self._prefix_states is None:
            ids = torch.tensor([self.prefix], device=self.device)
            first = DynamicCache()
            self.model(input_ids=ids, past_key_values=first, use_cache=True, logits_to_keep=1)
            states: list[tuple[Tensor, Tensor]] = []
            layers: Any = first.layers
            for layer in layers:
                states.append((layer.keys, layer.values))
            self._prefix_states = states
        for i, (keys, values) in enumerate(self._prefix_states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), i)
        return cache
