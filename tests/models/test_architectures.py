"""Every decoder of the installed transformers is right or refused, and the manual says which."""

from __future__ import annotations

import pytest

from tests.models.architectures import PAGE, assert_right, default_config, judge, kinds, line
from yelp_hpc.forecast.model_shape import model_shape

# One of each kind: dense, windowed, capped, with sinks, routed, latent, fused projections, ALiBi,
# learnt positions, linear attention, state spaces, hybrids, what reads ahead, what has an encoder.
SAMPLE = {
    "bamba": "rows",
    "bart": "refused",
    "bert": "refused",
    "bloom": "rows",
    "cohere2": "packed",
    "deepseek_v3": "packed",
    "gemma2": "packed",
    "gpt2": "packed",
    "gpt_oss": "packed",
    "mamba": "rows",
    "mixtral": "packed",
    "phi3": "packed",
    "qwen3_next": "rows",
    "rwkv": "rows",
    "stablelm": "packed",
}


@pytest.mark.parametrize("kind", kinds())
def test_an_architecture_is_computed_right_or_refused_and_the_manual_says_so(kind: str) -> None:
    found, twin = judge(kind)
    assert found.way == SAMPLE.get(kind, found.way), found
    if twin is not None:
        assert_right(found, twin)
        assert model_shape(default_config(kind).to_dict() | {"model_type": kind}, kind).layers > 0
    assert line(found) in PAGE.read_text(encoding="utf-8").splitlines(), found


def test_the_manual_lists_every_decoder_and_nothing_else() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = [row for row in text.splitlines() if row[:3] == "| `"]
    assert [row.split("`")[1] for row in listed] == kinds()
    assert len(listed) > 80
    for words in {row.split(" | ")[1] for row in listed}:
        count = sum(row.split(" | ")[1] == words for row in listed)
        assert f" {count} {words}" in text.splitlines()[2]
