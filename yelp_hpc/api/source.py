"""Where a classifier comes from: a run, an adapter with our record, a merged model, the Hub.

Reads the records and markers in the folder; a Hub repository is downloaded into the cache. Imports
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yelp_hpc.cache import hub_folder, is_hub_id
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, all_problems, in_shell
from yelp_hpc.models.fetch import fetch_model
from yelp_hpc.rundir.files import damaged_files
from yelp_hpc.rundir.manifest import load_run, recorded_config
from yelp_hpc.rundir.origin import require_own_adapter
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, RunPaths

_RECORD = RunPaths("").run_json.name
_MODEL = "config.json"


@dataclass(frozen=True)
class Source:
    """A configuration, and what is loaded for it."""

    name: str
    """As the user gave it."""
    config: Config
    """With the base model's place in `model.path`."""
    adapter: Path | None
    """None: the model as it is."""


def find_source(
    source: str | Path, tuned: bool, base: str | None = None, revision: str | None = None
) -> Source:
    """Find what `source` names: a folder here, else a repository on the Hub.

    Args:
        tuned: False for the base model of a run or an adapter.
        base: folder or Hub id of the base model, in place of the recorded one.
        revision: of the Hub repository.

    Raises:
        RequestError: it is none of them, its adapter is missing or damaged, the repository does not
            exist or may not be read.
        StageError: the download fails, or the adapter is not the run's own.
    """
    folder = Path(source).expanduser().absolute()  # loaded later, from wherever one is then
    if not folder.is_dir():
        if not is_hub_id(str(source)):
            raise RequestError(
                f"{source} is neither a folder here nor a Hub repository's id (OWNER/NAME)"
            )
        folder = fetch_model(str(source), revision, hub_folder())
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
    if adapter is None and not (folder / _MODEL).is_file():
        config, adapter = _of_run(folder, tuned)
    else:
        config = recorded_config(_record(folder, str(source)))
        if adapter is None:
            base = str(folder)  # a merged model is its own base
            if not tuned:
                raise RequestError(f"{source} is a merged model: its base is not in it")
    if base is not None:
        if Path(base).expanduser().is_dir():
            base = str(Path(base).expanduser().absolute())
        model = config.model.model_copy(update={"path": base, "revision": None})
        config = config.model_copy(update={"model": model})
    elif not _findable(config.model.path):
        raise RequestError(
            f"the base model of {source}, {config.model.path}, is neither a folder here nor on the "
            "Hub: name its folder, Classifier(…, base='PATH')"
        )
    return Source(str(source), config, adapter if tuned else None)


def _of_run(folder: Path, tuned: bool) -> tuple[Config, Path]:
    run, config = load_run(folder)
    if tuned:
        if problems := damaged_files(run.adapter):
            raise RequestError(
                all_problems(f"{folder} has no finished adapter:", problems)
                + f"\nTrain it (python -m yelp_hpc run train --run {in_shell(folder)}), or ask for "
                "model='base'."
            )
        require_own_adapter(run, config)
    return config, run.adapter


def _record(folder: Path, named: str) -> Path:
    """The run.json that tells the prompt and the labels of an adapter or a merged model."""
    own = folder.resolve()
    places = [own / _RECORD]
    if own.parts[-2:] == RunPaths("").adapter.parts:
        places.append(own.parents[1] / _RECORD)
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise RequestError(
            f"{named} has no {_RECORD}, which tells the prompt and the labels: it was not made by "
            "`publish` or `export --merged`"
        )
    return found


def _findable(path: str) -> bool:
    return path.startswith("demo:") or "/" in path or Path(path).expanduser().is_dir()
