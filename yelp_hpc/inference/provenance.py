"""What the predictions of a run depend on, told from its markers and configuration alone.

Needs neither torch nor pyarrow, so that a launcher can tell which shards are to be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from yelp_hpc.config import Config
from yelp_hpc.rundir.files import read_json, read_marker
from yelp_hpc.rundir.manifest import chosen_precision, in_precision
from yelp_hpc.rundir.paths import WEIGHTS, RunPaths

PREFIX = "yelp_hpc."
"""Of every metadata key of a shard."""


@dataclass(frozen=True)
class Provenance:
    """What the predictions of a shard depend on; shards of one run share all of it."""

    model: str
    mode: str
    precision: str
    max_new_tokens: int | None
    base_model: str
    """Fingerprint of the base weights."""
    adapter_sha256: str
    """Of the adapter's weights; "" for the base model."""
    test_sha256: str
    """Of prepare/test.parquet."""

    @property
    def identity(self) -> str:
        """Hexadecimal SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def of(cls, made: Mapping[str, str]) -> Provenance | None:
        """What a shard's metadata, keys without `yelp_hpc.`, spells; None where it is not whole."""
        texts = {key: value for key, value in made.items() if key != "identity"}
        limit = texts.pop("max_new_tokens", "?")
        if {*texts, "max_new_tokens"} != {*cls.__dataclass_fields__}:
            return None
        if limit and not (limit.isascii() and limit.isdigit()):
            return None
        return cls(**texts, max_new_tokens=int(limit) if limit else None)

    def metadata(self) -> dict[str, str]:
        """Schema metadata: `yelp_hpc.<field>` and `yelp_hpc.identity`."""
        fields = {
            PREFIX + name: "" if value is None else str(value) for name, value in vars(self).items()
        }
        return {**fields, PREFIX + "identity": self.identity}

    def unlike(self, made: Mapping[str, str]) -> str:
        """In what `made`, a shard's metadata, is another's, in words; "" when it is not.

        What either does not say is no difference.
        """
        mine = {key: "" if value is None else str(value) for key, value in vars(self).items()}
        other = {
            key: made[key] for key, value in mine.items() if made.get(key, value) != value and value
        }
        return ", ".join(f"{key} {made[key]}, this run has {mine[key]}" for key in other)


def wanted(run: RunPaths, config: Config, model: str) -> Provenance:
    """What the shards of this run must say of themselves, as its markers and settings stand.

    Nothing is hashed: `stages.infer` holds the files against their markers first. What is not there
    yet is "".
    """
    prepared = (read_marker(run.prepare) or {"files": {}})["files"]
    adapter = (read_marker(run.adapter) or {"files": {}})["files"] if model == "tuned" else {}
    recorded = read_json(run.run_json) if run.run_json.is_file() else {}
    config = in_precision(config, chosen_precision(run))
    return Provenance(
        model=model,
        mode=config.infer.mode,
        precision=config.infer.precision
        + (", summed in fp16" if config.infer.fp16_accumulation else ""),
        max_new_tokens=config.infer.max_new_tokens if config.infer.mode == "generate" else None,
        base_model=str((recorded.get("model") or {}).get("fingerprint") or config.model.path),
        adapter_sha256=adapter.get(WEIGHTS, ""),
        test_sha256=prepared.get(run.split("test").name, ""),
    )
