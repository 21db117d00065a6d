"""The LoRA adapter of a run: put on a base model, described in PEFT's own terms.

Reads and writes nothing; `checkpoint.write_adapter` writes the files.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from yelp_hpc.cache import DEMO_MODEL, demo_model_place
from yelp_hpc.config import Config
from yelp_hpc.models.load import lora_targets, towers
from yelp_hpc.models.packed.masks import derive_seed


def add_lora(model: Any, config: Config) -> Any:
    """`model` in PEFT's wrapper with a fresh adapter (fp32 whatever the base is), seeded.

    Raises:
        RequestError: lora.target names nothing in the model.
    """
    lora = config.lora
    targets = lora_targets(model, list(lora.target) if lora.target else None)
    torch.manual_seed(derive_seed(config.seed, "lora"))
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works as well
            lora_dropout=lora.dropout,
            target_modules=targets,
            exclude_modules=towers(model),
            task_type="CAUSAL_LM",
        ),
    )


def adapter_config(model: Any, config: Config) -> dict[str, Any]:
    """The content of adapter_config.json; equal settings give equal bytes (PEFT's sets do not).

    The base model is named as PEFT's Auto classes load it: a Hub id or a folder.
    """
    values = model.peft_config["default"].to_dict()
    demo = config.model.path == DEMO_MODEL
    values |= {
        "base_model_name_or_path": str(demo_model_place()) if demo else config.model.path,
        "revision": config.model.revision,
        "inference_mode": True,
    }
    return {key: _plain(values[key]) for key in sorted(values)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
