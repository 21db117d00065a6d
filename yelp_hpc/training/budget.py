"""How a training cuts its global batches: chosen once, kept by every resume, lowered by a fault.

Reads and writes `train/budgets.json`. Another cut sums in another order and so differs in the last
digits: a run that is repeated with the record of the first has its bytes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.paths import RunPaths


@dataclass(frozen=True)
class Budget:
    """What holds from `step` on (steps count from 0)."""

    step: int
    max_tokens: int
    """Of a micro-batch."""
    pieces: int
    """Micro-batches of a global batch, where so many fit."""
    recompute: bool
    """Whether the layers are computed twice to save memory."""
    threads: int
    """Of a rank on a CPU: a matrix product may round otherwise with another number."""
    asked: tuple[Any, ...] = ()
    """The settings that it was made for; others are a new wish."""
    why: str = "the first start"
    more: int = 0
    """How many more micro-batches at a time where they do not fit; 0: as many again."""


def read_budgets(run: RunPaths) -> list[Budget]:
    """The record, oldest first; [] before the first start.

    Raises:
        StageError: the file is not of this version.
    """
    if not run.budgets.is_file():
        return []
    try:
        return [
            Budget(**{**entry, "asked": tuple(entry["asked"])}) for entry in read_json(run.budgets)
        ]
    except (TypeError, KeyError) as error:
        raise StageError(f"{run.budgets} is not a record of this version: {error}") from None


def write_budgets(run: RunPaths, budgets: Sequence[Budget]) -> None:
    """Replace the record."""
    write_json(run.budgets, [asdict(budget) for budget in budgets])


def budget_at(budgets: Sequence[Budget], step: int) -> Budget:
    """The one that holds at `step`."""
    return [budget for budget in budgets if budget.step <= step][-1]


def smaller(budget: Budget, step: int, tokens: int, alone: bool) -> Budget | None:
    """What to try after a micro-batch of `tokens` did not fit the memory; None: there is no less.

    `alone`: it held one sequence, which cannot be cut: its layers are computed twice instead.
    """
    if not alone:
        lower = min(budget.max_tokens, tokens) * 3 // 4
        return replace(budget, step=step, max_tokens=lower, why=f"{tokens} tokens out of memory")
    if budget.recompute:
        return None
    return replace(budget, step=step, recompute=True, why=f"{tokens} tokens out of memory")
