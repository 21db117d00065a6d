"""Where an adapter that exists lies: a run's, a folder of PEFT's, or a Hub repository.

Needs neither torch nor peft. A Hub repository is downloaded into the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.cache import hub_folder, is_hub_id
from yelp_hpc.errors import RequestError, StageError, all_problems
from yelp_hpc.models.fetch import fetch_model
from yelp_hpc.rundir.files import damaged_files, read_marker, read_object, sha256_file
from yelp_hpc.rundir.modes import in_the_way
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, WEIGHTS, RunPaths


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's folder, and what its makers recorded of it."""

    name: str
    folder: Path
    run: RunPaths | None
    """The run that trained it, where it is one of ours and here."""

    @property
    def settings(self) -> dict[str, Any]:
        """The content of adapter_config.json. Raises `StageError` where it cannot be read."""
        return read_object(self.folder / ADAPTER_CONFIG)

    def record(self) -> dict[str, Any]:
        """What the adapter that is taken here is known by: name, hashes, who trained it on what."""
        marker = read_marker(self.folder) or {}
        return {
            "from": self.name,
            "sha256": sha256_file(self.folder / WEIGHTS),
            "config_sha256": sha256_file(self.folder / ADAPTER_CONFIG),
            "trained": marker.get("fingerprint"),
            "step": marker.get("step"),
        }


def find_adapter(source: str, download: bool = True) -> AdapterSource | None:
    """The adapter that `source` names; None for a Hub repository that is not to be downloaded.

    Raises:
        RequestError: nothing is there, it is no LoRA adapter in safetensors, or a run's that is
            not finished or not whole.
        StageError: the download fails.
    """
    path = Path(source).expanduser()
    if hinders := in_the_way(path):
        raise RequestError(hinders)
    run = None
    if path.is_dir():
        folder = path
        if RunPaths(path).run_json.is_file():
            run = RunPaths(path.resolve())
            folder = run.adapter
            if problems := damaged_files(folder):
                raise RequestError(all_problems(f"{source} has no finished adapter:", problems))
    elif is_hub_id(source) and not path.parent.is_dir():
        if not download:
            return None
        folder = fetch_model(source, None, hub_folder())
    else:
        raise RequestError(f"{source} is neither a folder here nor a Hub repository (OWNER/NAME)")
    found = AdapterSource(source, folder, run)
    if problems := list(_unfit(found)):
        raise RequestError(all_problems(f"the adapter {source} cannot be used:", problems))
    return found


def _unfit(found: AdapterSource) -> list[str]:
    path = found.folder / ADAPTER_CONFIG
    try:
        settings = found.settings
    except StageError:
        return [f"{path} is missing or no JSON object: it is no adapter's folder"]
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f"{path}: peft_type is {settings.get('peft_type')!r}; LORA is wanted")
    if settings.get("alora_invocation_tokens"):
        problems.append(f"{path}: alora_invocation_tokens: an aLoRA, which reads whole chats alone")
    if not (found.folder / WEIGHTS).is_file():
        other = (found.folder / "adapter_model.bin").is_file()
        why = "adapter_model.bin is a pickle; save it as safetensors" if other else "it is missing"
        problems.append(f"{found.folder / WEIGHTS}: {why}")
    return problems
