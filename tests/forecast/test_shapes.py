"""Sizes of wrappers, of attention-free models and of config files that leave defaults out."""

from __future__ import annotations

from typing import Any

import pytest

from yelp_hpc.errors import RequestError
from yelp_hpc.forecast.model_shape import model_shape

LLAMA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
FALCON = {"model_type": "falcon", **LLAMA}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **LLAMA}},
            {"hidden": 64, "tied": True},
        ),
        ({"model_type": "llama", **LLAMA}, {"tied": False, "groups": 4}),
        (FALCON, {"groups": 1}),
        (FALCON | {"multi_query": False}, {"groups": 4}),
        (FALCON | {"multi_query": False, "num_kv_heads": 2}, {"groups": 2}),
        (FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, {"groups": 2}),
        (FALCON | {"model_type": "gpt_bigcode"}, {"groups": 1, "gated": False, "tied": True}),
        (FALCON | {"model_type": "llama"}, {"groups": 4, "gated": True, "inner": 256}),
        (
            {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2, "head_dim": 8},
            {"bias": (4 + 2 * 2) * 8, "head_dim": 8, "groups": 2},
        ),
        ({"model_type": "llama", **LLAMA, "tie_word_embeddings": True}, {"tied": True, "bias": 0}),
        ({"model_type": "gemma", **LLAMA, "tie_word_embeddings": False}, {"tied": False}),
        (
            {
                "model_type": "gemma3",
                "tie_word_embeddings": False,
                "text_config": {"model_type": "gemma3_text", **LLAMA},
            },
            {"model_type": "gemma3_text", "tied": False},
        ),
        (
            {
                "model_type": "a",
                "tie_word_embeddings": False,
                "text_config": {**LLAMA, "tie_word_embeddings": True},
            },
            {"model_type": "", "tied": True},
        ),
        ({"model_type": "llama", **LLAMA, "hidden_size": 66}, {"head_dim": 16}),
        ({"model_type": "rwkv", **LLAMA, "num_attention_heads": None}, {"heads": 1, "groups": 1}),
        (
            {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9},
            {"heads": 1},
        ),
        (
            {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 9},
            {"layers": 2},
        ),
        ({"model_type": "gemma3n_text", **LLAMA, "intermediate_size": [8, 16]}, {"inner": 16}),
    ],
)
def test_sizes_come_out(config: dict[str, Any], expected: dict[str, Any]) -> None:
    shape = model_shape(config, "config.json")
    assert {name: getattr(shape, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 0, "vocab_size": True}, "hidden_size is 0, vocab_size is True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1"),
        ({"intermediate_size": []}, "intermediate_size is []"),
        ({"intermediate_size": [8, "x"]}, "intermediate_size is [8, 'x']"),
        ({"num_key_value_heads": 0.5}, "num_key_value_heads is 0.5"),
    ],
)
def test_every_size_that_is_none_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as error:
        model_shape({"model_type": "llama", **LLAMA, **change}, "m/config.json")
    assert str(error.value) == f"m/config.json does not describe a decoder: {said}"
