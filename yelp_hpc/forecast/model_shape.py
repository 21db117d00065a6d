"""A decoder's sizes from its config.json: weights, layers, heads, LoRA parameters. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yelp_hpc.errors import RequestError
from yelp_hpc.models.checkpoint import CHOSEN, EXPERTS, SIZES, is_size

# The MLP has a gate beside its two projections, but not in these.
_UNGATED = frozenset({"gpt2", "gpt_neox", "gpt_bigcode", "opt", "phi", "falcon", "bloom"})
# transformers ties the two embeddings of these where config.json does not say; it leaves out what
# is its default.
_TIED = frozenset({
    "biogpt", "bloom", "cohere", "cohere2", "cohere2_moe", "ctrl", "ernie4_5", "ernie4_5_moe",
    "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text",
    "gemma4", "gemma4_text", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese",
    "granite_swa", "jetmoe", "lfm2", "lfm2_moe", "lfm3", "mamba", "minicpm3", "modernbert-decoder",
    "mpt", "openai-gpt", "opt", "recurrent_gemma", "smollm3", "starcoder2", "trocr", "vaultgemma",
    "xglm", "youtu", "zamba", "zamba2", "zaya",
})  # fmt: skip
# State spaces without attention: counted as if one head did their work.
_HEADLESS = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})
_FEW_HEADS = 1
# config.json of models that configs/ names, so that a plan needs no download.
KNOWN: dict[str, dict[str, Any]] = {
    "THUDM/chatglm3-6b-base": {
        "model_type": "chatglm", "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
        "multi_query_group_num": 2, "kv_channels": 128, "ffn_hidden_size": 13696,
        "padded_vocab_size": 65024,
    },
    "demo:smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only language model."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int
    inner: int
    """Width of the MLP."""
    vocabulary: int
    tied: bool
    gated: bool
    bias: int = 0
    """Biases of a layer."""
    stored: int = 0
    """Parameters as the files count them, where the sizes give another number; else 0."""

    @property
    def layer_weights(self) -> int:
        """Weights in the matrix products of all layers."""
        return self.layers * (self._query_key_value + self._output + self._mlp)

    @property
    def last_layer_saved(self) -> int:
        """Weights of the last layer that only the answer's positions go through."""
        return self._output + self._mlp

    @property
    def parameters(self) -> int:
        """All parameters: layers, norms, embeddings and vocabulary projection."""
        if self.stored:
            return self.stored
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        small = self.layers * (2 * self.hidden + self.bias) + self.hidden
        return self.layer_weights + embeddings + small

    def adapter_parameters(self, target: Sequence[str] | None, rank: int) -> int:
        """LoRA's parameters: rank × (in + out) of each adapted projection; an unknown name is 0."""
        q, kv, h, f = (
            self.heads * self.head_dim,
            self.groups * self.head_dim,
            self.hidden,
            self.inner,
        )
        sizes = {
            "q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h,
            "gate_proj": h + f, "up_proj": h + f, "down_proj": f + h,
            "query_key_value": h + q + 2 * kv, "dense": q + h,
            "dense_h_to_4h": h + (2 if self.gated else 1) * f, "dense_4h_to_h": f + h,
            "c_attn": h + q + 2 * kv,
        }  # fmt: skip
        return self.layers * rank * sum(sizes.get(name, 0) for name in self.lora_names(target))

    def lora_names(self, target: Sequence[str] | None) -> list[str]:
        """The last part of each adapted module's name; without `target` the architecture's own."""
        default: dict[str, Sequence[str]] = {
            "chatglm": ("query_key_value",),
            "gpt2": ("c_attn",),
        }
        own = default.get(self.model_type, ("q_proj", "k_proj", "v_proj"))
        return [name.rpartition(".")[2] for name in target or own]

    @staticmethod
    def reads(module: str) -> str:
        """What a module of a layer reads: hidden states, attention's context, the MLP's two."""
        inputs = {
            "o_proj": "context", "dense": "context", "gate_proj": "mlp", "up_proj": "mlp",
            "dense_h_to_4h": "mlp", "down_proj": "inner", "dense_4h_to_h": "inner",
        }  # fmt: skip
        return inputs.get(module, "hidden")

    @property
    def _query_key_value(self) -> int:
        return self.hidden * (self.heads + 2 * self.groups) * self.head_dim

    @property
    def _output(self) -> int:
        return self.heads * self.head_dim * self.hidden

    @property
    def _mlp(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.inner


def as_stored(
    shape: ModelShape, config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], where: str
) -> ModelShape:
    """The shape with all weights that the files hold, and the width that a token goes through.

    As it is where the sizes of config.json give the same number: a mixture of experts, a state
    space or an MLP of another form does not.

    Args:
        tensors: name → sizes, of every weight in the model's files; {} where they tell none.

    Raises:
        RequestError: how many experts there are, or a token goes through, is not said.
    """
    experts, chosen = (_expert_count(config, names) for names in (EXPERTS, CHOSEN))
    named = any(_EXPERT in name for name in tensors)
    stored = sum(map(math.prod, tensors.values()))
    if not named and (experts or 0) < 2:
        if not stored or abs(shape.parameters / stored - 1) < _NEAR:
            return shape
        experts = chosen = 1
    if not (experts and chosen and tensors):
        lacks = "its safetensors" if not tensors else f"{CHOSEN[0] if experts else EXPERTS[0]}"
        raise RequestError(
            f"{where} describes a mixture of experts, whose weights are counted in its files: "
            f"{lacks} would be needed to plan"
        )
    passed = 0.0
    for name, sizes in tensors.items():
        embedding = shape.vocabulary in sizes or "embed" in name or "wpe" in name
        if len(sizes) > 1 and not embedding:  # no norm either
            routed = _EXPERT in name or (len(sizes) == 3 and sizes[0] == experts)
            passed += math.prod(sizes) * (chosen / experts if routed else 1)
    attention = shape._query_key_value + shape._output
    width = (passed / shape.layers - attention) / ((2 + shape.gated) * shape.hidden)
    return replace(shape, inner=max(1, round(width)), stored=stored)


_EXPERT = ".experts."
_NEAR = 0.02


def _expert_count(config: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """A count of experts, of this config.json or of a part of it."""
    for name in names:
        if is_size(value := config.get(name)):
            return value
        if isinstance(value, list) and value and all(map(is_size, value)):  # one a layer
            return int(max(value))
    parts = (part for part in config.values() if isinstance(part, dict))
    return next((n for part in parts if (n := _expert_count(part, names))), None)


def model_shape(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that a config.json describes. `where` names it in the error.

    Raises:
        RequestError: names every size that is missing or no positive whole number.
    """
    inside = config.get("text_config") or config.get("global_config")  # BLT's largest part
    if isinstance(inside, Mapping):  # a wrapper for images or sound around the language model
        kept = ("tie_word_embeddings", "vocab_size")
        config = {**{key: config.get(key) for key in kept}, **inside}
    kind = str(config.get("model_type", ""))
    if isinstance(config.get("layers_block_type"), list):  # may be all that says how many
        config = {"num_hidden_layers": len(config["layers_block_type"]), **config}
    problems: list[str] = []

    def size(names: Sequence[str], default: int | None = None) -> int:
        value = next((config[name] for name in names if config.get(name) is not None), default)
        if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
            value = max(value)  # a width a layer
        if not is_size(value):
            named = next((name for name in names if config.get(name) is not None), names[0])
            problems.append(f"{named} is {value!r}")
            return 1
        return int(value or 1)

    found = {
        key: size(SIZES[key], _FEW_HEADS if key == "heads" and kind in _HEADLESS else None)
        for key in ("hidden", "layers", "heads", "vocabulary")
    }
    hidden, heads = found["hidden"], found["heads"]
    chatglm = config.get("model_type") == "chatglm"
    grouped = SIZES["groups"][:1] if chatglm else SIZES["groups"][1:]
    one = kind in ("falcon", "gpt_bigcode") and config.get("multi_query", True)
    groups = 1 if one and not config.get("new_decoder_architecture") else size(grouped, heads)
    head_dim = size(SIZES["head_dim"], max(1, hidden // heads))
    inner = size(SIZES["inner"], 4 * hidden)
    if problems:
        raise RequestError(f"{where} does not describe a decoder: {', '.join(problems)}")
    tied = config.get("tie_word_embeddings")
    biases = (heads + 2 * groups) * head_dim if chatglm or kind == "qwen2" else 0
    return ModelShape(
        model_type=kind,
        **found,
        groups=groups,
        head_dim=head_dim,
        inner=inner,
        tied=kind in _TIED if tied is None else bool(tied),
        gated=kind not in _UNGATED,
        bias=biases,
    )
