"""A training step of ChatGLM3-6B without its 12 GB: torch's fake tensors have shapes alone.

It runs in the fused forms of a GPU. What torch has one kernel for there, variable-length attention
and the norm, is played: it keeps what the kernels keep.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_config
from yelp_hpc.forecast.memory import traffic_bytes, training_memory
from yelp_hpc.forecast.model_shape import KNOWN, model_shape
from yelp_hpc.forecast.work import forward_flops, train_flops
from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM
from yelp_hpc.models.packed import batch as batches
from yelp_hpc.models.packed import fused_gpu, linear
from yelp_hpc.models.packed.batch import base_model, forward_selected, pack, prepare_model
from yelp_hpc.models.packed.dropout import use_sequence_dropout
from yelp_hpc.models.packed.varlen import attend_varlen
from yelp_hpc.training.loop import recompute_layers

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


class Varlen(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its result, a number a token and head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(kept) for kept in ctx.saved_tensors[:3])


class Norm(torch.autograd.Function):
    """Keeps what `F.rms_norm` keeps on CUDA: its inputs and a number a token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(len(x), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(dy), None


PRODUCTS = {"mm", "addmm", "addmm_"}
NOT_MOVED = {
    *("view", "_unsafe_view", "t", "transpose", "slice", "split", "split_with_sizes", "detach"),
    *("expand", "unsqueeze", "squeeze", "alias", "empty", "empty_like", "new_empty", "device"),
}
LOOKED_UP = {"embedding"}  # reads the rows that it wants, not the table


class Counter(TorchDispatchMode):
    """Bytes that are held beside a model's own, and bytes that operations read and write."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self.held: dict[int, Any] = {p.untyped_storage()._cdata: p for p in own}
        self.now = self.peak = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made, given = tensors(result), tensors([args, list((kwargs or {}).values())])
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.held:
                self.now += storage.nbytes()
                free = self.free(storage._cdata, storage.nbytes())
                self.held[storage._cdata] = weakref.ref(storage, free)
        if self.now > self.peak:
            gc.collect()  # fake tensors hold each other in circles
            self.peak = max(self.peak, self.now)
        name = func._schema.name.partition("::")[2]
        if name not in PRODUCTS | NOT_MOVED | LOOKED_UP:
            written = [] if "out" in (kwargs or {}) or "grad_input" in (kwargs or {}) else made
            self.moved += sum(t.numel() * t.element_size() for t in [*given, *written])
        return result

    def free(self, key: int, size: int) -> Any:
        def freed(_: Any) -> None:
            self.now -= size
            self.held.pop(key)

        return freed


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_at_full_size_has_the_dtypes_memory_traffic_and_flops_that_plan_counts(
    monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    def attend(q: Any, k: Any, v: Any, layout: Any, scale: float) -> Any:
        return attend_varlen(lambda *a, **_: Varlen.apply(*a[:3]), q, k, v, layout.varlen, scale)

    monkeypatch.setattr(fused_gpu, "attend", attend)
    monkeypatch.setattr(fused_gpu, "norm", lambda x, module: Norm.apply(x, module.weight))
    monkeypatch.setattr(linear, "available", lambda device, dtype: False)
    shape = model_shape(KNOWN[NAME], NAME)
    model = full_model()
    tokens = PREFIX + sum(LENGTHS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_fake_memory(model)
        dropout = use_sequence_dropout(model, 1)
        base = base_model(prepare_model(model, fused=False).train())
        batches._decoders[base] = fused_gpu.GpuDecoder(base)
        if recompute:
            recompute_layers(model)
        rows = [[*range(PREFIX), *[5] * length] for length in LENGTHS]
        batch = pack(rows, PREFIX, last=2)
        flops, counter = FlopCounterMode(display=False), Counter(model)
        gc.collect()
        gc.freeze()  # only what is made from here on is looked through
        try:
            with flops, counter, dropout.batch(0, range(len(rows)), batch):
                with torch.autocast("cpu", torch.float16):
                    logits = forward_selected(model, batch)
                targets = torch.zeros(len(logits), dtype=torch.long)
                loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
                forward = flops.get_total_flops()
                loss.backward()
        finally:
            gc.unfreeze()
    adapted = [p for p in model.parameters() if p.requires_grad]
    assert logits.shape == (2 * len(LENGTHS), 65024) and logits.dtype == torch.float16
    assert len(adapted) == 2 * 28
    assert {p.dtype for p in adapted} == {torch.float32}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in adapted)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}

    counted = forward_flops(shape, LENGTHS, tokens, PREFIX)
    assert abs(counted / forward - 1) < 0.05
    # a layer's last product is not done twice: nothing asks for its result
    lora = 2.0 * sum(p.numel() for p in adapted) * tokens
    over = train_flops(counted, lora, recompute) / flops.get_total_flops() - 1
    assert -0.05 < over < (0.12 if recompute else 0.05)

    config = tiny_config(
        Path("m"), train={"precision": "fp16"}, lora={"target": ["query_key_value"]}
    )
    one, none = (training_memory(shape, config, n, recompute, cuda=True) for n in (tokens, 0))
    adapter = 16 * sum(p.numel() for p in adapted) / 2  # the plan's rank is 4 here, 8 there
    assert none.adapter == adapter
    assert none.weights == 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert abs(one.activations / counter.peak - 1) < 0.05
    if recompute:
        return
    # forward and backward of two norms (10 h) and of attention (10 h) are one kernel each
    played = 2 * 20 * shape.hidden * tokens * shape.layers
    planned = traffic_bytes(shape, "fp16", train=True) * tokens * shape.layers
    assert abs(planned / (counter.moved + played) - 1) < 0.10
