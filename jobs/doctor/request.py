"""What the doctor is asked about: the cluster, the configuration, the run, and where they meet.

Pure but for `inputs`, which looks at the model and the data.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yelp_hpc.cache import cache_folder, is_hub_id, model_problem
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, in_shell, nearest_path
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.doctor.probes import (
    cached_model,
    data_columns,
    first_file,
    is_folder,
    seen,
)
from yelp_hpc.models.checkpoint import check_kind
from yelp_hpc.models.door import ask
from yelp_hpc.rundir.modes import in_the_way
from yelp_hpc.settings import Frozen


@dataclass(frozen=True)
class Request:
    """The settings, and the names by which the user gave them."""

    cluster: ClusterConfig
    config: Config | None = None
    run: Path = field(default_factory=lambda: Path("runs"))
    record: dict[str, Any] | None = None
    """run.json, if the run has one."""
    config_file: str = "FILE"
    cluster_file: str | None = None
    stages_need_hub: bool = False
    run_named: bool = True
    own_binds: tuple[str, ...] | None = None
    """The binds of the cluster file, where `cluster` also has those that `submit` adds."""

    @property
    def binds(self) -> tuple[str, ...]:
        """The binds that the user wrote."""
        if self.own_binds is not None:
            return self.own_binds
        return self.cluster.container.binds if self.cluster.container else ()

    def recorded(self, section: str) -> dict[str, Any]:
        """A section of run.json, {} where there is none."""
        value = (self.record or {}).get(section)
        return value if isinstance(value, dict) else {}

    @property
    def gpus(self) -> int:
        """That each node of the training gets."""
        return self.cluster.resources("train").gpus or 0

    @property
    def ranks(self) -> int:
        """Ranks of the all-reduce: the GPUs, or two processes where there are none."""
        return self.gpus or 2

    @property
    def fetch(self) -> str:
        """The command that downloads what the config names."""
        found = f"python -m yelp_hpc fetch --config {in_shell(self.config_file)}"
        return f"{found} --cluster {in_shell(self.cluster_file)}" if self.cluster_file else found


class DataFile(Frozen):
    """A data file of the configuration."""

    key: str
    path: str
    state: str
    """`file`, or what is wrong with it."""
    near: str = ""
    columns: tuple[str, ...] | None = None


class Inputs(Frozen):
    """The model and the data as they lie here."""

    model: Path | None = None
    """Folder of the model: the configured one, or that in the cache."""
    problem: str = ""
    near: str = ""
    unfit: str = ""
    """Why the model cannot be used, in the words of every command."""
    notes: tuple[str, ...] = ()
    remote: bool = False
    """It is a Hub model that is not in the cache."""
    data: tuple[DataFile, ...] = ()


def inputs(config: Config) -> Inputs:
    """Look at the configured model and data files."""
    data = []
    for name in ("train", "test"):
        value = getattr(config.data, name)
        if config.data.source == "file" and value:
            data.append(_data_file(f"data.{name}", value, config.data.header))
    found: dict[str, Any] = {"data": tuple(data)}
    local = Path(config.model.path).expanduser()
    if is_folder(local):
        return Inputs(model=local.absolute(), **_judged(config, local), **found)
    cached = cached_model(config.model.path)
    if cached:
        return Inputs(model=cached, **_judged(config, cached), **found)
    if config.model.path.startswith("demo:"):
        return Inputs(**found)
    if "://" not in config.model.path and (hinders := in_the_way(local)):
        return Inputs(problem=hinders, **found)
    if is_hub_id(config.model.path) and not is_folder(local.parent):
        return Inputs(remote=True, **found)
    if seen(local) == "file":
        return Inputs(problem="is a file; name its folder", near=str(local.parent), **found)
    if page := re.search(r"//(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", config.model.path):
        return Inputs(problem="is the address of a page", near=page[1], **found)
    return Inputs(problem="there is no such folder", near=nearest_path(local), **found)


def _data_file(key: str, value: str, header: bool) -> DataFile:
    """A data file, or the first of a folder's or a glob's, with its columns."""
    path = Path(value).expanduser()
    state = seen(path)
    if "://" in value:
        return DataFile(key=key, path=value, state="is an address; download it")
    if hinders := in_the_way(path):
        return DataFile(key=key, path=value, state=hinders)
    if state == "folder" or (state == "missing" and glob.has_magic(value)):
        found = first_file(path)
        if found is None:
            return DataFile(key=key, path=value, state="holds no data file")
        path, state = found, seen(found)
    try:
        columns = data_columns(path, header) if state == "file" else None
    except RequestError as error:
        return DataFile(key=key, path=value, state=str(error))
    return DataFile(
        key=key,
        path=value,
        state=state,
        near="" if state == "file" else nearest_path(path),
        columns=None if columns is None else tuple(columns),
    )


def _judged(config: Config, folder: Path) -> dict[str, Any]:
    """What is wrong with the model's folder, and what is worth knowing."""
    try:
        check_kind(folder)
    except RequestError as error:
        return {"unfit": str(error)}
    if config.model.path.startswith("demo:"):
        return {"problem": model_problem(folder)}
    answer = ask(config, folder)
    found = {"unfit": answer.problem, "notes": answer.notes}
    return {**found, "problem": model_problem(folder)}


def needed_paths(request: Request, found: Inputs | None) -> dict[str, str]:
    """Path → what it is, of everything that a stage reads besides the run directory."""
    paths: dict[str, str] = {}
    if found:
        if found.model:
            paths[str(found.model)] = "the model"
        for file in found.data:
            paths[str(Path(file.path).expanduser().absolute())] = file.key
    config = request.config
    if config and (config.model.path.startswith("demo:") or (found and found.remote)):
        paths[str(cache_of(request.cluster))] = "the cache of models and data"
    return paths


def cache_of(cluster: ClusterConfig) -> Path:
    """The folder where stages keep downloads."""
    return Path(cluster.container.cache) if cluster.container else cache_folder()


def visible(path: str, request: Request) -> bool:
    """Whether the image sees `path` at the same place, as stages are started in it."""
    assert request.cluster.container
    places = [str(request.run.absolute()), request.cluster.container.cache]
    places += ["/tmp", "/var/tmp", "/dev", "/proc", "/sys"]
    for bind in request.cluster.container.binds:
        source, _, target = bind.partition(":")
        if target.partition(":")[0] in ("", source):
            places.append(source)
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)
