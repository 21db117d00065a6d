"""A model's small twin: the architecture of the same config.json, some thousand random weights.

What makes an architecture is kept (kinds of layers, windows, caps, positions, routing), what makes
it large is not. A limit that rows of the run pass (a window, a chunk) is passed by the twin's short
rows too, one that they keep is kept. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING

from yelp_hpc.models.checkpoint import CHOSEN, EXPERTS, is_size
from yelp_hpc.models.load import attention_of

VOCABULARY = 96
LIMIT = 8
"""A limit of the twin's that its rows pass."""
ROWS = (21, 13, 17)
"""Tokens of the rows that a twin is asked about; each longer than `LIMIT`."""
KEPT = 32
"""A limit that each of its rows keeps, but not all of them packed one after the other."""

LARGEST = 60_000_000

Step = Literal["narrow", "mixed", "shallow", "whole"]
STEPS: tuple[Step, ...] = get_args(Step)
"""Small in every way; with its kinds of layers in turn; with few layers; as it is."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim",
           "embedding_dim", "hidden_size_global", "lru_width")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads",
          "swa_num_attention_heads")  # fmt: skip
_GROUPS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "kv_n_heads",
           "swa_num_key_value_heads")  # fmt: skip
_HEAD_DIM = ("head_dim", "kv_channels", "attention_head_dim", "d_kv", "dim_head", "global_head_dim",
             "swa_head_dim")  # fmt: skip
# sizes that nothing else depends on, by a part of their name
_INNER = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff", "dim_ff", "inner_dim",
    "expert_size", "ff_dim", "expansion_hidden",
)  # fmt: skip
_VOCABULARY = ("n_vocab", "padded_vocab_size", "encoder_hash_byte_group_vocab")
LIMITS = (
    "sliding_window", "attention_chunk_size", "index_topk", "keep_window_size", "window_size",
    "attention_window_size", "local_attention_window_len", "local_attention", "block_size",
    "local_attn_chunk_length", "sparse_topk", "indexer_topk", "indexer_budget",
    "sliding_window_size",
)  # fmt: skip
"""Keys that bound how far a token sees: in rows that are longer, attention is not full."""
_PERIODS = (
    "attn_layer_period", "global_attn_every_n_layers", "full_attention_interval",
    "layer_group_size", "sliding_window_pattern", "_sliding_window_pattern",
    "no_rope_layer_interval",
    "interleave_moe_layer_step", "expert_layer_period", "every_n_layers",
)  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_ssm": 128,
          "mamba_num_heads": 8, "mamba_head_dim": 16, "n_mamba_heads": 8,
          "mamba_headdim": 16}  # fmt: skip
_SMALL = {
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16,
    "q_lora_rank": 24, "index_head_dim": 16, "index_n_heads": 2, "mamba_chunk_size": 8,
    "chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_d_state": 16, "state_size": 16,
    "ssm_state_size": 16, "n_group": 2, "topk_group": 1, "num_expert_group": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "hidden_size_per_layer_input": 8,
    "laurel_rank": 8, "time_step_rank": 8, "mamba_dt_rank": 8,
    "zero_expert_num": 1, "o_lora_rank": 16, "o_groups": 2,
    "linear_head_dim": 16, "linear_num_heads": 4, "hc_lowrank": 16, "ple_embed_dim": 64,
    "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "indexer_n_heads": 2,
    "indexer_head_dim": 16, "indexer_compress_ratio": 4, "encoder_cross_output_size": 128,
    "num_nextn_predict_layers": 0, "n_shared_experts": 1, "moe_layer_end_index": 7,
}  # fmt: skip


def limits(values: Mapping[str, Any]) -> dict[str, int]:
    """How many tokens a token sees at most, by each key of a config that bounds it."""
    found = {key: values[key] for key in LIMITS if is_size(values.get(key))}
    block, blocks = values.get("index_block_size"), values.get("index_topk_blocks")
    if is_size(block) and is_size(blocks):
        found["index_topk_blocks"] = int(block) * int(blocks)
    return found


def twins(config: Any, longest: int, changes: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Smaller configs of the same architecture, the smallest first.

    `config`: transformers' object of the text model; `longest`: tokens of the longest row;
    `changes`: keys with other values.
    """
    for step in STEPS:
        values = _values(config, longest, step) | dict(changes or {})
        try:
            yield type(config)(**values)
        except Exception:  # sizes that this architecture ties together
            continue


def twin(config: Any, longest: int, changes: Mapping[str, Any] | None = None) -> Any | None:
    """The smallest twin that can be built, in evaluation mode, fp32; None if none can.

    `config`: transformers' object, perhaps of a wrapper around the text model.
    """
    text = config.get_text_config(decoder=True)
    named = text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config
    if type(named) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(named)]
    for small in twins(text, longest, changes):
        try:
            model = random_model(architecture, small, attention_of(named))
            with torch.no_grad():
                model(input_ids=torch.arange(3, 8).unsqueeze(0), use_cache=False)
        except Exception:  # as above
            continue
        return model
    return None


def random_model(architecture: Any, config: Any, attention: str) -> Any:
    """A causal LM with weights drawn so that no part of it is silent, the same at each call."""
    with torch.device("meta"):
        size = sum(p.numel() for p in architecture._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} weights are too many for a twin")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architecture._from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )
        for parameter in model.parameters():  # norms of one and biases of zero would hide faults
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape) * 0.1
                parameter.data += noise.to(parameter.dtype)
    return model.eval()


def _values(config: Any, longest: int, step: Step) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    for key in ("architectures", "transformers_version", "model_type", "quantization_config",
                "dtype", "torch_dtype", "_name_or_path", "auto_map"):  # fmt: skip
        values.pop(key, None)
    return _smaller(values, longest, step)


def _smaller(values: dict[str, Any], longest: int, step: Step) -> dict[str, Any]:
    values.pop("num_hidden_layers" if "encoder_layers" in values else "", None)
    layers = _first(values, _LAYERS) or 2
    count = layers if step == "whole" else _enough_layers(values, layers)
    for key, value in list(values.items()):
        if isinstance(value, list) and len(value) == layers and layers > count:
            values[key] = _pattern(value, count) if step == "mixed" else value[:count]
        elif key in _LAYERS or key in ("encoder_layers", "num_decoder_layers"):
            values[key] = count
        elif isinstance(value, str) and len(value) == layers and set(value) <= set("M*-E"):
            values[key] = "".join(_pattern(value, count))
        elif key.endswith("_config") and isinstance(value, dict) and key != "per_layer_config":
            values[key] = _smaller(value, longest, step)
    own = values.get("per_layer_config")  # of single layers, by their index
    if isinstance(own, dict):
        values["per_layer_config"] = {i: one for i, one in own.items() if int(i) < count}
    if "num_kv_shared_layers" in values:
        values["num_kv_shared_layers"] = min(values["num_kv_shared_layers"] or 0, 1)
    for key in values:
        if key.startswith("vocab_size") or key in _VOCABULARY:
            values[key] = VOCABULARY
    for i, key in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        if key in values:
            values[key] = i
    for key in EXPERTS:
        if values.get(key):
            values[key] = 4
    for key in CHOSEN:
        if values.get(key):
            values[key] = min(2, values[key] if isinstance(values[key], int) else 2)
    for key, limit in limits(values).items():
        values[key] = LIMIT if limit < longest else KEPT
    if "index_topk_blocks" in values:
        values["index_block_size"] = 1
    if step in ("narrow", "mixed"):
        _narrow(values)
        for one in (values.get("per_layer_config") or {}).values():
            _narrow(one)
    return values


def _narrow(values: dict[str, Any]) -> None:
    hidden, heads = _first(values, _HIDDEN), _first(values, _HEADS)
    groups = _first(values, _GROUPS)
    head_dim = (
        values.get("head_dim") or values.get("kv_channels") or values.get("attention_head_dim")
    )
    rope_dim, wide = values.get("qk_rope_head_dim"), values.get("attention_hidden_size")
    few, size = 4, 16
    # frequencies and sections of rotations are given for a head's own width
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if _lists(rope) and hidden and heads:
        size = head_dim or hidden // heads
    for key in _HEADS:
        if values.get(key):
            values[key] = few
    for key in _GROUPS:
        if values.get(key):
            values[key] = few if groups == heads else min(2, values[key])
    for key in _HEAD_DIM:
        if values.get(key):
            values[key] = size
    for key in _HIDDEN:
        if values.get(key):
            values[key] = few * size
    for key, value in values.items():
        if any(part in key for part in _INNER) and value and not isinstance(value, bool):
            values[key] = [64] * len(value) if isinstance(value, list) else 64
    for small in (_SMALL, _MAMBA):
        for key, value in small.items():
            if isinstance(values.get(key), int) and not isinstance(values[key], bool):
                values[key] = value
    if values.get("rotary_dim"):
        values["rotary_dim"] = size // 2
    if "qk_rope_head_dim" in values and "qk_nope_head_dim" in values:
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
        if head_dim:
            turned = head_dim == rope_dim
            values["head_dim"] = values["qk_rope_head_dim" if turned else "qk_head_dim"]
    if wide and hidden:
        values["attention_hidden_size"] = few * size * wide // hidden
        if values.get("attention_head_dim"):
            values["attention_head_dim"] = values["attention_hidden_size"] // few
    if "expand" in values and "num_heads" in values:
        values.update(expand=2, num_heads=8, head_dim=few * size // 4)


def _lists(rope: Any) -> bool:
    if isinstance(rope, Mapping):
        return any(_lists(value) for value in rope.values())
    return isinstance(rope, list)


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name)), None)


def _enough_layers(values: Mapping[str, Any], layers: int) -> int:
    """How many of the first layers hold every kind of layer that there is; at least 2."""
    if values.get("encoder_layers"):
        return 2
    count = 2
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers and layers > 1:
            kinds = {str(one) for one in value}
            if len(kinds) <= 4:
                count = max(count, 1 + max(list(map(str, value)).index(kind) for kind in kinds))
        if key in _PERIODS and isinstance(value, int) and value > 1:
            count = max(count, value)
    return min(layers, max(count, 2), 8)


def _pattern(value: Sequence[Any], count: int) -> list[Any]:
    """The kinds of a list of layers in turn."""
    kinds = [one for i, one in enumerate(value) if one not in value[:i]]
    return (kinds * count)[:count]
