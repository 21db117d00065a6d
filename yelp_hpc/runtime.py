"""Defaults of OpenMP's runtime and of torch's allocator, which read the environment once.

To be set before torch is imported. Imports nothing of the package.
"""

from __future__ import annotations

import os

DEFAULTS = {
    # Its default spins for long at every barrier, which on a node that is shared with other work
    # costs many times the arithmetic.
    "GOMP_SPINCOUNT": "10000",
    # Huge pages for large tensors where the kernel gives them on request (PyTorch, "Inference
    # Performance Tuning on AWS Graviton Processors"): a step on a CPU takes 2 % less time and 8 %
    # more memory.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Micro-batches differ in size: segments that grow leave fewer holes ("CUDA semantics" of
    # PyTorch's notes).
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def set_runtime_defaults() -> None:
    """Set what the user's environment does not; a process started later inherits it."""
    older = "PYTORCH_CUDA_ALLOC_CONF"  # the name before torch 2.9: who set it meant it
    for name, value in DEFAULTS.items():
        if name == "PYTORCH_ALLOC_CONF" and older in os.environ:
            continue
        os.environ.setdefault(name, value)
