"""The same run again: prepared from a run.json, and compared with the first when it is done.

Reads a run.json (a run directory's, or one downloaded from the Hub); writes the run.json of a new
run directory with the same configuration. `compare` reads two run directories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from yelp_hpc.config import Config, LoadedConfig
from yelp_hpc.errors import RequestError, in_shell
from yelp_hpc.rundir.changes import differences
from yelp_hpc.rundir.files import (
    json_bytes,
    read_json,
    read_jsonl,
    read_marker,
    read_object,
    write_bytes,
)
from yelp_hpc.rundir.manifest import (
    code_state,
    package_versions,
    record_run,
    recorded_config,
    update_run,
)
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, SPLITS, WEIGHTS, RunPaths

CONFIG_NAME = "reproduce.yaml"


@dataclass(frozen=True)
class Reproduction:
    """A prepared run directory and what is known to differ already."""

    run: RunPaths
    config_file: Path
    warnings: list[str]
    local: bool = False
    """The run that is repeated was made without Slurm."""

    @property
    def command(self) -> str:
        """What starts it, where the first run ran."""
        named = f"--config {in_shell(self.config_file)} --run {in_shell(self.run.root)}"
        command = f"python -m yelp_hpc submit all {named}"
        return f"{command} --executor local" if self.local else command


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side; both lists empty: they are the same."""

    differences: list[str]
    missing: list[str]
    same: list[str]

    @property
    def identical(self) -> bool:
        """Whether every file compared is there and equal."""
        return not self.differences and not self.missing


def reproduce(run_json: str | Path, new_run_dir: str | Path) -> Reproduction:
    """Write a new run directory that asks for exactly what `run_json` asked for.

    Nothing is published from it: publish.repo_id is not taken over.

    Raises:
        RequestError: run_json is missing or no run.json, names local data or a local model that is
            not here, or the new directory holds another run.
    """
    source = Path(run_json)
    source = source / "run.json" if source.is_dir() else source
    if not source.is_file():
        raise RequestError(f"--from {run_json}: there is no run.json; name one, or a run directory")
    config = recorded_config(source)
    record = read_json(source)
    config = config.model_copy(
        update={"publish": config.publish.model_copy(update={"repo_id": None})}
    )
    _check_local_files(source, config)
    target = RunPaths(Path(new_run_dir).resolve())
    if target.run_json.resolve() == source.resolve():
        raise RequestError(f"{target.root} is the run itself; name a new run directory")
    values = config.model_dump(mode="json")
    loaded = LoadedConfig(config, values, {})
    run = record_run(target.root, loaded, str(source), [])
    update_run(run, reproduces={"created": record.get("created"), "code": record.get("code")})
    _take_budgets(RunPaths(source.parent), run)
    config_file = run.root / CONFIG_NAME
    head = "# Written by `reproduce`: the whole configuration of the run that is repeated.\n"
    text = head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_bytes(config_file, text.encode())
    warnings = list(_environment_differences(record))
    submissions = read_jsonl(RunPaths(source.parent).submissions)
    local = {line.get("executor") for line in submissions} == {"local"}
    return Reproduction(run, config_file, warnings, local)


def _take_budgets(first: RunPaths, run: RunPaths) -> None:
    """Have the new run cut its batches as the first one did, a lowered budget included."""
    if first.budgets.is_file() and not run.budgets.exists():
        run.train.mkdir(parents=True, exist_ok=True)
        write_bytes(run.budgets, first.budgets.read_bytes())


def _check_local_files(source: Path, config: Config) -> None:
    local = [value for value in (config.data.train, config.data.test) if value]
    if Path(config.model.path).is_absolute():
        local.append(config.model.path)
    missing = [value for value in local if not Path(value).exists()]
    if missing:
        raise RequestError(
            f"{source} names files that are not here: {', '.join(missing)}; put them there first"
        )


def _environment_differences(record: Mapping[str, Any]) -> Iterator[str]:
    """What makes another result possible although the configuration is the same."""
    code, now = record.get("code") or {}, code_state()
    if code.get("dirty"):
        yield "the run was made with uncommitted changes; they are in its run.json (code.diff)"
    if code.get("git_sha") and code["git_sha"] != now["git_sha"]:
        yield f"code: the run had commit {code['git_sha']}, here is {now['git_sha'] or 'no git'}"
    for key, old, new in differences(record.get("packages") or {}, package_versions()):
        yield f"package {key}: the run had {old}, here is {new}"


def compare(first: RunPaths, second: RunPaths) -> Comparison:
    """Hold a finished reproduction against the first run: data, adapter, predictions, metrics.

    Raises:
        RequestError: one of them has no run.json, or one that cannot be used.
    """
    config, other = recorded_config(first.run_json), recorded_config(second.run_json)
    found = Comparison([], [], [])
    for key, old, new in differences(
        config.model_dump(mode="json", exclude={"publish"}),
        other.model_dump(mode="json", exclude={"publish"}),
    ):
        found.differences.append(f"configuration {key}: {old!r} and {new!r}")
    _compare_fingerprints(first, second, found)
    tokens = RunPaths("").tokens.name
    names = [RunPaths("").split(name).name for name in SPLITS] + [tokens]
    _compare_marked(first.prepare, second.prepare, names, found)
    _compare_marked(first.adapter, second.adapter, [WEIGHTS], found)
    _note(found, f"adapter/{ADAPTER_CONFIG}", *map(_shape, (first, second)))
    for model in config.infer.models:
        _compare_predictions(first, second, config, other, model, found)
    _compare_metrics(first, second, found)
    return found


def _compare_fingerprints(first: RunPaths, second: RunPaths, found: Comparison) -> None:
    one, two = read_json(first.run_json), read_json(second.run_json)
    for section in ("model", "data"):
        a = (one.get(section) or {}).get("fingerprint")
        b = (two.get(section) or {}).get("fingerprint")
        _note(found, f"{section} fingerprint", a, b)


def _compare_marked(first: Path, second: Path, names: list[str], found: Comparison) -> None:
    """Files by the SHA-256 that their markers hold."""
    one, two = read_marker(first), read_marker(second)
    for name in names:
        a, b = ((m or {"files": {}})["files"].get(name) for m in (one, two))
        _note(found, f"{first.name}/{name}", a, b)


def _shape(run: RunPaths) -> str | None:
    """SHA-256 of what adapter_config.json says, but for where the base model lies."""
    path = run.adapter / ADAPTER_CONFIG
    if not path.is_file():
        return None
    values = {k: v for k, v in read_json(path).items() if k != "base_model_name_or_path"}
    return hashlib.sha256(json_bytes(values)).hexdigest()


def _note(found: Comparison, what: str, a: Any, b: Any) -> None:
    if a is None or b is None:
        which = "both runs" if a is None and b is None else "the first" if a is None else "the new"
        found.missing.append(f"{what}: missing in {which}")
    elif a == b:
        found.same.append(f"{what}: {a}")
    else:
        found.differences.append(f"{what}: {a} and {b}")


def _compare_predictions(
    first: RunPaths, second: RunPaths, config: Config, other: Config, model: str, found: Comparison
) -> None:
    """Answers row by row, however the test set was cut into shards."""
    a, b = (_answers(run, c, model) for run, c in ((first, config), (second, other)))
    what = f"predictions of the {model} model"
    if a is None or b is None:
        _note(found, what, a and True, b and True)
        return
    rows = sum(a.get(row) != b.get(row) for row in {*a, *b})
    if rows:
        found.differences.append(f"{what}: {rows} of {len({*a, *b})} rows differ")
    else:
        found.same.append(f"{what}: all {len(a)} rows")


def _answers(run: RunPaths, config: Config, model: str) -> dict[int, Any] | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers: dict[int, Any] = {}
    for shard in range(config.infer.shards):
        path = run.shard(model, shard, config.infer.shards)
        if not path.is_file():
            return None
        try:
            table = pq.read_table(path, columns=["row", "prediction"])
        except (OSError, pa.ArrowException):
            return None
        answers |= dict(zip(table["row"].to_pylist(), table["prediction"].to_pylist(), strict=True))
    return answers


def _compare_metrics(first: RunPaths, second: RunPaths, found: Comparison) -> None:
    paths = (first.metrics, second.metrics)
    if not all(path.is_file() for path in paths):
        _note(found, "metrics.json", *(True if path.is_file() else None for path in paths))
        return
    one, two = (read_object(path).get("models") for path in paths)
    different = list(differences(one, two))
    found.differences.extend(f"metrics.json {key}: {a!r} and {b!r}" for key, a, b in different)
    if not different:
        found.same.append("metrics.json: every figure of the models")
