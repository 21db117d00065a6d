"""Sizes of wrappers, of attention-free models and of config files that leave defaults out."""

from __future__ import annotations

from typing import Any

import pytest

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
        (FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, {"groups": 2}),
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
