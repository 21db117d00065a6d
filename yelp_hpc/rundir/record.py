"""The shape of run.json beside its configuration: what its readers may rely on.

Anybody may have changed the file. A section that is there is a section, a digest a text, a count a
number; what a later version adds is let pass.
"""

from __future__ import annotations

from pydantic import ConfigDict

from yelp_hpc.config import Precision
from yelp_hpc.settings import Frozen


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
