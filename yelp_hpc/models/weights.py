"""Whether a folder's weights are those of its config.json, and sound.

`check_shapes` compares names and shapes by the files' headers alone, `check_values` reads every
weight once, a tensor in memory at a time. Nothing of the model is built.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from yelp_hpc.errors import RequestError, all_problems, first_line
from yelp_hpc.models.checkpoint import read_config, weight_files
from yelp_hpc.rundir.changes import dotted

# Weights that nothing reads; checkpoints carry them or not.
_UNUSED_WEIGHTS = re.compile(r"rotary.*inv_freq$")
_PIECE = 1 << 22
"""Weights that are looked at at once."""


def check_shapes(folder: Path) -> list[str]:
    """The tensors of a folder that `check_native` accepts which its architecture does not read.

    Raises:
        RequestError: a weight is missing or has another shape than config.json says.
    """
    files = weight_files(folder, whole=False)
    auto: Any = AutoModelForCausalLM
    try:
        _, info = auto.from_pretrained(folder, device_map={"": "meta"}, **READING)
    except Exception as error:  # whatever a torn file makes the readers raise
        raise cannot_load(folder, files, error) from None
    check_fit(folder, info)
    return sorted(info.get("unexpected_keys", ()))


def check_values(folder: Path) -> None:
    """Read every weight.

    Raises:
        RequestError: a file cannot be read, or a weight is NaN or infinite.
    """
    files = weight_files(folder)
    sick: list[str] = []
    damaged: list[str] = []
    for file in files:
        try:
            sick += dict.fromkeys(not_finite(_tensors(file)))
        except Exception as error:  # as above
            damaged.append(f"{file.name}: {first_line(error)}")
    check_sound(folder, damaged, sick)


READING: dict[str, Any] = {
    "local_files_only": True,
    "trust_remote_code": False,
    "weights_only": True,
    "ignore_mismatched_sizes": True,  # reported by `check_fit`, all at once
    "output_loading_info": True,
}
"""How `from_pretrained` reads a folder."""


def check_fit(folder: Path, info: dict[str, Any]) -> None:
    """Check that no weight was missing or of another shape.

    Args:
        info: what `from_pretrained` says of its loading.

    Raises:
        RequestError: names each.
    """
    problems = []
    for name, found, expected in sorted(info.get("mismatched_keys", ())):
        line = f"{name} is {tuple(found)}, the config says {tuple(expected)}"
        if "word_embeddings" in name or "embed_tokens" in name or "output_layer" in name:
            line += " (wrong vocabulary size: padded_vocab_size or vocab_size)"
        problems.append(line)
    missing = [n for n in info.get("missing_keys", ()) if not _UNUSED_WEIGHTS.search(n)]
    problems += [f"{name} is missing" for name in sorted(missing)]
    if problems:
        headline = f"weights in {folder} do not fit its config.json"
        raise RequestError(all_problems(headline, problems))


def not_finite(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """The names of tensors that hold NaN or infinity."""
    for name, tensor in named:
        # A sum is finite exactly if every weight is; random bytes rarely make finite weights.
        floating = tensor.is_floating_point()
        if floating and not tensor.detach().sum(dtype=torch.float32).isfinite():
            yield name


def check_sound(folder: Path, damaged: list[str], sick: list[str]) -> None:
    """Raise RequestError if files are `damaged`, or tensors `sick`."""
    for what, problems in (("", damaged), (" (NaN or infinity)", sick)):
        if problems:
            headline = f"weights in {folder} are damaged{what}; fetch the model again"
            raise RequestError(all_problems(headline, problems))


def cannot_load(folder: Path, files: Iterable[Path], error: Exception) -> RequestError:
    """What a library's error on reading a folder means: the file to blame, if one is."""
    damaged = []
    for file in files:
        try:
            for _ in _tensors(file):
                pass
        except Exception as why:
            damaged.append(f"{file.name}: {first_line(why)}")
    if damaged:
        headline = f"weights in {folder} are damaged; fetch the model again"
        return RequestError(all_problems(headline, damaged))
    return wrong_key(folder, error) or RequestError(
        f"the model in {folder} cannot be loaded: {first_line(error)}"
    )


def wrong_key(folder: Path, error: Exception) -> RequestError | None:
    """What a library's error means if it comes of one key of config.json; None if of none.

    It is the key without which, at its default, the architecture can be built.
    """
    values = read_config(folder)
    leaves = [(key, value) for key, value in dotted(values) if key != "model_type"]
    if _builds(values):
        return None
    found = next(((k, v) for k, v in leaves if _builds(_without(values, k.split(".")))), None)
    if found is None:
        return None
    key, value = found
    why = re.sub(r"^\w+Error: (Field '\w+' )?", "", last_line(error))
    if isinstance(error, KeyError):
        why = "there is no such one"
    named = f"{key} is {repr(value)[:80]}: {why}"
    return RequestError(f"{folder / 'config.json'} cannot be used: {named}")


def last_line(error: BaseException) -> str:
    """Of a library's message the last line: of nested errors the innermost."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _without(values: dict[str, Any], key: list[str]) -> dict[str, Any]:
    first, *inner = key
    rest = {name: value for name, value in values.items() if name != first}
    within = values.get(first)  # a key may itself hold a dot
    return {**rest, first: _without(within, inner)} if inner and isinstance(within, dict) else rest


def _builds(values: dict[str, Any]) -> bool:
    """Whether a model can be built of a config.json, without its weights."""
    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            architecture._from_config(config)
    except Exception:  # each class checks in its own way
        return False
    return True


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, large ones in pieces."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        for name, shape in shapes.items():
            step = max(1, _PIECE // max(1, prod(shape[1:])))
            for row in range(0, shape[0] if shape else 1, step):
                # opened anew for each: what is mapped and read counts as memory
                with safe_open(file, framework="pt") as tensors:
                    part = tensors.get_slice(name)[row : row + step] if shape else None
                    yield name, tensors.get_tensor(name) if part is None else part
        return
    whole = zipfile.is_zipfile(file)  # torch's format of before 2020 cannot be mapped
    yield from torch.load(file, map_location="cpu", weights_only=True, mmap=whole).items()
