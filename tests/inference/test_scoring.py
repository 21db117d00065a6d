"""Scores that overflow half precision are computed again, in fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.models.test_packed import sequences, tiny
from yelp_hpc.data.answer_tree import answer_tree
from yelp_hpc.errors import StageError
from yelp_hpc.inference.scoring import label_scores
from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM
from yelp_hpc.models.packed.batch import prepare_model

TREES = {
    "one token": answer_tree([[5], [9], [11], [30], [31]]),
    "several": answer_tree([[5, 6], [5, 9], [11]]),
}


def overflowing(name: str) -> Any:
    """In fp16 the MLP's products exceed 65504; the norm behind them makes them small again."""
    if name == "chatglm":
        config = ChatGLMConfig(
            num_layers=2, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, kv_channels=8,
            multi_query_group_num=2, padded_vocab_size=97, seq_length=128,
        )  # fmt: skip
        torch.manual_seed(3)
        model: Any = ChatGLMForCausalLM(config)
        scaled = [layer.mlp.dense_h_to_4h for layer in model.transformer.encoder.layers]
    else:
        model = tiny(name, lora=name == "llama")
        scaled = [m for n, m in model.named_modules() if n.endswith("up_proj")]
        scaled += [m for n, m in model.named_modules() if n.endswith("gate_proj")]
    for module in scaled:
        module.weight.data *= 3000
    for key, parameter in model.named_parameters():
        if "lora_" not in key:
            parameter.data = parameter.data.half()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "chatglm"])
def test_scores_that_overflow_are_those_of_fp32(
    name: str, tree: str, capsys: pytest.CaptureFixture[str]
) -> None:
    half = overflowing(name)
    exact = prepare_model(copy.deepcopy(half).float())
    before = dict(half.named_parameters())
    prompts = sequences(4)
    for prepared in (prepare_model(half), prepare_model(half, way="rows")):
        found = label_scores(prepared, prompts, 4, TREES[tree])
        assert "computed again in fp32" in capsys.readouterr().err
        wanted = label_scores(exact, prompts, 4, TREES[tree])
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    after = dict(half.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())
    assert {p.dtype for k, p in after.items() if "lora_" not in k} == {torch.float16}


def test_weights_that_are_no_numbers_are_an_error_in_fp32_too() -> None:
    model = tiny("llama", lora=False).half().eval().requires_grad_(False)
    model.lm_head.weight[3, 3] = float("nan")
    model.model.norm.weight[3] = float("inf")
    with pytest.raises(StageError, match="not finite"):
        label_scores(prepare_model(model), sequences(4), 4, TREES["one token"])
