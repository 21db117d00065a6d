"""A training step of ChatGLM3-6B without its 12 GB: torch's fake tensors have shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_config
from yelp_hpc.forecast.memory import training_memory
from yelp_hpc.forecast.model_shape import KNOWN, model_shape
from yelp_hpc.forecast.work import forward_flops, train_flops
from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM
from yelp_hpc.models.packed.batch import forward_selected, pack, prepare_model
from yelp_hpc.models.packed.dropout import use_sequence_dropout

NAME = "THUDM/chatglm3-6b-base"
PREFIX, LENGTHS = 31, (169,) * 8  # a micro-batch of the report's run


def full_model() -> Any:
    """ChatGLM3-6B in fp16 with an fp32 adapter; no memory behind it."""
    sizes = {key: value for key, value in KNOWN[NAME].items() if key != "model_type"}
    before = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(torch.float16)
        try:
            model = ChatGLMForCausalLM(ChatGLMConfig(**sizes))
        finally:
            torch.set_default_dtype(before)
        lora = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.08, target_modules=["query_key_value"],
            task_type="CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(model, lora)


def on_fake_memory(model: Any) -> None:
    """Give every tensor of a model on `meta` a fake one on the CPU; inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def test_a_step_at_full_size_has_the_dtypes_memory_and_flops_that_plan_counts() -> None:
    shape = model_shape(KNOWN[NAME], NAME)
    model = full_model()
    tokens = PREFIX + sum(LENGTHS)
    kept: dict[Any, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_fake_memory(model)
        weights = {p.shape for p in model.parameters() if not p.requires_grad and p.dim() == 2}
        weights |= {torch.Size(reversed(s)) for s in weights}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape not in weights:  # these are there anyhow
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage.nbytes()
                held.append(tensor)
            return tensor

        held: list[torch.Tensor] = []
        dropout = use_sequence_dropout(model, 1)
        prepare_model(model).train()
        rows = [[*range(PREFIX), *[5] * length] for length in LENGTHS]
        batch = pack(rows, PREFIX, last=2)
        counter = FlopCounterMode(display=False)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with counter, hooks, dropout.batch(0, range(len(rows)), batch):
            with torch.autocast("cpu", torch.float16):
                logits = forward_selected(model, batch)
            targets = torch.zeros(len(logits), dtype=torch.long)
            loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            forward = counter.get_total_flops()
            loss.backward()
    adapted = [p for p in model.parameters() if p.requires_grad]
    assert logits.shape == (2 * len(LENGTHS), 65024) and logits.dtype == torch.float16
    assert len(adapted) == 2 * 28
    assert {p.dtype for p in adapted} == {torch.float32}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in adapted)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}

    counted = forward_flops(shape, LENGTHS, tokens, PREFIX)
    assert abs(counted / forward - 1) < 0.05
    assert abs(train_flops(shape, counted, False) / counter.get_total_flops() - 1) < 0.05

    config = tiny_config(
        Path("m"), train={"precision": "fp16"}, lora={"target": ["query_key_value"]}
    )
    one, none = (training_memory(shape, config, n, False, cuda=True) for n in (tokens, 0))
    adapter = 16 * sum(p.numel() for p in adapted) / 2  # the plan's rank is 4 here, 8 there
    assert none.adapter == adapter
    assert none.weights == 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert abs(one.activations / sum(kept.values()) - 1) < 0.10
