"""Random masks from a counter: the same bits on every CPU and card.

What is kept of an element is a function of its token's key, its layer and its column alone, in
whole-number arithmetic modulo 2^64 that every device does alike: no generator has a state, so
neither packing nor the number of ranks nor a second forward pass changes a mask. It is SplitMix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), whose n-th
output is a hash of its seed plus n times an odd constant. Reads and writes tensors only.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# 16 random bits decide one element: p is met to 1/65536.
_LEVELS = 2**16
_STEP = 0x9E3779B97F4A7C15 - 2**64
# Shift, the bits that a shift of an unsigned number would leave, factor.
_ROUNDS = (
    (30, 2**34 - 1, 0xBF58476D1CE4E5B9 - 2**64),
    (27, 2**37 - 1, 0x94D049BB133111EB - 2**64),
    (31, 2**33 - 1, 1),
)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts, equal on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def token_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """A key a token, `[T]` int64, from the seed of its sequence and its position there."""
    return _mixed(seeds + (positions + 1) * _STEP)


def keep_mask(keys: Tensor, layer: int, features: int, p: float, dtype: torch.dtype) -> Tensor:
    """What dropout keeps, `[T, features]`: 1 where kept, 0 where dropped.

    `keys`: of `token_keys`; `layer`: any 63-bit number, equal for equal masks.
    """
    columns = torch.arange(1, -(-features // 4) + 1, device=keys.device)
    bits = _mixed(keys.unsqueeze(1) + (columns * _STEP + layer))
    draws = bits.view(torch.int16)[:, :features]
    kept = torch.empty(len(keys), features, dtype=dtype, device=keys.device)
    return torch.ge(draws, round(p * _LEVELS) - _LEVELS // 2, out=kept)


def _mixed(numbers: Tensor) -> Tensor:
    """SplitMix64's hash of each 64-bit number, in place."""
    shifted = torch.empty_like(numbers)
    for shift, left, factor in _ROUNDS:
        # int64's shift repeats the sign: those bits are cut off
        torch.bitwise_right_shift(numbers, shift, out=shifted).bitwise_and_(left)
        numbers.bitwise_xor_(shifted)
        if factor != 1:
            numbers.mul_(factor)
    return numbers
