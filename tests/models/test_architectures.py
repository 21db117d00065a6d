"""Every decoder of the installed transformers is right or refused, and the manual says which."""

from __future__ import annotations

import pytest

from tests.models.architectures import PAGE, WORDS, assert_right, judge, kinds

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


@pytest.mark.parametrize("kind", SAMPLE)
def test_an_architecture_is_computed_right_or_refused(kind: str) -> None:
    found, twin = judge(kind)
    assert found.way == SAMPLE[kind], found
    if twin is not None:
        assert_right(found, twin)
    assert f"| `{kind}` | {WORDS[found.way]} |" in PAGE.read_text(encoding="utf-8")


def test_the_manual_lists_every_decoder() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(kinds()) > 80
    assert [kind for kind in kinds() if f"| `{kind}` |" not in page] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_decoder_is_right_or_refused_and_the_manual_says_so() -> None:
    from tests.models.architectures import page, table

    assert page(table()) == PAGE.read_text(encoding="utf-8")
