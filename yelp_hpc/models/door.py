"""What plan, doctor and submit ask about a model before anything is queued.

They run where torch may be missing: the folder's files are judged here, the rest (tokenizer, proof
on a twin) by a child, `python -m yelp_hpc.stages.door`, where its packages are installed. Reads the
model's folder; keeps answers in the cache, by what they depend on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from yelp_hpc.cache import cache_folder, cached_folders
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.models.checkpoint import check_folder
from yelp_hpc.own_files import IMPORT_ROOT, PACKAGE, own_module
from yelp_hpc.rundir.files import parse_json, write_json
from yelp_hpc.runtime import without_tokens

NEEDED = ("torch", "transformers", "peft")
SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """What is wrong with the model, "" if nothing is known to be; what a user should know of it."""

    problem: str = ""
    notes: tuple[str, ...] = ()


def local_model(config: Config) -> Path | None:
    """The configured model's folder, if it lies here already; the demo's needs no question."""
    path = config.model.path
    if path.startswith("demo:"):
        return None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    found = cached_folders(path, config.model.revision)
    return next((one for one in found if (one / "config.json").is_file()), None)


def check_model(config: Config) -> tuple[str, ...]:
    """Notes on the configured model; () if it is not here.

    Raises:
        RequestError: it cannot be used.
    """
    folder = local_model(config)
    if folder is None:
        return ()
    answer = ask(config, folder)
    if answer.problem:
        raise RequestError(answer.problem)
    return answer.notes


def ask(config: Config, folder: Path) -> Answer:
    """Judge the model in `folder` for a run; starts no child where torch is not installed."""
    try:
        check_folder(folder)
    except RequestError as error:
        return Answer(str(error))
    if not all(map(importlib.util.find_spec, NEEDED)):
        return Answer()
    asked = {"config": config.model_dump(mode="json"), "folder": str(folder), "longest": None}
    kept = cache_folder() / "door" / f"{_digest(asked, folder)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = parse_json(kept.read_bytes())
        return Answer(str(found["problem"]), tuple(map(str, found["notes"])))
    try:
        done = subprocess.run(
            own_module("yelp_hpc.stages.door"),
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**without_tokens(os.environ), "CUDA_VISIBLE_DEVICES": ""},
        )
        found = parse_json(done.stdout.strip().rpartition("\n")[2])
        answer = Answer(str(found["problem"]), tuple(map(str, found["notes"])))
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return Answer(notes=("the model could not be asked here; prepare will",))
    with suppress(StageError):  # a cache that cannot be written: it is asked again each time
        write_json(kept, {"problem": answer.problem, "notes": list(answer.notes)})
    return answer


def _digest(asked: Mapping[str, object], folder: Path) -> str:
    """Of everything that an answer depends on: files by size and time, versions, this code."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        state = path.stat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    for name in NEEDED:
        with suppress(PackageNotFoundError):
            digest.update(version(name).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(IMPORT_ROOT)} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()
