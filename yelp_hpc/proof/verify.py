"""Is a run directory still what its stages wrote, and do its figures follow from its files?

Reads everything, writes nothing: re-hashes what the markers cover, holds run.json against what the
stages recorded of it, the shards against the test set, and computes metrics.json again from them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError, YelpHpcError
from yelp_hpc.inference.provenance import PREFIX, Provenance, wanted
from yelp_hpc.proof import second_opinion
from yelp_hpc.publishing.public import public_record
from yelp_hpc.rundir.changes import differences, dotted
from yelp_hpc.rundir.collected import altered_report, as_written
from yelp_hpc.rundir.files import (
    damaged_files,
    json_bytes,
    read_json,
    read_marker,
    read_object,
    sha256_file,
)
from yelp_hpc.rundir.manifest import recorded_config
from yelp_hpc.rundir.origin import foreign_adapter
from yelp_hpc.rundir.paths import SPLITS, WEIGHTS, RunPaths
from yelp_hpc.rundir.record import training_log
from yelp_hpc.rundir.request import adapter_sha256, read_request
from yelp_hpc.rundir.study import Study
from yelp_hpc.settings import check_values

_PATHS = ("data.train", "data.test", "model.path", "train.adapter", "train.from")
TOLERANCE = 1e-9
"""Of a recomputed figure; sums over shards may be taken in another order."""


def verify(run: RunPaths) -> list[str]:
    """What does not hold, one line a problem, each opening with the file; [] when all holds."""
    try:
        config, record = recorded_config(run.run_json), read_json(run.run_json)
    except RequestError as error:
        return [" ".join(str(error).split())]
    problems = damaged_files(run.prepare)
    asked = run.request.is_file()
    if not asked or "tuned" in config.infer.models:
        problems += damaged_files(run.adapter)
    if not asked and config.train.start is not None:
        problems += damaged_files(run.start)
    evaluation = (_prepared, _recorded, _trained, _predicted, _metrics, _published)
    for check in (_recorded, _predicted, _answered) if asked else evaluation:
        try:
            problems += check(run, config, record)
        except StageError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def verify_study(study: Study) -> list[str]:
    """What does not hold of a study's runs, and of the leaderboard that they came to; [] if all."""
    from yelp_hpc.evaluation.across.leaderboard import leaderboard

    problems = [problem for run in study.runs for problem in verify(study.run(run))]
    if problems:
        return problems
    try:
        recorded = read_json(study.leaderboard)
        computed = json.loads(json.dumps(leaderboard(study)))
    except YelpHpcError as error:
        return [" ".join(str(error).split())]
    return [
        f"{study.leaderboard}: {key} is {theirs!r}, the runs give {mine!r}"
        for key, mine, theirs in _unequal(computed, recorded, "")
    ]


def _prepared(run: RunPaths, config: Config, record: Mapping[str, Any]) -> Iterator[str]:
    """The marker of prepare covers every set, and run.json names the same data."""
    marker = read_marker(run.prepare)
    if marker is None:
        return  # said by damaged_files
    for path in (*(run.split(name) for name in SPLITS), run.tokens):
        if path.name not in marker["files"]:
            yield f"{run.prepare / 'complete.json'}: does not cover {path.name}"
    summary = marker.get("summary") or {}
    recorded = record.get("data") or {}
    for key, old, new in differences(summary, {key: recorded.get(key) for key in summary}):
        yield f"{run.run_json}: data.{key} is {new!r}, prepare recorded {old!r}"


def _recorded(run: RunPaths, config: Config, record: Mapping[str, Any]) -> Iterator[str]:
    """run.json agrees with itself: the values given are in force."""
    given = record["config"].get("given") or {}
    resolved = record["config"]["resolved"]
    try:
        again = check_values(Config, given, run.run_json, "config.given")
    except RequestError as error:
        yield f"config.given of {' '.join(str(error).split())}"
        return
    expected = again.model_dump(mode="json")
    told = {key for part in (given, resolved) for key, _ in dotted(part)}
    for key, old, new in differences(expected, resolved):
        if new is None and key not in told:
            continue  # of a later version than the run's: its default is in force
        # Local paths are made absolute; publish may be set later, for it changes no result.
        if key.startswith("publish.") or (
            key in _PATHS and old and Path(str(new)).name == Path(str(old)).name
        ):
            continue
        yield f"{run.run_json}: {key} is {new!r} in force, but {old!r} was given"
    if record.get("seed") != config.seed:
        yield f"{run.run_json}: seed is {record.get('seed')!r}, not {config.seed} as configured"


def _trained(run: RunPaths, config: Config, record: Mapping[str, Any]) -> Iterator[str]:
    """The adapter was trained with run.json's configuration and prepare's data.

    Or it was taken of a run that, where it is still here, holds the same and is what it says.
    """
    yield from foreign_adapter(run, config)
    yield from _logged(run)
    taken = (read_marker(run.adapter) or {}).get("taken")
    source = RunPaths(str(config.train.adapter))
    if isinstance(taken, dict) and source.run_json.is_file():
        there = read_marker(source.adapter) or {"files": {}}
        if there["files"].get(WEIGHTS) != taken.get("sha256"):
            yield f"{source.adapter}: is not the adapter that {run.root} took (SHA-256 differs)"
        elif there.get("fingerprint") != taken.get("trained"):
            yield f"{run.adapter}: what {source.adapter} was trained on is another record there"
        else:
            yield from damaged_files(source.adapter)
            yield from foreign_adapter(source, recorded_config(source.run_json))


def _logged(run: RunPaths) -> Iterator[str]:
    """The log and the record of budgets are those of the training that made the adapter."""
    marker = read_marker(run.adapter) or {}
    if "fingerprint" not in marker:
        return
    lines = {line["step"]: line for line in training_log(run)}
    if marker.get("step") != (last := max(lines, default=0)):
        yield f"{run.train_log}: ends at step {last}, the adapter is of step {marker.get('step')}"
    best = marker.get("best")
    if isinstance(best, dict):
        there = lines.get(best.get("step"), {})
        for key, value in best.items():
            if key.startswith("validation_") and there.get(key) != value:
                where = f"{key} of step {best.get('step')}"
                yield f"{run.train_log}: {where} is {there.get(key)!r}, the adapter has {value!r}"
    if (budgets := marker.get("budgets")) is not None:
        with suppress(StageError):
            if read_json(run.budgets) == budgets:
                return
        yield f"{run.budgets}: is missing, or not what the adapter was trained with"


def _predicted(run: RunPaths, config: Config, record: Mapping[str, Any]) -> Iterator[str]:
    """Every shard is there, whole, of this adapter and this test set.

    And names an answer that follows from its scores.
    """
    for model in config.infer.models:
        folder, shards = run.predictions(model), config.infer.shards
        expected = {run.shard(model, k, shards) for k in range(shards)}
        # as parquet's readers list a folder: hidden files and those of other tools' are not read
        found = set(folder.glob("[!._]*")) if folder.is_dir() else set()
        for path in sorted(expected - found):
            yield f"{path} is missing"
        for path in sorted(found - expected):
            yield f"{path}: belongs to no shard of this run ({shards} shards)"
        seen: dict[int, Path] = {}
        test = _test_labels(run)
        yield from _base_weights(run, sorted(expected & found), record, config)
        for path in sorted(expected & found):
            yield from _shard(path, run, config, model, test, seen)
        if expected <= found and test and len(seen) < len(test):
            yield f"{folder}: {len(test) - len(seen)} of {len(test)} test rows have no prediction"
        elif expected <= found and seen.keys() == test.keys() and [*seen] != [*test]:
            yield f"{folder}: its rows are not in the order of the test set"


def _answered(run: RunPaths, config: Config, record: Mapping[str, Any]) -> Iterator[str]:
    """The file that was asked for is the one that was written, by the adapter that was copied."""
    request, made = read_request(run), read_object(run.answered)
    if request.adapter_sha256 != (adapter_sha256(run) if request.model == "tuned" else ""):
        yield f"{run.adapter}: is not the adapter that was asked for (request.json)"
    with as_written(run.answered, "give the `predict` command again"):
        out = Path(made["out"])
    if not out.is_file() or made.get("sha256") != sha256_file(out):
        yield f"{out}: is missing or was altered since it was written"


def _base_weights(
    run: RunPaths, paths: Sequence[Path], record: Mapping[str, Any], config: Config
) -> Iterator[str]:
    """The shards were made with run.json's base weights.

    Where all of them name others, it is run.json that was altered.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from yelp_hpc.inference.shard_files import provenance_of

    wanted = str((record.get("model") or {}).get("fingerprint") or config.model.path)
    found: dict[Path, str | None] = {}
    for path in paths:
        with suppress(OSError, ValueError, pa.ArrowException):  # said by _shard
            found[path] = provenance_of(pq.read_schema(path)).get("base_model")
    values = set(found.values())
    if len(values) == 1 and values != {wanted}:
        yield f"{run.run_json}: model.fingerprint is {wanted!r}, every shard has {values.pop()!r}"
        return
    for path, value in found.items():
        if value != wanted:
            yield f"{path}: base_model is {value!r}, run.json says {wanted!r}"


def _shard(
    path: Path,
    run: RunPaths,
    config: Config,
    model: str,
    test: Mapping[int, int],
    seen: dict[int, Path],
) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from yelp_hpc.inference.shard_files import SCHEMA, provenance_of

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        origin = provenance_of(file.schema_arrow)
        if file.schema_arrow.names != SCHEMA.names:
            yield f"{path}: its columns are {file.schema_arrow.names}"
            return
        table = file.read()
    except (OSError, pa.ArrowException, ValueError) as error:
        yield f"{path}: is torn or altered ({str(error).splitlines()[0]})"
        return
    made = Provenance.of(origin)
    if made is None or made.identity != origin.get("identity"):
        yield f"{path}: its provenance was altered (it does not hash to its identity)"
    for name, value in wanted(run, config, model).metadata().items():
        key = name.removeprefix(PREFIX)
        if key in ("base_model", "identity"):
            continue  # `_base_weights` says it better
        if origin.get(key) != value:
            yield f"{path}: {key} is {origin.get(key)!r}, this run has {value!r}"
    columns = [table[name].to_pylist() for name in ("row", "label", "prediction", "scores", "text")]
    foreign = wrong = double = doubtful = 0
    for row, label, prediction, scores, text in zip(*columns, strict=True):
        double += row in seen
        seen[row] = path
        foreign += row not in test
        wrong += row in test and test[row] != label
        doubtful += not _follows(prediction, scores, text, config)
    for count, what in (
        (double, "were predicted before in this or another shard"),
        (foreign, "are not in the test set"),
        (wrong, "have another label than the test set"),
        (doubtful, "have a prediction that does not follow from the scores or the text"),
    ):
        if count:
            yield f"{path}: {count} rows {what}"


def _follows(prediction: int | None, scores: Any, text: str | None, config: Config) -> bool:
    if config.infer.mode == "generate":
        from yelp_hpc.inference.answers import parse_label

        return text is not None and parse_label(text, config.task) == prediction
    if config.infer.mode == "answer":
        return scores is None and prediction in range(len(config.task.labels))
    if not scores or len(scores) != len(config.task.labels) or not all(map(math.isfinite, scores)):
        return False
    return bool(prediction == scores.index(max(scores)))


def _test_labels(run: RunPaths) -> dict[int, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run.split("test")
    try:
        table = pq.read_table(path, columns=["row", "label"])
    except (OSError, pa.ArrowException) as error:
        raise StageError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return dict(zip(table["row"].to_pylist(), table["label"].to_pylist(), strict=True))


def _metrics(run: RunPaths, config: Config, record: Mapping[str, Any]) -> Iterator[str]:
    """metrics.json says what the shards say: every figure is computed again."""
    from yelp_hpc.evaluation.measure import measure

    recorded = read_json(run.metrics)
    if wrong := altered_report(run):
        yield f"{run.report}: {wrong}"
    try:
        computed, _ = measure(run, config)
    except (StageError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        yield f"{run.metrics}: cannot be computed again: {reason}"
        return
    for key, mine, theirs in _unequal(json.loads(json.dumps(computed)), recorded, ""):
        yield f"{run.metrics}: {key} is {_short(theirs)}, the shards give {_short(mine)}"
    if second_opinion.available():
        for key, value, stands in second_opinion.second_opinion(run, config, computed):
            yield f"{run.metrics}: {key} is {stands!r} by our counts, scikit-learn says {value!r}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _unequal(mine: Any, theirs: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Leaves that differ between two JSON values, numbers to within `TOLERANCE`."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted({*mine, *theirs}):
            inner = f"{path}.{key}" if path else key
            yield from _unequal(mine.get(key), theirs.get(key), inner)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            yield from _unequal(a, b, f"{path}[{i}]")
    elif isinstance(mine, float) and isinstance(theirs, int | float):
        if not math.isclose(mine, theirs, rel_tol=0, abs_tol=TOLERANCE):
            yield path, mine, theirs
    elif mine != theirs:
        yield path, mine, theirs


def _published(run: RunPaths, config: Config, record: Mapping[str, Any]) -> Iterator[str]:
    """What was published is what is here."""
    if not run.published.exists():
        return
    published = read_object(run.published)
    if published.get("repo_id") is None:
        return
    if published["repo_id"] != config.publish.repo_id:
        yield (
            f"{run.published}: repo_id is {published['repo_id']!r}, "
            f"run.json says {config.publish.repo_id!r}"
        )
    with as_written(run.published, "delete it and publish again"):
        there = {file["name"]: file["sha256"] for file in published.get("files") or []}
    local = {path.name: path for path in (run.metrics, run.loss_png)}
    if not config.publish.merged:
        local[WEIGHTS] = run.adapter / WEIGHTS
    here = {path: sha256_file(path) for path in local.values() if path.is_file()}
    # of run.json its public form went up, by what the record says now
    local[run.run_json.name] = run.run_json
    here[run.run_json] = hashlib.sha256(json_bytes(public_record(record, config))).hexdigest()
    for name, path in local.items():
        if path not in here:
            continue
        if name not in there:
            yield f"{run.published}: does not list {name}"
        elif there[name] != here[path]:
            yield f"{run.published}: {name} was published with another content than {path}"
