"""run.json: what was asked for and with what, so that a stranger can ask for the same again.

Written when a run directory is first submitted to; a run directory made with another
configuration is refused, never overwritten.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config, LoadedConfig, config_from_dict
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.own_files import IMPORT_ROOT, SHARE, version
from yelp_hpc.rundir.files import read_json, read_object, sweep, write_json
from yelp_hpc.rundir.locks import locked
from yelp_hpc.rundir.paths import RunPaths

PACKAGES = (
    "yelp-hpc", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn",
    "pyarrow", "safetensors", "huggingface-hub", "sentencepiece", "submitit", "numpy",
)  # fmt: skip


def load_run(root: str | Path) -> tuple[RunPaths, Config]:
    """The paths and the configuration of a run directory.

    Raises:
        RequestError: there is no run directory, or its run.json is missing or cannot be used.
    """
    run = RunPaths(Path(root).resolve())
    if not run.run_json.is_file():
        raise RequestError(
            f"{root} is not a run directory (it has no run.json); make one with "
            f"`python -m yelp_hpc submit all --config FILE --run {root}`"
        )
    try:
        return run, config_from_dict(read_json(run.run_json)["config"]["resolved"])
    except Exception as error:
        raise RequestError(f"{run.run_json} cannot be used: {error}") from None


def record_run(root: str | Path, loaded: LoadedConfig, file: str, overrides: list[str]) -> RunPaths:
    """Write run.json, or check that the one that is there asks for the same.

    Sweeps what killed writers left in the run directory's top.

    Raises:
        RequestError: the run directory was made with another configuration; each differing key is
            named with both values.
    """
    run = RunPaths(Path(root).resolve())
    resolved = absolute_paths(loaded.config).model_dump(mode="json")
    sweep(run.root)
    if run.run_json.exists():
        existing = read_json(run.run_json)
        try:
            before = existing["config"]["resolved"]
        except (KeyError, TypeError, IndexError):
            raise RequestError(
                f"{run.run_json} holds no configuration; name another --run directory, or move "
                "this one away"
            ) from None
        changed = [
            f"{key}: {old!r} in the run directory, {new!r} now"
            for key, old, new in differences(before, resolved)
            if not key.startswith("publish.")  # changes no result
        ]
        if changed:
            raise RequestError(
                all_problems(f"{run.root} was made with another configuration:", changed)
                + "\nName another --run directory, or give the configuration it was made with."
            )
        if before.get("publish") != resolved["publish"]:
            existing["config"]["resolved"]["publish"] = resolved["publish"]
            update_run(run, config=existing["config"])
        return run
    write_json(
        run.run_json,
        {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": {
                "file": str(file),
                "overrides": overrides,
                "given": loaded.given,
                "resolved": resolved,
            },
            "seed": loaded.config.seed,
            "code": code_state(),
            "python": platform.python_version(),
            "packages": package_versions(),
            "lock_sha256": lock_hashes(),
            "image": None,
            "model": {"path": resolved["model"]["path"], "revision": resolved["model"]["revision"]},
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
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update=model),
        }
    )


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf that differs between two nested dicts: dotted key, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.removesuffix("."), old, new


def code_state() -> dict[str, Any]:
    """Version, git commit and the uncommitted changes of the code that runs."""
    root = IMPORT_ROOT

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    inside = git("ls-files", "--error-unmatch", "yelp_hpc/__init__.py") is not None
    sha = git("rev-parse", "HEAD") if inside else None
    diff = git("diff", "HEAD") if sha else None
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
