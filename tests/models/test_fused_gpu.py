"""The fused forms of a GPU, on a CPU: what they compute is what the models compute themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.test_packed import (
    LENGTHS,
    VOCAB,
    assert_equal_gradients,
    gradients,
    loss_of,
    sequences,
    tiny,
)
from yelp_hpc.inference.generation import GreedyDecoder
from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM
from yelp_hpc.models.packed import batch as batches
from yelp_hpc.models.packed import linear
from yelp_hpc.models.packed.batch import base_model, forward_selected, pack, prepare_model
from yelp_hpc.models.packed.dropout import use_sequence_dropout
from yelp_hpc.models.packed.fused_gpu import GpuDecoder
from yelp_hpc.training.loop import recompute_layers

CHATGLM = ChatGLMConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, kv_channels=8,
    multi_query_group_num=2, padded_vocab_size=VOCAB, seq_length=128,
)  # fmt: skip
ALL = {
    "chatglm": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without oneDNN's layouts: the products of a GPU."""
    monkeypatch.setattr(linear, "available", lambda device, dtype: False)


def model_of(name: str, dropout: float = 0.0, targets: Sequence[str] | None = None) -> Any:
    if name != "chatglm":
        return tiny(name, dropout=dropout, targets=targets or ("q_proj", "k_proj", "v_proj"))
    torch.manual_seed(11)
    model = ChatGLMForCausalLM(CHATGLM)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(targets or ALL[name][:1]),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted: Any = get_peft_model(model, lora)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return adapted


def fused(model: Any) -> Any:
    """`model`, computed as on a GPU."""
    base = base_model(prepare_model(model, fused=False))
    assert GpuDecoder.supports(base)
    batches._decoders[base] = GpuDecoder(base)
    return model


@pytest.mark.parametrize("prefix_length", [0, 7])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", ["chatglm", "llama", "llama-bias", "qwen2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_logits_and_gradients_are_those_of_the_model(
    name: str, every: bool, prefix_length: int, recompute: bool
) -> None:
    """With dropout: its masks are a function of row and position, not of who asks."""
    targets = ALL["chatglm" if name == "chatglm" else "llama"] if every else None
    plain = model_of(name, 0.3, targets)
    fast = fused(copy.deepcopy(plain))
    plain = prepare_model(plain, fused=False)
    if recompute:
        recompute_layers(fast)
    batch = pack(sequences(prefix_length), prefix_length)
    results = []
    for model in (plain, fast):
        masks = use_sequence_dropout(model.train(), 5)
        with masks.batch(2, range(len(LENGTHS)), batch):
            logits = forward_selected(model, batch)
            loss_of(logits).backward()
        results.append((logits, gradients(model)))
    (wanted, slopes), (got, own) = results
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert_equal_gradients(own, slopes)


@pytest.mark.parametrize("name", ["chatglm", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_fp32_than_the_model_is(
    name: str, dtype: torch.dtype
) -> None:
    exact = model_of(name)
    batch = pack(sequences(7), 7)
    errors = []
    with torch.no_grad():
        wanted = forward_selected(prepare_model(copy.deepcopy(exact), fused=False), batch)
        for fast in (False, True):
            half = copy.deepcopy(exact)
            for key, parameter in half.named_parameters():
                if "lora_" not in key:
                    parameter.data = parameter.data.to(dtype)
            half = fused(half) if fast else prepare_model(half, fused=False)
            with torch.autocast("cpu", dtype):
                logits = forward_selected(half, batch)
            assert logits.dtype == dtype
            errors.append((logits.float() - wanted).norm() / wanted.norm())
    assert errors[1] < 1.3 * errors[0] < 0.05


def test_weights_that_became_one_are_kept_once_and_still_the_models() -> None:
    model = model_of("llama")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    fast = fused(model)
    batch = pack(sequences(3), 3)
    with torch.no_grad():
        first = forward_selected(fast, batch)
    layer = base_model(fast).model.layers[0]
    q, k, v = (getattr(layer.self_attn, f"{name}_proj").base_layer.weight for name in "qkv")
    storages = {w.untyped_storage().data_ptr() for w in (q, k, v)}
    assert len(storages) == 1
    assert q.untyped_storage().nbytes() == q.nbytes + k.nbytes + v.nbytes
    for key, parameter in fast.named_parameters():
        assert torch.equal(parameter, before[key]), key
    with torch.no_grad():
        assert torch.equal(forward_selected(fast, batch), first)
        q.add_(1.0)  # as a merge does: seen at once
        assert not torch.equal(forward_selected(fast, batch), first)


def test_weights_side_by_side_in_memory_need_not_be_one() -> None:
    """CUDA's allocator lays tensors of their own one behind the other."""
    model = model_of("llama")
    attention = base_model(model).model.layers[0].self_attn
    bases = [getattr(attention, f"{name}_proj").base_layer for name in "qkv"]
    memory = bytearray(sum(base.weight.nbytes for base in bases))
    start = 0
    for base in bases:
        numbers = base.weight.numel()
        beside = torch.frombuffer(memory, dtype=torch.float32, count=numbers, offset=start)
        base.weight.data = beside.view_as(base.weight).copy_(base.weight.detach())
        start += base.weight.nbytes
    assert bases[1].weight.data_ptr() == bases[0].weight.data_ptr() + bases[0].weight.nbytes
    batch = pack(sequences(3), 3)
    with torch.no_grad():
        wanted = forward_selected(prepare_model(copy.deepcopy(model), fused=False), batch)
        torch.testing.assert_close(forward_selected(fused(model), batch), wanted)


@pytest.mark.parametrize("name", ["chatglm", "llama"])
def test_generation_goes_on_from_its_keys_and_values(name: str) -> None:
    texts = []
    for prepare in (lambda m: prepare_model(m, fused=False), fused):
        model = prepare(model_of(name)).eval()
        decoder = GreedyDecoder(model, 5, set(), 6, lambda answer: False, torch.device("cpu"))
        texts.append(decoder.generate(sequences(5)))
    assert texts[0] == texts[1] and all(len(text) == 6 for text in texts[0])


def test_a_chatglm_of_another_kind_is_left_to_its_own_code() -> None:
    odd = ChatGLMConfig(**{**CHATGLM.to_dict(), "apply_residual_connection_post_layernorm": True})
    assert not GpuDecoder.supports(ChatGLMForCausalLM(odd).requires_grad_(False))
    assert GpuDecoder.supports(ChatGLMForCausalLM(CHATGLM).requires_grad_(False))
    assert not GpuDecoder.supports(ChatGLMForCausalLM(CHATGLM))  # all of it is trained
