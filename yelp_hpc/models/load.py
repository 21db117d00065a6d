"""A causal LM and its tokenizer from a local folder.

ChatGLM3 is loaded by the native classes here, any other decoder by transformers. Code that comes
with a checkpoint is never run, and `.bin` weights are read as tensors only. Reads the model folder.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from yelp_hpc.config import DTYPES
from yelp_hpc.errors import RequestError, first_line
from yelp_hpc.models.chatglm3.model import ChatGLMConfig
from yelp_hpc.models.chatglm3.tokenizer import ChatGLMTokenizer
from yelp_hpc.models.checkpoint import (
    check_family,
    read_config,
    read_json,
    tokenizer_missing,
    weight_files,
)
from yelp_hpc.models.weights import (
    READING,
    cannot_load,
    check_fit,
    check_sound,
    last_line,
    not_finite,
    wrong_key,
)

# PEFT asks every model that it wraps for a name that transformers calls old.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

TORCH_DTYPES = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}

# The attention's inputs of each architecture family, the first that a model has.
ATTENTION_PROJECTIONS = (
    ("query_key_value",),  # ChatGLM3, GPT-NeoX, Falcon, BLOOM
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, GLM-4, Mistral, Gemma, SmolLM
    ("qkv_proj",),  # Phi-3
    ("c_attn",),  # GPT-2
    ("Wqkv",),  # MPT, DBRX
    ("q_proj", "v_proj"),  # CodeGen and others that name keys otherwise
    ("q_proj", "kv_b_proj"),  # DeepSeek and its like: latent keys and values
    ("q_b_proj", "kv_b_proj"),
    ("in_proj_qkvz",),  # Qwen3-Next's linear attention
    ("in_proj",),  # Mamba and its like
)

# Parts of a model that see and hear: text does not go through them.
_TOWERS = r".*(vision|visual|image|img|audio|speech).*"


def check_native(folder: Path) -> dict[str, Any]:
    """The folder's config, if a native class of here or of transformers loads it as a causal LM.

    Raises:
        RequestError: the model needs its own code, is ChatGLM2 or GLM-4 under ChatGLM3's
            model_type, or is no causal LM.
    """
    config = read_config(folder)
    kind = config["model_type"]
    if kind == ChatGLMConfig.model_type:
        check_family(folder, config)
    elif kind not in CONFIG_MAPPING:
        why = "needs its own code (auto_map)" if "auto_map" in config else "is unknown"
        raise RequestError(
            f"model_type {kind} in {folder} {why}: trust_remote_code is off; "
            "use a model that transformers knows"
        )
    elif CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RequestError(f"model_type {kind} in {folder} is no decoder-only language model")
    return config


def model_config(folder: Path) -> Any:
    """transformers' configuration object of a folder that `check_native` accepts.

    Raises:
        RequestError: the architecture does not take its values.
    """
    check_native(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class checks in its own way
        words = f"{folder / 'config.json'} cannot be used: {last_line(error)}"
        raise (wrong_key(folder, error) or RequestError(words)) from None


def attention_of(config: Any) -> str:
    """Which of transformers' attentions computes a model as it was trained.

    sdpa, where it has one and caps no scores, else eager. `config`: transformers' object.
    """
    kind = type(config)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    plain = getattr(architecture, "_supports_sdpa", True) and not capped
    return "sdpa" if plain else "eager"


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a local model folder.

    Raises:
        RequestError: names what is missing or does not fit.
    """
    folder = Path(path)
    config = check_native(folder)
    native = config["model_type"] == ChatGLMConfig.model_type
    if missing := tokenizer_missing(folder, native):
        raise RequestError(f"{folder} has no tokenizer: {missing} is missing")
    try:
        kind: Any = ChatGLMTokenizer if native else AutoTokenizer
        options: dict[str, Any] = {} if native else {"trust_remote_code": False}
        tokenizer = kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise RequestError(
            f"the tokenizer in {folder} cannot be loaded: {first_line(error)}"
        ) from None
    rows = config.get("padded_vocab_size") if native else None
    if rows is not None and tokenizer.vocab_size > rows:
        raise RequestError(
            f"tokenizer.model in {folder} makes {tokenizer.vocab_size} tokens, but the model has "
            f"{rows} (padded_vocab_size): they do not belong together"
        )
    return tokenizer


def check_tokenizer(tokenizer: Any, folder: Path) -> int:
    """The id that ends a sequence: the tokenizer's, else that of the model's own config.

    Raises:
        RequestError: there is none, or tokens have no row in the model's embedding.
    """
    config = model_config(folder).get_text_config(decoder=True)
    rows = int(getattr(config, "padded_vocab_size", None) or config.vocab_size)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if t not in special}
    beyond = [i for i in vocabulary.values() if i >= rows]
    if beyond:
        raise RequestError(
            f"the tokenizer in {folder} makes ids up to {max(beyond)}, but the model's embedding "
            f"has {rows} rows (vocab_size): they do not belong together"
        )
    end = tokenizer.eos_token_id
    if end is None:
        path = folder / "generation_config.json"
        named = read_json(path).get("eos_token_id") if path.is_file() else None
        end = named if named is not None else getattr(config, "eos_token_id", None)
        end = end[0] if isinstance(end, list) and end else end
    if not isinstance(end, int) or isinstance(end, bool):
        raise RequestError(
            f"the tokenizer in {folder} has no end-of-sequence token, and config.json names no "
            "eos_token_id: set eos_token in tokenizer_config.json"
        )
    if not 0 <= end < rows:
        raise RequestError(
            f"the end-of-sequence token in {folder} is {end}, but the model's embedding has {rows} "
            "rows (vocab_size): tokenizer and model do not belong together"
        )
    return end


def load_model(
    path: str | Path, dtype: torch.dtype | str, attn_implementation: str | None = None
) -> Any:
    """The causal LM of a local model folder, in evaluation mode, on the CPU.

    `dtype`: a torch dtype, or fp32, fp16, bf16; `attn_implementation`: None for that of
    `attention_of`.

    Raises:
        RequestError: a shard is damaged or missing, the config does not fit the weights, or the
            model would need its own code.
    """
    folder = Path(path)
    config = model_config(folder)
    files = weight_files(folder)
    if isinstance(dtype, str):
        if dtype not in TORCH_DTYPES:
            raise RequestError(f"unknown precision {dtype!r}: one of {', '.join(DTYPES)}")
        dtype = TORCH_DTYPES[dtype]
    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation or attention_of(config),
            **READING,
        )
    except Exception as error:  # whatever a torn file makes the readers raise
        raise cannot_load(folder, files, error) from None
    check_fit(folder, info)
    check_sound(folder, [], list(not_finite(model.named_parameters())))
    return model.eval()


def towers(model: nn.Module) -> str | None:
    """A pattern of the modules that no text goes through, for peft; None without any."""
    seen = any(re.fullmatch(_TOWERS, name) for name, _ in model.named_modules())
    return _TOWERS if seen else None


def lora_targets(model: nn.Module, requested: list[str] | None) -> list[str]:
    """Modules to adapt: those requested, or the architecture's query, key and value projections.

    A name stands for every module of that name, as in peft, but for those of `towers`.

    Raises:
        RequestError: a name matches nothing; lists the model's names.
    """
    linear = (n for n, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    names = [name for name in linear if not re.fullmatch(_TOWERS, name)]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if requested is None:
        for family in ATTENTION_PROJECTIONS:
            if set(family) <= set(leaves):
                return list(family)
        raise RequestError(
            f"no default lora.target for {type(model).__name__}: "
            f"set it to some of {', '.join(leaves)}"
        )
    unmatched = [t for t in requested if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched or not requested:
        raise RequestError(
            f"lora.target {', '.join(unmatched) or '(empty)'} matches no linear module of "
            f"{type(model).__name__}; it has {', '.join(leaves)}"
        )
    return list(requested)
