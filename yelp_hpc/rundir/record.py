"""The shape of run.json beside its configuration, and of train/log.jsonl: what readers may rely on.

Anybody may have changed the files. A section that is there is a section, a digest a text, a count a
number; what a later version adds is let pass.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from yelp_hpc.config import Precision
from yelp_hpc.rundir.files import read_jsonl
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.settings import Frozen

_MOST = 1e15


def training_log(run: RunPaths) -> list[dict[str, Any]]:
    """The lines of train/log.jsonl with a step, of those whose values are all numbers or null."""

    def sound(value: Any) -> bool:
        return value is None or (type(value) in (int, float) and abs(value) < _MOST)

    lines = read_jsonl(run.train_log)
    return [x for x in lines if type(x.get("step")) is int and all(map(sound, x.values()))]


class _Part(Frozen):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class _Config(_Part):
    file: str | None = None
    overrides: list[str] | None = None


class _Code(_Part):
    version: str | None = None
    git_sha: str | None = None
    dirty: bool | None = None
    diff: str | None = None


class _Image(_Part):
    sha256: str | None = None


class _Model(_Part):
    path: str | None = None
    revision: str | None = None
    folder: str | None = None
    fingerprint: str | None = None


class _Precision(_Part):
    chosen: Precision | None = None
    on: str | None = None
    by: str | None = None


class _Data(_Part):
    rows: dict[str, int] | None = None
    tokens: dict[str, int] | None = None
    truncated: int | None = None
    duplicates: int | None = None
    class_names: list[str] | None = None
    fingerprint: str | None = None


class Record(_Part):
    """run.json, but for `config.resolved`, which is checked as a config file is."""

    created: str | None = None
    config: _Config | None = None
    seed: int | None = None
    code: _Code | None = None
    python: str | None = None
    packages: dict[str, str] | None = None
    lock_sha256: dict[str, str] | None = None
    image: _Image | None = None
    model: _Model | None = None
    data: _Data | None = None
    precision: _Precision | None = None
