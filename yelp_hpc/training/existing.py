"""An adapter that exists in place of a training: held against the base model, then taken whole.

Reads the adapter's folder and the model's config; writes `train/adapter/`, whose marker says what
was taken from where, and what its own makers recorded of its training.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from yelp_hpc.cache import is_hub_id
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError, all_problems
from yelp_hpc.models.adapter_source import AdapterSource, find_adapter
from yelp_hpc.models.checkpoint import tensor_entries
from yelp_hpc.models.local import folder_fingerprint
from yelp_hpc.rundir.files import is_complete, read_object, write_bytes, write_marker
from yelp_hpc.rundir.origin import require_own_adapter
from yelp_hpc.rundir.paths import ADAPTER_FILES, WEIGHTS, RunPaths

Shapes = Mapping[str, tuple[int, ...]]
_NAMED = 5


def take_adapter(paths: RunPaths, config: Config, model_path: Path) -> None:
    """Take the adapter that `train.adapter` names as this run's; nothing where it is there.

    Raises:
        RequestError: it is not there, no LoRA adapter, of another base, or does not fit the model.
        StageError: `train/adapter` holds another one.
    """
    source = str(config.train.adapter)
    if is_complete(paths.adapter):
        require_own_adapter(paths, config)
        print(f"train: already taken ({paths.adapter})", file=sys.stderr)
        return
    found = find_adapter(source)
    assert found is not None
    check_base(found, paths, config, model_path)
    check_shapes(found, model_path)
    for name in ADAPTER_FILES:
        write_bytes(paths.adapter / name, (found.folder / name).read_bytes())
    model = config.model.model_dump(mode="json")
    write_marker(paths.adapter, list(ADAPTER_FILES), taken={**found.record(), "model": model})
    print(f"train: nothing is trained, took {described(found)}", file=sys.stderr, flush=True)


def described(found: AdapterSource) -> str:
    """What an adapter is: rank, modules and variant, as its own file has them."""
    settings = found.settings
    modules = settings.get("target_modules")
    names = ", ".join(sorted(modules)) if isinstance(modules, list) else str(modules)
    variants = [name for name in ("use_dora", "use_rslora") if settings.get(name)]
    variant = "".join(f", {name.removeprefix('use_')}" for name in variants)
    return f"{found.name}: rank {settings.get('r')} on {names}{variant}"


def check_base(found: AdapterSource, paths: RunPaths, config: Config, model_path: Path) -> None:
    """Refuse an adapter that says of itself that it belongs to another base model.

    Raises:
        RequestError: the base of its run, its folder or its Hub id is another one.
    """
    mine = (read_object(paths.run_json).get("model") or {}).get("fingerprint")
    mine = mine or folder_fingerprint(model_path)
    named = str(found.settings.get("base_model_name_or_path") or "")
    theirs = ""
    if found.run is not None:
        theirs = str((read_object(found.run.run_json).get("model") or {}).get("fingerprint") or "")
    elif named and Path(named).expanduser().is_dir():
        theirs = folder_fingerprint(Path(named).expanduser())
    other = bool(theirs) and theirs != mine
    if not theirs and is_hub_id(named) and is_hub_id(config.model.path):
        other = named.lower() != config.model.path.lower()
    if other:
        raise RequestError(
            f"the adapter {found.name} was trained on another base model ({named or 'unnamed'}) "
            f"than model.path {config.model.path}: their weights differ"
        )
    if not theirs:
        print(
            f"train: warning: the base of {found.name} is called {named or 'nothing'} and is not "
            "here: that its modules and shapes fit this model is all that could be checked",
            file=sys.stderr,
        )


def check_shapes(found: AdapterSource, model_path: Path) -> None:
    """Refuse an adapter whose tensors are not those that its settings make on this model.

    Raises:
        RequestError: names the tensors that are missing, left over or of another shape.
    """
    wanted, there = wanted_shapes(found, model_path), file_shapes(found.folder / WEIGHTS)
    problems = [*_differences(wanted, there)]
    if problems:
        headline = f"the adapter {found.name} does not fit the model in {model_path}:"
        raise RequestError(all_problems(headline, problems, _NAMED))


def _differences(wanted: Shapes, there: Shapes) -> Iterator[str]:
    for name in sorted({*wanted, *there}):
        if name not in there:
            yield f"{name} is missing"
        elif name not in wanted and name.endswith(".base_layer.weight"):  # as peft saves embeddings
            yield (
                f"{name} is a weight of the base model, which no adapter may replace: where it is "
                "unchanged, save the adapter with `save_pretrained(…, save_embedding_layers=False)`"
            )
        elif name not in wanted:
            yield f"{name} belongs to no module of the model"
        elif wanted[name] != there[name]:
            yield f"{name} is {there[name]}, the model wants {wanted[name]}"


def wanted_shapes(found: AdapterSource, model_path: Path) -> Shapes:
    """The tensors that the adapter's settings make on the model; no weight is loaded.

    Raises:
        RequestError: peft cannot apply the settings to this model.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from yelp_hpc.models.load import model_config

    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(model_config(model_path))
            settings = PeftConfig.from_pretrained(str(found.folder))
            tuned = get_peft_model(model, settings)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise RequestError(f"the adapter {found.name} does not fit the model: {error}") from None
    state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def file_shapes(path: Path) -> Shapes:
    """The tensors of a safetensors file, from its head alone.

    Raises:
        StageError: it is torn.
    """
    try:
        return {name: tuple(entry["shape"]) for name, entry in tensor_entries(path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise StageError(f"{path} is torn or no safetensors file") from None
