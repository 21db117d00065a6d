"""The GPUs that the toolkit knows: one table of names, memory and its rate, dense peak rates.

Rates are TFLOP/s of dense matrix products with fp32 accumulation, and GB/s of the memory, from
NVIDIA's data sheets and architecture white papers: H100, H200 (Hopper), A100, A40, A30, A10, RTX
A6000, A5000, A4000 and GeForce RTX 3090 (Ampere; the GA102 white paper gives the 3090's 71 with
fp32 accumulation), L40S, L40, L4, RTX 6000 Ada and GeForce RTX 4090 (Ada), Quadro RTX 8000 and
6000, GeForce RTX 2080 Ti and T4 (Turing), V100 (Volta). Where a sheet prints rates with sparsity,
half of it stands here. fp32 is the rate without TF32. Reads and writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

from yelp_hpc.errors import RequestError, nearest

# What containers/cuda.lock needs: PyPI's torch is built with CUDA 13 (CUDA Toolkit release notes).
OLDEST_CARD = (7, 5)
OLDEST_DRIVER = 580
BF16_SINCE = (8, 0)


def auto_precision(capability: tuple[int, int] | None) -> Literal["fp32", "bf16", "fp16"]:
    """What `precision: auto` is on a card of a compute capability; None: on a CPU."""
    if capability is None:
        return "fp32"
    return "bf16" if capability >= BF16_SINCE else "fp16"


@dataclass(frozen=True)
class Card:
    """One GPU; `memory` in bytes that CUDA gives, rates in TFLOP/s, None where the card cannot."""

    name: str
    memory: int
    sold: int
    """GiB that its name and its box say."""
    fp16: float
    bf16: float | None
    fp32: float
    bandwidth: float
    """Of its memory, bytes a second."""
    capability: tuple[int, int]
    """CUDA's compute capability: (8, 6) is sm_86."""
    forms: tuple[str, ...] = ()
    """Words for how it is mounted, which its name may hold."""

    @property
    def label(self) -> str:
        """Its name with its memory as it is sold: `RTX A4000 (16 GB)`."""
        return self.name if "GB" in self.name else f"{self.name} ({self.sold} GB)"

    def rate(self, precision: str) -> float | None:
        """FLOP/s at best in a number format."""
        tera: float | None = getattr(self, precision)
        return None if tera is None else tera * 1e12


def _card(
    name: str,
    gib: int,
    sixteen: float,
    fp32: float,
    gigabytes: int,
    capability: tuple[int, int],
    forms: str = "",
    ecc: bool = False,
) -> Card:
    """`gigabytes`: that its memory gives in a second.

    `ecc`: error correction, on as delivered, takes a sixteenth of its GDDR6 (nvidia-smi: 15,360 MiB
    of a T4, 23,034 of an L4, 46,068 of an L40S); HBM has room of its own for it.
    """
    bf16 = sixteen if capability >= BF16_SINCE else None
    rates = (sixteen, bf16, fp32, gigabytes * 1e9)
    return Card(name, gib * 2**30 * (16 - ecc) // 16, gib, *rates, capability, tuple(forms.split()))


CARDS = (
    _card("H200", 141, 989, 67, 4800, (9, 0), "sxm sxm5 hbm3e"),
    _card("H100", 80, 989, 67, 3350, (9, 0), "sxm sxm5 hbm3"),
    _card("H100 PCIe", 80, 756, 51, 2000, (9, 0), "pcie"),
    _card("A100", 40, 312, 19.5, 1555, (8, 0), "sxm sxm4 pcie"),
    _card("A100 80GB", 80, 312, 19.5, 2039, (8, 0), "sxm sxm4 pcie"),
    _card("A40", 48, 149.7, 37.4, 696, (8, 6), "pcie", ecc=True),
    _card("A30", 24, 165, 10.3, 933, (8, 0), "pcie"),
    _card("A10", 24, 125, 31.2, 600, (8, 6), "pcie", ecc=True),
    _card("RTX A6000", 48, 154.8, 38.7, 768, (8, 6)),
    _card("RTX A5000", 24, 111.1, 27.8, 768, (8, 6)),
    _card("RTX A4000", 16, 76.7, 19.2, 448, (8, 6)),
    _card("L40S", 48, 362, 91.6, 864, (8, 9), "pcie", ecc=True),
    _card("L40", 48, 181, 90.5, 864, (8, 9), "pcie", ecc=True),
    _card("L4", 24, 121, 30.3, 300, (8, 9), "pcie", ecc=True),
    _card("RTX 6000 Ada", 48, 364.2, 91.1, 960, (8, 9)),
    _card("RTX 4090", 24, 165.2, 82.6, 1008, (8, 9)),
    _card("RTX 3090", 24, 71, 35.6, 936, (8, 6)),
    _card("Quadro RTX 8000", 48, 130.5, 16.3, 672, (7, 5)),
    _card("Quadro RTX 6000", 24, 130.5, 16.3, 672, (7, 5)),
    _card("RTX 2080 Ti", 11, 53.8, 13.4, 616, (7, 5)),
    _card("T4", 16, 65, 8.1, 320, (7, 5), "pcie", ecc=True),
    _card("V100", 16, 125, 15.7, 900, (7, 0), "sxm sxm2"),
    _card("V100 32GB", 32, 125, 15.7, 900, (7, 0), "sxm sxm2 sxm3"),
    _card("V100 PCIe", 16, 112, 14, 900, (7, 0), "pcie"),
    _card("V100 PCIe 32GB", 32, 112, 14, 900, (7, 0), "pcie"),
)
"""Of several with one name, the first is meant where neither memory nor form is said."""

# Words that tell no card from another.
_MAKER = frozenset({"nvidia", "tesla", "geforce", "gpu", "generation"})
_FORMS = frozenset(form for card in CARDS for form in card.forms)
_MEMORY = re.compile(r"(?<!\S)(\d+) ?g(?:i?b)?(?!\S)")


def find_card(name: str) -> Card:
    """The card of a name as people, Slurm and CUDA write it: `rtx3090`, `a100_80gb`, `NVIDIA H100`.

    Raises:
        RequestError: it is not in the table; the nearest card and all that are known are named.
    """
    card = card_named(name)
    if card is not None:
        return card
    plain = {re.sub(r"[^a-z0-9]", "", card.name.lower()): card.name for card in CARDS}
    near = nearest(" ".join(_words(name)).replace(" ", ""), plain)
    hint = f"; did you mean {plain[near]}?" if near else ""
    known = ", ".join(card.name for card in CARDS)
    raise RequestError(f"no GPU {name!r} in the table{hint} (known: {known})")


def card_named(name: str) -> Card | None:
    """The card that a name means, None when it means none of the table.

    Whole words count, never parts of them: `l40` is not L4, `t400` not T4, `a100_1g.5gb` (a slice
    of a card) and `rtx3090ti` are nothing that is known here.
    """
    text = " ".join(_words(name))
    sizes = [int(size) for size in _MEMORY.findall(text)]
    words = _MEMORY.sub(" ", text).split()
    forms = {word for word in words if word in _FORMS}
    core = tuple(word for word in words if word not in _FORMS)
    for card in CARDS:
        fits = all(size == card.sold for size in sizes) and forms <= {*card.forms}
        if fits and len(sizes) <= 1 and core in _SPELLINGS[card.name]:
            return card
    return None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _MAKER]


def _spellings(name: str) -> frozenset[tuple[str, ...]]:
    """How a card's own words are written: apart or joined, and without the `RTX` of a GeForce."""
    words = [w for w in name.lower().split() if w not in _FORMS and not _MEMORY.fullmatch(w)]
    found = set()
    for start in (0, 1) if words[0] == "rtx" else (0,):
        own = words[start:]
        for count in range(len(own)):
            for cuts in combinations(range(1, len(own)), count):
                ends = (0, *cuts, len(own))
                found.add(tuple("".join(own[a:b]) for a, b in pairwise(ends)))
    return frozenset(found)


_SPELLINGS = {card.name: _spellings(card.name) for card in CARDS}
