"""What a shard says of itself is read back whole, or not at all."""

from __future__ import annotations

import pytest

from yelp_hpc.inference.provenance import PREFIX, Provenance

MADE = Provenance("tuned", "generate", "fp32", 4, "b" * 64, "a" * 64, "c" * 64)


def metadata(made: Provenance) -> dict[str, str]:
    return {key.removeprefix(PREFIX): value for key, value in made.metadata().items()}


@pytest.mark.parametrize("limit", [4, None])
def test_there_and_back(limit: int | None) -> None:
    made = Provenance(**{**vars(MADE), "max_new_tokens": limit})
    again = Provenance.of(metadata(made))
    assert again == made
    assert again.identity == metadata(made)["identity"]


@pytest.mark.parametrize("change", [
    {"max_new_tokens": "many"}, {"max_new_tokens": "²"}, {"max_new_tokens": None}, {"more": "x"},
    {"model": None}, dict.fromkeys(metadata(MADE)),
])  # fmt: skip
def test_what_is_not_whole_is_none(change: dict[str, str | None]) -> None:
    kept = {k: v for k, v in {**metadata(MADE), **change}.items() if v is not None}
    assert Provenance.of(kept) is None
