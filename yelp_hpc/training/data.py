"""The prepared rows as the training loop wants them.

Reads `prepare/train.parquet`, `prepare/validation.parquet` and `prepare/tokens.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from yelp_hpc.data.answer_tree import answers_of
from yelp_hpc.data.packing import shared_prefix
from yelp_hpc.errors import StageError
from yelp_hpc.evaluation.metrics import f1_honest


@dataclass(frozen=True)
class Rows:
    """Tokenised prompts and their labels, kept as two flat arrays."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    """All prompts, one behind the other."""
    ends: np.ndarray[Any, np.dtype[np.int64]]
    """`ends[i]`: where prompt i begins; one more entry than rows."""
    labels: list[int]
    answers: list[list[int]]
    """The tokens of each class's answer."""
    eos_id: int
    prefix_length: int
    """Tokens that all prompts share and a micro-batch computes once."""

    def __len__(self) -> int:
        return len(self.labels)

    def prompt(self, row: int) -> list[int]:
        """The tokens up to the answer."""
        prompt: list[int] = self.tokens[self.ends[row] : self.ends[row + 1]].tolist()
        return prompt

    def answer(self, row: int) -> list[int]:
        """The tokens of its label."""
        return self.answers[self.labels[row]]

    def sequence(self, row: int) -> list[int]:
        """The prompt and its label's tokens."""
        return [*self.prompt(row), *self.answer(row)]

    def own_length(self, row: int) -> int:
        """Tokens of `sequence(row)` behind the shared prefix."""
        prompt = int(self.ends[row + 1] - self.ends[row])
        return prompt + len(self.answer(row)) - self.prefix_length

    def supervised(self, rows: Sequence[int]) -> list[int]:
        """How many of each row's last positions are supervised: the answer's and its end's."""
        return [len(self.answer(row)) + 1 for row in rows]

    def targets(self, rows: Sequence[int]) -> Tensor:
        """What the supervised positions predict: each row's answer and the end."""
        return torch.tensor([token for row in rows for token in (*self.answer(row), self.eos_id)])


def read_rows(path: Path, tokens: dict[str, Any]) -> Rows:
    """The rows of a split. `tokens`: the content of tokens.json.

    Raises:
        StageError: the file is torn, or its prompts do not begin with the shared prefix.
    """
    try:
        table = pq.read_table(path, columns=["label", "input_ids"])
    except (OSError, pa.ArrowException) as error:
        raise StageError(f"{path} cannot be read ({error}); run prepare again") from None
    ids = table.column("input_ids").combine_chunks()
    if isinstance(ids, pa.ChunkedArray):  # no rows: nothing was combined
        ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], ids.type)
    ends = ids.offsets.to_numpy().astype(np.int64)
    flat = ids.values.to_numpy().astype(np.int32)
    lengths = np.diff(ends)
    prefix = np.asarray(tokens["prefix"], dtype=np.int32)
    shared = shared_prefix(tokens["prefix"], int(lengths.min())) if len(lengths) else 0
    if len(lengths):
        starts = flat[ends[:-1, None] + np.arange(shared)]
        if shared and not (starts == prefix[:shared]).all():
            raise StageError(f"{path} does not belong to tokens.json; run prepare again")
    return Rows(
        flat,
        ends,
        [int(label) for label in table.column("label").to_pylist()],
        answers_of(tokens),
        int(tokens["eos_id"]),
        shared,
    )


def f1_macro(confusion: Sequence[Sequence[float]]) -> float:
    """Mean F1 over the labels of a square confusion matrix (rows: truth); 0 where undefined."""
    counts = np.asarray(confusion, dtype=np.int64)
    return float(f1_honest(np.pad(counts, ((0, 0), (0, 1))))["macro"])  # none is unparsed
