"""A request for predictions: RUN/predict/NAME/, a run directory of its own for rows without labels.

Over a run that may only be read it is OUT.predict/NAME/, beside the output.

Its `prepare/`, `infer/MODEL/` and `logs/` are those of any run; `train/adapter` is a copy of the
run's; request.json tells what is asked for, answered.json, written last, what came of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config, DataConfig, PublishConfig
from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import (
    atomic_folder,
    is_complete,
    read_marker,
    read_object,
    write_json,
    write_marker,
    write_synced,
)
from yelp_hpc.rundir.manifest import Asked
from yelp_hpc.rundir.modes import unwritable
from yelp_hpc.rundir.paths import ADAPTER_FILES, WEIGHTS, RunPaths


@dataclass(frozen=True)
class Request:
    """What `predict` is asked for."""

    run: str
    """The run directory whose model, prompt and labels are used."""
    model: str
    adapter_sha256: str
    """Of the adapter's weights; "" for the base model."""
    base_fingerprint: str
    """Of the base weights that the run was made with; "" where it does not say."""
    input: str
    sha256: Mapping[str, str]
    """Name → SHA-256 of the input's files."""
    text_column: str
    label_column: str
    label_needed: bool
    """The user named the label column: one that cannot be used is an error."""
    header: bool
    escaped: bool
    out: str
    prefix: str
    """Before the names of the columns that are added."""
    answers_only: bool = False
    """The labels without their probabilities."""
    class_names: Sequence[str] | None = None
    """What numbers in the run's own label column count, where it said so."""

    @property
    def name(self) -> str:
        """The folder's name: the same input, model and columns are the same request."""
        what = {k: v for k, v in asdict(self).items() if k not in ("out", "prefix", "run")}
        for key in ("answers_only", "class_names"):
            if not what[key]:
                del what[key]  # of requests that are older than it
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in Path(self.input).stem)
        return f"{stem[:40].strip('-') or 'input'}-{digest}"

    @property
    def folder(self) -> Path:
        """RUN/predict/NAME; beside the output where the run is one that may only be read."""
        own = RunPaths(self.run).predict / self.name
        if unwritable(own, folder=True) is None:
            return own
        return Path(self.out).with_name(f"{Path(self.out).stem}.predict") / self.name

    @property
    def metrics(self) -> Path:
        """Where the metrics of labelled rows are put beside the output."""
        return Path(self.out).with_name(f"{Path(self.out).stem}.metrics.json")

    def config(self, config: Config, shards: int) -> Config:
        """The run's configuration, for these rows."""
        rows = DataConfig(
            source="file",
            train=self.input,
            test=self.input,
            text_column=self.text_column,
            # looked at on the login node; prepare reads it only where it is there
            label_column=self.label_column if self.label_needed else self.text_column,
            header=self.header,
            escaped=self.escaped,
            cutoff=config.data.cutoff,
        )
        infer = {**config.infer.model_dump(), "models": (self.model,), "shards": shards}
        if self.answers_only:
            infer["mode"] = "answer"
        changed = {
            "data": rows,
            "infer": type(config.infer)(**infer),
            "publish": PublishConfig(),
        }
        return config.model_copy(update=changed)


@dataclass(frozen=True)
class AskedPrediction(Asked):
    """As `Asked`, with the request and a copy of the adapter in the folder."""

    request: Request | None = None

    def is_another(self, paths: RunPaths) -> bool:
        """Whether the answers were last asked for in another file, or under other names."""
        return read_request(paths) != self.request

    def record(self, root: str | Path, live: Mapping[str, str] | None = None) -> RunPaths:
        """Write the folder, or what of it may still change. Raises as `record_run` does."""
        assert self.request is not None
        paths = RunPaths(Path(root).resolve())
        write_json(paths.request, asdict(self.request))
        if self.request.model == "tuned" and not is_complete(paths.adapter):
            source = RunPaths(self.request.run).adapter
            marker = read_marker(source)
            files = [name for name in ADAPTER_FILES if marker and name in marker["files"]]
            with atomic_folder(paths.adapter) as folder:
                for name in files:
                    write_synced(folder / name, (source / name).read_bytes())
                write_marker(folder, files, copy_of=str(source))
        if self.request.model == "tuned" and adapter_sha256(paths) != self.request.adapter_sha256:
            raise StageError(f"{self.request.run}: its adapter has changed meanwhile; ask again")
        return super().record(root, live)


def read_request(paths: RunPaths) -> Request:
    """The request that a folder was made for.

    Raises:
        StageError: there is none, or it is torn.
    """
    try:
        return Request(**read_object(paths.request))
    except TypeError as error:
        raise StageError(f"{paths.request} holds no request: {error}") from None


def answered(paths: RunPaths) -> bool:
    """Whether the file that is asked for now is the one that was written last."""
    try:
        found, asked = read_object(paths.answered), read_object(paths.request)
        size = Path(found["out"]).stat().st_size
    except (StageError, OSError, KeyError, TypeError):
        return False
    return bool(found.get("request") == asked and found.get("bytes") == size)


def adapter_sha256(run: RunPaths) -> str:
    """SHA-256 of the adapter's weights by its marker; "" where there is none."""
    files: dict[str, Any] = (read_marker(run.adapter) or {"files": {}})["files"]
    return str(files.get(WEIGHTS, ""))
