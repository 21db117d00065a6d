"""One forward pass in fp32 of a model whose weights are kept in half precision.

Each weight is widened while its own module runs and no longer: a model of 6 billion weights takes
half a gigabyte more for it, not twelve. Reads and writes tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from yelp_hpc.models.packed.batch import by_its_own_code


def is_half(model: nn.Module) -> bool:
    """Whether a weight of it is in fp16 or bf16."""
    half = (torch.float16, torch.bfloat16)
    return any(parameter.dtype in half for parameter in model.parameters())


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Compute `model` in fp32 inside the block, without gradients."""
    kept: dict[nn.Module, dict[str, Any]] = {}

    def widen(module: nn.Module, inputs: Any) -> None:
        kept[module] = {**module._parameters}
        for name, parameter in kept[module].items():
            if parameter is not None:
                module._parameters[name] = parameter.detach().float()

    def narrow(module: nn.Module, inputs: Any, result: Any) -> None:
        module._parameters.update(kept.pop(module))

    handles = []
    for module in model.modules():
        if module._parameters:
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(narrow, always_call=True))
    try:
        with by_its_own_code(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
