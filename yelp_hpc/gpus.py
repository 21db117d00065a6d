"""GPUs that a plan can be made for: memory and dense peak rates.

Rates are TFLOP/s of dense matrix products with fp32 accumulation, from NVIDIA's data sheets and
architecture white papers: H100, H200 (Hopper), A100, A40, A30, RTX A6000 and GeForce RTX 3090
(Ampere; the GA102 white paper gives the 3090's 71 with fp32 accumulation), L40S, L4, RTX 6000 Ada
and GeForce RTX 4090 (Ada), T4 (Turing), V100 (Volta). Where a sheet prints rates with sparsity,
half of it stands here. fp32 is the rate without TF32. Reads and writes nothing.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from yelp_hpc.errors import RequestError


@dataclass(frozen=True)
class Card:
    """One GPU; `memory` in bytes, rates in TFLOP/s, None where the card cannot."""

    name: str
    memory: int
    fp16: float
    bf16: float | None
    fp32: float

    def rate(self, precision: str) -> float | None:
        """FLOP/s at best in a number format."""
        tera: float | None = getattr(self, precision)
        return None if tera is None else tera * 1e12


def _card(name: str, gib: int, sixteen: float, fp32: float, bf16: bool = True) -> Card:
    return Card(name, gib * 2**30, sixteen, sixteen if bf16 else None, fp32)


CARDS = (
    _card("H200", 141, 989, 67),
    _card("H100 PCIe", 80, 756, 51),
    _card("H100", 80, 989, 67),
    _card("A100 80GB", 80, 312, 19.5),
    _card("A100", 40, 312, 19.5),
    _card("RTX A6000", 48, 154.8, 38.7),
    _card("A40", 48, 149.7, 37.4),
    _card("A30", 24, 165, 10.3),
    _card("L40S", 48, 362, 91.6),
    _card("L4", 24, 121, 30.3),
    _card("RTX 6000 Ada", 48, 364.2, 91.1),
    _card("RTX 4090", 24, 165.2, 82.6),
    _card("RTX 3090", 24, 71, 35.6),
    _card("V100 32GB", 32, 125, 15.7, bf16=False),
    _card("V100", 16, 125, 15.7, bf16=False),
    _card("T4", 16, 65, 8.1, bf16=False),
)


def find_card(name: str) -> Card:
    """The card of a name as people and Slurm write it: `rtx3090`, `a100_80gb`, `NVIDIA H100`.

    Raises RequestError naming the nearest card and all that are known.
    """
    wanted = _plain(name)
    for card in sorted(CARDS, key=lambda card: -len(card.name)):
        parts = [_plain(part) for part in card.name.split()]
        if wanted and all(part in wanted for part in parts):
            return card
    bare = {_plain(card.name).removeprefix("rtx"): card for card in CARDS}
    for key in sorted(bare, key=len, reverse=True):
        if key in wanted:
            return bare[key]
    near = difflib.get_close_matches(wanted, [_plain(card.name) for card in CARDS], n=1, cutoff=0.5)
    hint = next(
        (f"; did you mean {c.name}?" for c in CARDS if near and _plain(c.name) == near[0]), ""
    )
    known = ", ".join(card.name for card in CARDS)
    raise RequestError(f"no GPU {name!r} in the table{hint} (known: {known})")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
