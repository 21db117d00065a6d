"""A study: a folder of run directories, each an ordinary one, and what they vary.

`study.json` names the runs; `leaderboard.json` and `report.html` are what they came to. A run may
take what another run of the study makes: `run.json` says whose, and `take_shared` links the files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.rundir.changes import differences, dotted, readers
from yelp_hpc.rundir.files import (
    atomic_folder,
    damaged_files,
    read_marker,
    read_object,
    write_json,
    write_synced,
)
from yelp_hpc.rundir.locks import locked
from yelp_hpc.rundir.manifest import chosen_precision, in_precision, load_run, update_run
from yelp_hpc.rundir.paths import RunPaths

SHARED = ("prepare", "base")
"""What a run may take of another one: the prepared sets, the base model's predictions."""


@dataclass(frozen=True)
class StudyRun:
    """A trial with one seed: an ordinary run directory in the study's folder."""

    name: str
    trial: int
    """Counted from 1: the runs of a trial differ in the seed alone."""
    values: Mapping[str, Any]
    """Dotted key → value of what varies, the seed left out."""
    seed: int
    takes: Mapping[str, str] = field(default_factory=dict)
    """Part of `SHARED` → the run that makes it; what is not named it makes itself."""


@dataclass(frozen=True)
class Study:
    """The study in a folder."""

    root: Path
    runs: tuple[StudyRun, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    """The rest of study.json: file, config, overrides, created."""

    @property
    def paths(self) -> RunPaths:
        """Its own logs, code and submissions lie where those of a run do."""
        return RunPaths(self.root)

    @property
    def leaderboard(self) -> Path:
        """What the runs came to."""
        return self.root / "leaderboard.json"

    def run(self, run: StudyRun | str) -> RunPaths:
        """The run directory of one of its runs."""
        return RunPaths(self.root / (run if isinstance(run, str) else run.name))


def study_json(root: Path) -> Path:
    """The file that makes a folder a study."""
    return root / "study.json"


def is_study(root: str | Path) -> bool:
    """Whether a folder holds a study, and no run of its own."""
    return study_json(Path(root)).is_file() and not RunPaths(root).run_json.exists()


def read_study(root: str | Path) -> Study:
    """The study of a folder.

    Raises:
        RequestError: its study.json is missing or cannot be used.
    """
    place = Path(root).resolve()
    try:
        values = read_object(study_json(place))
        runs = tuple(StudyRun(**run) for run in values.pop("runs"))
        if not all(run.name == Path(run.name).name and run.name.strip(".") for run in runs):
            raise ValueError
    except (StageError, TypeError, KeyError, ValueError, AttributeError):
        raise RequestError(f"{study_json(place)} is missing, torn or no study's") from None
    return Study(place, runs, values)


def write_study(study: Study) -> None:
    """Write study.json."""
    runs = [asdict(run) for run in study.runs]
    write_json(study_json(study.root), {**study.record, "runs": runs})


def read_by(config: Config, *stages: str) -> dict[str, Any]:
    """Dotted key → value of what the result of `stages` depends on.

    But for the seed: a study sets `data.seed`, and predicting draws nothing.
    """
    keys = dotted(in_precision(config, {}).model_dump(mode="json"))
    return {key: value for key, value in keys if {*readers(key)} & {*stages} and key != "seed"}


def share(run: RunPaths, takes: Mapping[str, RunPaths]) -> None:
    """Say in run.json which run makes a part for this one."""
    named = {part: os.path.relpath(maker.root, run.root) for part, maker in takes.items()}
    if (read_object(run.run_json).get("shared") or {}) != named:
        update_run(run, shared=named)


def take_shared(run: RunPaths) -> list[str]:
    """Link what another run has made for this one, as far as it is whole; returns the parts.

    Files of a run are replaced and never changed, so that a link stays what it was. Where links
    cannot be made, the files are copied.

    Raises:
        StageError: the other run was made with other settings, or nothing can be written here.
    """
    try:
        named = read_object(run.run_json).get("shared")
    except StageError:
        return []
    if not isinstance(named, dict) or not named:
        return []
    taken = []
    with locked(run.lock("shared")):
        for part in SHARED:
            maker = RunPaths((run.root / str(named.get(part) or ".")).resolve())
            if maker.root != run.root.resolve() and maker.run_json.is_file():
                _adopt_precision(run, maker)
                take = _prepare if part == "prepare" else _base
                taken += [part] * take(run, maker)
    return taken


def _prepare(run: RunPaths, maker: RunPaths) -> bool:
    if read_marker(run.prepare) is not None or damaged_files(maker.prepare):
        return False
    _refuse_other(run, maker, "prepare")
    _link(maker.prepare, run.prepare, [path.name for path in maker.prepare.iterdir()])
    record = read_object(maker.run_json)
    update_run(run, data=record.get("data"), model=record.get("model"))
    return True


def _base(run: RunPaths, maker: RunPaths) -> bool:
    config = load_run(run.root)[1]
    shards = range(config.infer.shards)
    here, there = (
        [paths.shard("base", shard, config.infer.shards) for shard in shards]
        for paths in (run, maker)
    )
    if "base" not in config.infer.models or all(path.exists() for path in here):
        return False
    if read_marker(run.prepare) is None or not all(path.exists() for path in there):
        return False
    _refuse_other(run, maker, "prepare", "infer")
    sets = [(read_marker(paths.prepare) or {}).get("files") for paths in (run, maker)]
    if sets[0] != sets[1]:
        raise StageError(f"{maker.root} predicted another test set than {run.root} has")
    _link(maker.predictions("base"), run.predictions("base"), [path.name for path in there])
    return True


def _adopt_precision(run: RunPaths, maker: RunPaths) -> None:
    """The maker's choice of `auto` is this run's, too, unless this one began before it."""
    if not chosen_precision(run) and chosen_precision(maker):
        update_run(run, precision=read_object(maker.run_json)["precision"])


def _refuse_other(run: RunPaths, maker: RunPaths, *stages: str) -> None:
    mine, theirs = (read_by(load_run(paths.root)[1], *stages) for paths in (run, maker))
    found = [key for key, _, _ in differences(mine, theirs)]
    if found:
        raise StageError(
            f"{run.root} cannot take what {maker.root} made: they differ in {', '.join(found)}"
        )


def _link(source: Path, target: Path, names: Sequence[str]) -> None:
    with atomic_folder(target) as folder:
        for name in names:
            if not (source / name).is_file():
                continue
            try:
                os.link(source / name, folder / name)
            except OSError:  # another file system, or one without links
                write_synced(folder / name, (source / name).read_bytes())
                shutil.copystat(source / name, folder / name)
