"""What lies in a model folder, judged before anything is loaded: configuration, weight files.

Reads `config.json`, `tokenizer_config.json`, the weight index and the weight files (safetensors:
their headers; `.bin`: all, for they carry checksums). Nothing here imports torch, and nothing runs
code of the folder.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.rundir.files import leads_out, parse_json
from yelp_hpc.rundir.paths import ADAPTER_CONFIG

WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
# Read a text from both its ends; with is_decoder in their config they read it from the start alone.
ENCODERS = frozenset({
    "albert", "bert", "bert-generation", "big_bird", "camembert", "convbert", "data2vec-text",
    "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "flaubert", "funnel",
    "longformer", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod",
})  # fmt: skip
# What no folder of theirs can be used for.
UNFIT = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "drafts for another model and is no language model by itself",
    ),
    "reformer": "compares tokens that fall into the same random bucket, and trains at one length",
}
# Heads that answer otherwise than with words, by the end of the class that config.json names.
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
         "ForMultipleChoice", "RewardModel", "ForEmbedding")  # fmt: skip
_PACKED = re.compile(
    r"(qweight|qzeros|weight_packed|weight_scale(_inv)?|proj_blocks|\.SCB|absmax)$"
)
SIZES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"),
    "heads": (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
        "decoder_attention_heads",
    ),
    "vocabulary": ("padded_vocab_size", "vocab_size"),
    "groups": ("multi_query_group_num", "num_key_value_heads", "num_kv_heads"),
    "head_dim": ("kv_channels", "head_dim"),
    "inner": ("ffn_hidden_size", "intermediate_size", "n_inner", "ffn_dim"),
}
"""Size of a decoder → what config.json calls it, of one architecture or another."""
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
          "num_selected_experts", "experts_per_token", "top_k_experts")  # fmt: skip
"""What config.json calls the number of a layer's experts, and of those that a token takes."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""What config.json calls the longest text that a model was made for."""
_ABOVE_0 = frozenset({
    "rope_theta", "global_rope_theta", "local_rope_theta", "rope_local_base_freq",
    "rotary_emb_base", "rope_ratio", "factor",
})  # fmt: skip
_MOST_LAYERS = 10_000
_EPSILON = ("norm_eps", "norm_epsilon")
_SHARES = ("dropout", "_pdrop")
_WITH_NUMBERS = ("text_config", "rope_parameters", "rope_scaling")
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestError: the file is missing, torn or something else.
    """
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{path.parent} is no model folder: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read: {error}; fetch the model again") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path} does not hold a JSON object; fetch the model again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a local model folder.

    Raises:
        RequestError: there is none, or it names no model_type.
    """
    if not folder.is_dir():
        raise RequestError(f"model folder {folder} does not exist; fetch the model first")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise RequestError(f"{folder / 'config.json'} names no model_type: not a model's config")
    return config


def tokenizer_missing(folder: Path, native: bool) -> str:
    """The files that a tokenizer could be read from, "" if one is there; `native`: ChatGLM3's."""
    wanted = ("tokenizer.model",) if native else TOKENIZERS
    return "" if any((folder / name).is_file() for name in wanted) else " or ".join(wanted)


def check_folder(folder: Path, tokenizer: bool = True) -> dict[str, Any]:
    """The config of a folder that can hold a causal LM, as far as its files tell.

    Args:
        tokenizer: there must be one.

    Raises:
        RequestError: naming everything that is wrong: it is an adapter, GGUF, quantised, an encoder
            or an encoder-decoder, or its weights or its tokenizer are missing or damaged.
    """
    check_kind(folder)
    config = read_config(folder)
    problems = list(config_problems(config))
    native = config["model_type"] == "chatglm"
    if tokenizer and (missing := tokenizer_missing(folder, native)):
        problems.append(f"it has no tokenizer: {missing} is missing")
    if len(problems) == 1:
        raise RequestError(f"{folder} cannot be used: {problems[0]}")
    if problems:
        raise RequestError(all_problems(f"{folder} cannot be used:", problems))
    if sizes := [*_sizes(config), *_numbers(config)]:
        raise RequestError(f"{folder / 'config.json'} cannot be used: {'; '.join(sizes)}")
    if native:
        check_family(folder, config)
    files = weight_files(folder, whole=False)
    if form := next((form for file in files if (form := _quantised(file))), None):
        raise RequestError(f"{folder} cannot be used: {quantised(form)}")
    return config


def check_kind(folder: Path) -> None:
    """Check that a folder holds a model, not something made from one.

    Raises:
        RequestError: it is an adapter, has one beside the model, or is GGUF.
    """
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if adapter and (folder / "config.json").is_file():
        raise RequestError(
            f"{folder} holds an adapter beside a model, which would be loaded into it unasked: "
            f"move {ADAPTER_CONFIG} and its weights to a folder of their own (train.adapter)"
        )
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    if adapter:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
        raise RequestError(
            f"{folder} is an adapter, not a model: set model.path to the model that it was trained "
            f"on ({base})"
        )
    if any(folder.glob("*.gguf")):
        raise RequestError(
            f"{folder} holds GGUF, a format to run models and not to train them: use the model's "
            "own folder, with config.json and safetensors"
        )


def config_problems(config: dict[str, Any]) -> Iterator[str]:
    """Why a model of this config.json cannot be trained and scored, whatever its weights."""
    kind = config["model_type"]
    if config.get("is_encoder_decoder"):
        yield f"{kind} is an encoder-decoder: use a decoder, as Llama, Qwen or ChatGLM3 are"
    elif kind in ENCODERS and not config.get("is_decoder"):
        yield f"{kind} is an encoder, no decoder: use a decoder, as Llama, Qwen or ChatGLM3 are"
    elif kind in UNFIT:
        yield f"{kind} {UNFIT[kind]}: use a decoder, as Llama, Qwen or ChatGLM3 are"
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        if str(name).endswith(HEADS):
            yield f"it is a {name}, whose head gives no words: use the model that it was made from"
    inner = config.get("text_config")
    settings = config.get("quantization_config") or config.get("compression_config")
    if isinstance(inner, dict):
        settings = settings or inner.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        yield quantised(str(method or "quantization_config"))


def is_size(value: object) -> TypeGuard[int]:
    """Whether a value is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _sizes(config: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is no size; a list has one a layer, none for a layer that does without."""
    for name in (name for names in (*SIZES.values(), POSITIONS) for name in names):
        value = config.get(name)
        if name == "head_dim" and value == 0 and config.get("kv_lora_rank"):
            continue  # the width of what is rotated, where others have the rest
        each = value if isinstance(value, list) and value else [value]
        good = all(is_size(one) or (one == 0 and each is value) for one in each)
        if value is not None and not good:
            yield f"{where}{name} is {value!r}, and a positive whole number is wanted"
        if isinstance(value, int) and name in SIZES["layers"] and value > _MOST_LAYERS:
            yield f"{where}{name} is {value}, and no model has so many layers"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and is_size(groups) and heads % groups:
        yield (
            f"{where}num_key_value_heads is {groups}, which does not divide num_attention_heads, "
            f"{heads}"
        )
    if isinstance(inner := config.get("text_config"), dict):
        yield from _sizes(inner, f"{where}text_config.")
        return
    for size in ("hidden", "layers", "heads", "vocabulary"):
        named = [name for name in SIZES[size] if name in config]
        if named and all(config[name] is None for name in named):
            yield f"{where}{named[0]} is null, and a positive whole number is wanted"


def _numbers(config: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is no number above 0 of those that are divided by or raised to a power."""
    for name, value in config.items():
        if isinstance(value, dict) and (where or name in _WITH_NUMBERS):
            yield from _numbers(value, f"{where}{name}.")
        elif name.endswith(_SHARES) and value is not None:
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                yield f"{where}{name} is {value!r}, and a number from 0 to 1 is wanted"
        elif name not in _ABOVE_0 and not name.endswith(_EPSILON):
            continue
        elif value is not None or where.startswith("rope_parameters."):  # elsewhere: its default
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf):
                yield f"{where}{name} is {value!r}, and a number above 0 is wanted"


def quantised(method: str) -> str:
    """What is said of weights that are stored as fewer bits than they are computed with."""
    return (
        f"its weights are quantised ({method}), which is not supported: use the model that it was "
        "made from, with train.precision and infer.precision bf16 or fp16"
    )


def other_chatglm(config: dict[str, Any], published_as: str = "") -> str | None:
    """Which other family a config of model_type `chatglm` belongs to; None for ChatGLM3.

    Four generations share the model_type, and ChatGLM2's published config differs from ChatGLM3's
    in `_name_or_path` and `transformers_version` alone. `published_as`: a name found elsewhere in
    the folder.
    """
    names = f"{config.get('_name_or_path', '')} {published_as}".lower()
    first = ("position_encoding_2d", "inner_hidden_size", "gmask_token_id", "max_sequence_length")
    if any(key in config for key in first):
        return "ChatGLM (the first)"
    for marker, family in (
        ("glm-4", "GLM-4"),
        ("glm4", "GLM-4"),
        ("codegeex4", "GLM-4"),
        ("chatglm2", "ChatGLM2"),
        ("codegeex2", "ChatGLM2"),
        ("chatglm-6b", "ChatGLM (the first)"),
    ):
        if marker in names:
            return family
    if isinstance(config.get("eos_token_id"), list) or config.get("padded_vocab_size") == 151552:
        return "GLM-4"
    version = str(config.get("transformers_version", "")).split(".")
    if version[0] == "4" and len(version) > 1 and version[1].isdigit() and int(version[1]) < 30:
        return "ChatGLM2"
    return None


def check_family(folder: Path, config: dict[str, Any]) -> None:
    """Raise RequestError if a `chatglm` folder is not ChatGLM3."""
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path) if path.is_file() else {}
    published_as = str(tokenizer.get("name_or_path", ""))
    if tokenizer.get("tokenizer_class") == "ChatGLM4Tokenizer":
        published_as = "glm-4"
    family = other_chatglm(config, published_as)
    if family == "GLM-4":
        raise RequestError(
            f"{folder} is GLM-4 in its remote-code form (model_type chatglm), which is not "
            "supported; use the converted model, e.g. THUDM/glm-4-9b-hf or THUDM/GLM-4-9B-0414"
        )
    if family:
        raise RequestError(
            f"{folder} is {family}, not ChatGLM3 (both say model_type chatglm); "
            "it is not supported: use THUDM/chatglm3-6b-base"
        )


def weight_files(folder: Path, whole: bool = True) -> list[Path]:
    """The files that hold the weights, safetensors preferred, each there and whole at its ends.

    `whole`: `.bin` is whole in between, too.

    Raises:
        RequestError: names every file that is missing, truncated or torn.
    """
    for name in (SINGLE_WEIGHTS[0], WEIGHT_INDEXES[0], SINGLE_WEIGHTS[1], WEIGHT_INDEXES[1]):
        if not (folder / name).is_file():
            continue
        if name in SINGLE_WEIGHTS:
            files = [folder / name]
            break
        index = read_json(folder / name)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        named = shards.values() if isinstance(shards, dict) else ()
        whole_names = all(isinstance(shard, str) and not leads_out(shard) for shard in named)
        if not shards or not named or not whole_names or "metadata" not in index:
            raise RequestError(
                f"{folder / name} is no weight index (weight_map and metadata); "
                "fetch the model again"
            )
        files = [folder / shard for shard in sorted(set(shards.values()))]
        break
    else:
        for kind, name in (("safetensors", WEIGHT_INDEXES[0]), ("bin", WEIGHT_INDEXES[1])):
            if any(folder.glob(f"*-of-*.{kind}")):
                raise RequestError(
                    f"{folder} holds parts of the weights, but not their index {name}; "
                    "fetch the model again"
                )
        wanted = ", ".join((*SINGLE_WEIGHTS, *WEIGHT_INDEXES))
        raise RequestError(f"{folder} holds no weights: none of {wanted} is there")
    problems = [f"{path.name}: {what}" for path in files if (what := _damage(path, whole))]
    if problems:
        headline = f"weights in {folder} are damaged; fetch the model again"
        raise RequestError(all_problems(headline, problems))
    return files


def _damage(path: Path, whole: bool) -> str | None:
    if not path.is_file():
        return "missing"
    try:
        if path.suffix == ".safetensors":
            return _safetensors_damage(path)
        if zipfile.is_zipfile(path):
            if not whole:
                return None
            with zipfile.ZipFile(path) as archive:
                # torch maps the file into memory and leaves the checksums unread.
                torn = archive.testzip()
                return None if torn is None else f"checksum of {torn} is wrong"
        # torch's format of before 2020 has no directory to check; loading it checks it.
        with path.open("rb") as file:
            return None if file.read(1) == b"\x80" else "truncated or not a torch file"
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"


def _quantised(path: Path) -> str | None:
    """A type or a tensor by which a whole safetensors file shows that its weights are quantised."""
    if path.suffix != ".safetensors":
        return None
    for name, tensor in tensor_entries(path).items():
        kind = str(tensor.get("dtype", ""))
        if kind.startswith(("F8", "F6", "F4")):
            return kind
        if _PACKED.search(name):
            return str(name)
    return None


def tensor_entries(path: Path) -> dict[str, Any]:
    """What the head of a safetensors file that is whole says of each tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return _entries(parse_json(file.read(min(length, LONGEST_HEADER))))


def _entries(header: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _safetensors_damage(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length + 8 > size:
            return f"truncated: {size} bytes"
        if length > LONGEST_HEADER:
            return f"no safetensors file: its header would have {length} bytes"
        header = parse_json(file.read(length))
    try:
        ends = [int(entry["data_offsets"][1]) for entry in _entries(header).values()]
    except (AttributeError, TypeError, KeyError, IndexError, ValueError):
        return "its header is not that of a safetensors file"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{size} bytes instead of {expected}"
