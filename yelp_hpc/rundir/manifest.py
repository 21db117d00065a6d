"""run.json: what was asked for and with what, so that a stranger can ask for the same again.

Written when a run directory is first submitted to. Later only those keys change that no finished
stage has read (`changes`); another is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from yelp_hpc.config import DTYPES, Config, LoadedConfig, Precision
from yelp_hpc.errors import RequestError, StageError, all_problems, in_shell
from yelp_hpc.own_files import IMPORT_ROOT, SHARE, version
from yelp_hpc.progress import say
from yelp_hpc.rundir.changes import differences, dotted, refused_changes
from yelp_hpc.rundir.files import read_json, read_marker, read_object, sweep, write_json
from yelp_hpc.rundir.locks import locked
from yelp_hpc.rundir.paths import MODELS, SPLITS, WEIGHTS, RunPaths
from yelp_hpc.rundir.record import Record
from yelp_hpc.settings import check_values

PACKAGES = (
    "yelp-hpc", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn",
    "pyarrow", "safetensors", "huggingface-hub", "sentencepiece", "submitit", "numpy",
)  # fmt: skip
_POINTER = b"version https://git-lfs"


def load_run(root: str | Path) -> tuple[RunPaths, Config]:
    """The paths and the configuration of a run directory.

    Raises:
        RequestError: there is no run directory, its run.json is missing or cannot be used, or as
            `require_fetched` does.
    """
    run = RunPaths(Path(root).resolve())
    if not run.run_json.is_file():
        raise RequestError(
            f"{root} is not a run directory (it has no run.json); make one with "
            f"`python -m yelp_hpc submit all --config FILE --run {in_shell(root)}`"
        )
    require_fetched(run)
    return run, recorded_config(run.run_json)


def require_fetched(run: RunPaths) -> None:
    """Refuse a checkout in which Git LFS left pointers: no stage is to make its files again.

    Raises:
        RequestError: naming the first of them.
    """
    shards = (next(run.predictions(model).glob("*.parquet"), None) for model in MODELS)
    weights = run.adapter / WEIGHTS
    for path in filter(None, (*map(run.split, SPLITS), weights, *shards)):
        with suppress(OSError), path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise RequestError(
                    f"{path} is a pointer of Git LFS, not the file: fetch what the run holds first "
                    f"(git -C {in_shell(run.root)} lfs pull)"
                )


def recorded_config(path: Path) -> Config:
    """The configuration that a run.json holds, checked again.

    Raises:
        RequestError: the file is torn or holds none, or, as of a config file, all that is wrong.
    """
    try:
        record = read_object(path)
    except StageError as error:
        raise RequestError(str(error)) from None
    made = record.get("config")
    values = made.get("resolved") if isinstance(made, dict) else None
    if not isinstance(values, dict):
        raise RequestError(f"{path} cannot be used: it is no run.json (it holds no configuration)")
    check_values(Record, record, path)
    train = values.get("train")
    if isinstance(train, dict) and train.get("compile") is False:  # a key that 0.1.0 had
        values = {**values, "train": {k: v for k, v in train.items() if k != "compile"}}
    config = check_values(Config, values, path, "config.resolved")
    return in_precision(config, _chosen(record))


def in_precision(config: Config, chosen: Mapping[str, Precision]) -> Config:
    """The configuration with `precision: auto` as it was chosen.

    The inference's `auto` is the training's precision, a named one too.

    Args:
        chosen: as `chosen_precision` has it.
    """
    return Config.model_validate(_in_precision(config.model_dump(mode="json"), chosen))


def _in_precision(values: dict[str, Any], chosen: Mapping[str, Precision]) -> dict[str, Any]:
    found = {**values}
    precision = "auto"
    for name in ("train", "infer"):
        section = values.get(name)
        if isinstance(section, dict) and "precision" in section:
            if section["precision"] == "auto":
                own = chosen.get(name, "auto") if precision == "auto" else precision
                found[name] = {**section, "precision": own}
            precision = found[name]["precision"]
    return found


def chosen_precision(run: RunPaths) -> dict[str, Precision]:
    """What `auto` was chosen to be in this run, for `train` and `infer`; {} before the first start.

    What an inference chose that began before the training is chosen for `infer` alone.
    """
    try:
        return _chosen(read_object(run.run_json))
    except StageError:
        return {}


def _chosen(record: Mapping[str, Any]) -> dict[str, Precision]:
    section = record.get("precision")
    section = section if isinstance(section, dict) else {}
    chosen = section.get("chosen")
    if chosen not in DTYPES:
        return {}
    return {"infer": chosen} if section.get("by") == "infer" else of_both(chosen)


def of_both(chosen: Precision | None) -> dict[str, Precision]:
    """What `auto` is in training and inference alike; None: not known."""
    return {"train": chosen, "infer": chosen} if chosen else {}


def settle_precision(
    run: RunPaths, config: Config, stage: str, choose: Callable[[], tuple[Precision, str]]
) -> Config:
    """The configuration with `auto` as this run has it: chosen at its first start, and kept.

    The training chooses for the whole run. An inference that begins before it, perhaps on a machine
    of another kind, chooses for itself: what it predicted in another precision than the training's
    is no longer this run's (see `Provenance`) and is made again.

    Args:
        stage: `train` or `infer`, which begins.
        choose: what this machine takes, and its name; run.json records both.
    """
    config = in_precision(config, chosen_precision(run))
    if getattr(config, stage).precision != "auto":
        return config
    chosen, machine = choose()
    alone = {"by": "infer"} if stage == "infer" else {}
    before = chosen
    if run.run_json.is_file():
        with locked(run.lock("run.json")):
            record = read_object(run.run_json)
            there = _chosen(record)
            if stage in there:
                return in_precision(config, there)
            before = there.get("infer", chosen)
            section = {"chosen": chosen, "on": machine, **alone}
            write_json(run.run_json, {**record, "precision": section})
    trains = "tuned" in config.infer.models and config.train.adapter is None
    kept = "kept until the training chooses" if alone and trains else "kept by this run"
    say(f"{stage}: precision auto is {chosen}, chosen on {machine} and {kept}")
    if before != chosen:
        say(f"an inference before it took {before}: what it predicted is to be made again")
    return in_precision(config, of_both(chosen))


@dataclass(frozen=True)
class Asked:
    """A configuration and how it was asked for."""

    loaded: LoadedConfig
    file: str
    overrides: Sequence[str] = ()

    @property
    def resolved(self) -> dict[str, Any]:
        """The configuration as run.json holds it."""
        return absolute_paths(self.loaded.config).model_dump(mode="json")

    def is_another(self, paths: RunPaths) -> bool:
        """Whether what is done there is to be given out in another way: never a run."""
        return False

    def record(self, root: str | Path, live: Mapping[str, str] | None = None) -> RunPaths:
        """See `record_run`."""
        return record_run(root, self.loaded, self.file, self.overrides, live)


def check_asked(
    root: str | Path, asked: Asked, live: Mapping[str, str] | None = None
) -> list[tuple[str, Any, Any]]:
    """The keys that a run directory's configuration would change in: dotted key, old, new value.

    Args:
        live: stage → its job, of what is submitted and has not ended.

    Sweeps what killed writers left in the run directory's top.

    Raises:
        RequestError: a stage that is done with a key, or has begun, would not be done again; each
            such key is named with both values and the stage.
    """
    run = RunPaths(Path(root).resolve())
    if not run.run_json.exists():
        return []
    require_fetched(run)
    chosen = chosen_precision(run)
    before, wanted = (_in_precision(values, chosen) for values in _settled(run, asked))
    changed = list(differences(before, wanted))
    if refused := refused_changes(run, changed, live):
        raise RequestError(
            all_problems(f"{run.root} was made with another configuration:", refused)
            + "\nName another --run directory, or give the configuration it was made with."
        )
    return changed


def _recorded(run: RunPaths) -> dict[str, Any]:
    """The section `config` of run.json, with its `resolved`."""
    try:
        found = read_json(run.run_json)["config"]
        return {**found, "resolved": dict(found["resolved"])}
    except (KeyError, TypeError, IndexError, ValueError):
        raise RequestError(
            f"{run.run_json} holds no configuration; name another --run directory, or move "
            "this one away"
        ) from None


def _settled(run: RunPaths, asked: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration that run.json holds, and what it is to hold: the defaults of then stay.

    A key that was given neither then nor now has its value of then, whatever its default is today;
    one that there was not then has today's in both.
    """
    record, wanted = _recorded(run), asked.resolved
    before = record["resolved"]
    given = {*dict(dotted(record.get("given"))), *asked.loaded.origin}
    for key, _, _ in list(differences(before, wanted)):
        if any(k == key or k.startswith(f"{key}.") for k in given):
            continue
        *parents, last = key.split(".")
        then, now = (
            reduce(lambda d, k: d.get(k, {}), parents, place) for place in (before, wanted)
        )
        if last in then and last in now:
            now[last] = then[last]
        elif last in now:
            then[last] = now[last]
    return before, wanted


def record_run(
    root: str | Path,
    loaded: LoadedConfig,
    file: str,
    overrides: Sequence[str],
    live: Mapping[str, str] | None = None,
) -> RunPaths:
    """Write run.json, or into the one that is there the keys that may still change.

    Sweeps what killed writers left in the run directory's top.

    Raises:
        RequestError: as `check_asked` does.
    """
    run, asked = RunPaths(Path(root).resolve()), Asked(loaded, str(file), overrides)
    changed = check_asked(root, asked, live)
    sweep(run.root)
    resolved = _settled(run, asked)[1] if run.run_json.exists() else asked.resolved
    model = {key: resolved["model"][key] for key in ("path", "revision")}
    config = {
        "file": asked.file,
        "overrides": list(overrides),
        "given": loaded.given,
        "resolved": resolved,
    }
    if run.run_json.exists():
        if changed:
            again = {} if read_marker(run.prepare) else {"model": model, "data": None}
            update_run(run, config=config, seed=loaded.config.seed, **again)
        return run
    write_json(
        run.run_json,
        {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": config,
            "seed": loaded.config.seed,
            "code": code_state(),
            "python": platform.python_version(),
            "packages": package_versions(),
            "lock_sha256": lock_hashes(),
            "image": None,
            "model": model,
            "data": None,
        },
    )
    return run


def update_run(run: RunPaths, **sections: Any) -> None:
    """Replace top-level sections of run.json; two writers wait for each other."""
    with locked(run.lock("run.json")):
        write_json(run.run_json, {**read_object(run.run_json), **sections})


def absolute_paths(config: Config) -> Config:
    """The same configuration with local files named absolutely: a job starts elsewhere."""
    data = {
        key: str(Path(value).expanduser().absolute())
        for key in ("train", "test")
        if (value := getattr(config.data, key))
    }
    model = {}
    if os.path.isdir(Path(config.model.path).expanduser()):  # noqa: PTH112 - never raises
        model["path"] = str(Path(config.model.path).expanduser().absolute())
    train = {
        key: str(Path(value).expanduser().absolute())
        for key in ("adapter", "start")
        if (value := getattr(config.train, key)) and os.path.isdir(Path(value).expanduser())  # noqa: PTH112
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update=model),
            "train": config.train.model_copy(update=train),
        }
    )


def code_state() -> dict[str, Any]:
    """Version, git commit and the uncommitted changes of the code that runs."""
    root = str(IMPORT_ROOT)
    # a hook's GIT_DIR is another repository's, a colleague's clone is as safe as what runs of it
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    start = ["git", "-C", root, "-c", f"safe.directory={root}"]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                [*start, *arguments],
                env=env,
                capture_output=True,
                text=True,
                timeout=20,
                errors="replace",  # a changed file in another encoding
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    inside = git("ls-files", "--error-unmatch", "yelp_hpc/__init__.py") is not None
    sha = git("rev-parse", "HEAD") if inside else None
    # whatever the user has git show: a diff that `git apply` takes
    plainly = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    diff = git("diff", *plainly, "HEAD") if sha else None
    return {
        "version": version(),
        "git_sha": sha.strip() if sha else None,
        "dirty": bool(diff),
        "diff": diff or None,
    }


def package_versions() -> dict[str, str]:
    """The installed version of each package that a result can depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def lock_hashes() -> dict[str, str]:
    """SHA-256 of each lock file of the source tree, {} for an installed wheel."""
    folder = SHARE / "containers"
    return {
        lock.name: hashlib.sha256(lock.read_bytes()).hexdigest()
        for lock in sorted(folder.glob("*.lock"))
    }
