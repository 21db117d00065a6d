"""What a training step costs: tokens and reviews a second, FLOP utilisation, memory, time left.

Reads clocks and counters only.
"""

from __future__ import annotations

import os
import resource
import time
from collections import deque
from typing import Any

import torch
from torch import nn

from yelp_hpc.gpus import card_named
from yelp_hpc.models.packed.batch import PackedBatch


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the device can reach at best, None where it is not known.

    YELP_HPC_PEAK_TFLOPS gives it for a CPU or another card (per rank).
    """
    given = os.environ.get("YELP_HPC_PEAK_TFLOPS")
    if given:
        return float(given) * 1e12
    if device.type != "cuda" or precision == "fp32":
        return None
    card = card_named(torch.cuda.get_device_name(device))
    return None if card is None else card.rate(precision)


def flops_per_token(model: nn.Module) -> int:
    """Useful FLOPs of training one token: forward and the gradients of the activations.

    4 × the weights of the layers: frozen weights need no gradient of their own, embeddings are
    looked up, the vocabulary projection runs at two positions a sequence only. Attention's own
    products are left out (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    """
    skipped = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        skipped |= {id(parameter) for parameter in head.parameters()}
    return 4 * sum(p.numel() for p in model.parameters() if id(p) not in skipped)


class Meter:
    """Times steps; averages over the last ones."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str) -> None:
        self.device = device
        self.per_token = flops_per_token(model)
        self.peak = peak_flops(device, precision)
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.recent: deque[float] = deque(maxlen=50)
        self.slowest = 0.0
        self.forget()

    def forget(self) -> None:
        """Start anew after something that is no step."""
        self.positions = self.used = 0
        self.started = time.monotonic()

    def start(self) -> None:
        """A step begins."""
        self.forget()

    def add(self, batch: PackedBatch) -> None:
        """Count the tokens of a micro-batch of this step."""
        self.positions += batch.input_ids.numel()
        self.used += batch.prefix_length + sum(batch.lengths)

    def stop(self, tokens: int, examples: int, steps_left: int) -> dict[str, Any]:
        """The figures of the step that ends now; `tokens` and `examples` over all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = max(time.monotonic() - self.started, 1e-9)
        self.recent.append(seconds)
        self.slowest = max(self.recent)
        mfu = None
        if self.peak:
            mfu = round(tokens * self.per_token / seconds / (self.peak * self.world_size), 4)
        padding = 1 - self.used / self.positions if self.positions else 0.0
        return {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "examples_per_second": round(examples / seconds, 3),
            "padding_share": round(padding, 4),
            "mfu": mfu,
            "memory_bytes": memory,
            "eta_seconds": round(steps_left * sum(self.recent) / len(self.recent), 1),
        }
