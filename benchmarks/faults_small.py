"""What faults.py strikes, the small: units that write a file or two, at every operation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faults import Files, Unit, files_of
from yelp_hpc.rundir.paths import RunPaths

RECORDS = [{"n": 1, "text": "one " * 9}, {"n": 2, "text": "two " * 9}]


def nothing(folder: Path) -> None:
    folder.mkdir(parents=True)


def _two_records(folder: Path) -> None:
    from yelp_hpc.rundir.files import append_jsonl

    for record in RECORDS:
        append_jsonl(folder / "log.jsonl", record)


def _torn_tail(folder: Path) -> None:
    _two_records(folder)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"n": 9, "text": "to')


def _append(number: int) -> Any:
    def append(folder: Path) -> None:
        from yelp_hpc.rundir.files import append_jsonl

        append_jsonl(folder / "log.jsonl", {"n": number, "text": "more " * 40})

    return append


def _numbers(folder: Path) -> set[int]:
    from yelp_hpc.rundir.files import read_jsonl

    known = {json.dumps(record) for record in RECORDS}
    known |= {json.dumps({"n": n, "text": "more " * 40}) for n in (3, 4)}
    found = read_jsonl(folder / "log.jsonl")
    assert all(json.dumps(record) in known for record in found), found
    return {record["n"] for record in found}


def _records_lost(expected: set[int]) -> Any:
    def lost(folder: Path, done: bool) -> int:
        return len((expected | ({3} if done else set())) - _numbers(folder))

    return lost


def _known_records(folder: Path) -> Files:
    return {"records": json.dumps(sorted(_numbers(folder) - {3})).encode()}


def _old_json(folder: Path) -> None:
    from yelp_hpc.rundir.files import write_json

    write_json(folder / "a.json", {"old": "content " * 50})


def _write_json(name: str) -> Any:
    def write(folder: Path) -> None:
        from yelp_hpc.rundir.files import sweep, write_json

        sweep((folder / name).parent)
        write_json(folder / name, {"new": "content " * 60})

    return write


def _three_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).write_text(name * 100)


def _mark(folder: Path) -> None:
    from yelp_hpc.rundir.files import sweep, write_marker

    sweep(folder)
    write_marker(folder, ["a", "b", "c"], step=3)


def _config_file(folder: Path) -> Path:
    path = folder.parent / "config.json"  # JSON is YAML
    content = {
        "model": {"path": "none"},
        "data": {"source": "file", "train": "none.csv", "test_rows": 10},
        "infer": {"shards": 3},
    }
    path.write_text(json.dumps(content))
    return path


def record_run(folder: Path) -> None:
    from yelp_hpc.config import load_config
    from yelp_hpc.rundir import manifest

    manifest.code_state = lambda: {"version": "0", "git_sha": None, "dirty": False}
    file = folder.parent / "config.json"
    manifest.record_run(folder, load_config(file), str(file), [])


def _submitted_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    _config_file(folder)
    record_run(folder)


def unsubmitted(folder: Path) -> None:
    folder.mkdir(parents=True)
    _config_file(folder)


def _update(folder: Path) -> None:
    from yelp_hpc.rundir.files import sweep
    from yelp_hpc.rundir.manifest import update_run

    sweep(folder)
    update_run(RunPaths(folder), data={"rows": {"train": 3}}, image={"sha256": "0" * 64})


def _without_created(folder: Path) -> Files:
    found = files_of(folder)
    record = json.loads(found["run.json"])
    return {**found, "run.json": json.dumps({**record, "created": ""}).encode()}


def small_package() -> None:
    """Let a snapshot hold three files: what is struck is the way, not their number."""
    from yelp_hpc.jobs import snapshot

    names = ("yelp_hpc/__init__.py", "yelp_hpc/errors.py", "yelp_hpc/rundir/__init__.py")
    setattr(snapshot, "package_files", lambda: [Path(name) for name in names])  # noqa: B010


def _freeze(folder: Path) -> None:
    from yelp_hpc.jobs.snapshot import freeze

    small_package()
    freeze(RunPaths(folder))


def _planted(folder: Path) -> None:
    folder.mkdir(parents=True)
    _freeze(folder)
    for path in folder.rglob("errors.py"):
        path.write_text("planted")


def _settings(folder: Path) -> None:
    from yelp_hpc.jobs.snapshot import freeze_settings

    freeze_settings(RunPaths(folder), {"cluster": {"array_parallelism": 3}, "image_sha256": None})


def _attempt(folder: Path) -> None:
    from yelp_hpc.rundir import attempts

    attempt = attempts.Attempt("train", "7", 0, started=1.0, node="n")
    attempts.write(RunPaths(folder), attempt)
    attempt.ended, attempt.verdict = 2.0, "done"
    attempts.write(RunPaths(folder), attempt)


def _collected(folder: Path) -> None:
    from yelp_hpc.rundir.collected import collected, write_collected
    from yelp_hpc.rundir.files import sweep

    paths = RunPaths(folder)
    sweep(folder)
    content = {"models": {"base": {"rows": 3}}}
    if not collected(paths) or json.loads(paths.metrics.read_text()) != content:
        write_collected(paths, content, "<html>new</html>")


def _old_metrics(folder: Path) -> None:
    from yelp_hpc.rundir.collected import write_collected

    write_collected(RunPaths(folder), {"models": {}}, "<html>old</html>")


def _snapshot(step: int) -> Any:
    import torch

    from yelp_hpc.training.checkpoint import Snapshot

    tensors = {"a": torch.full((4, 4), float(step))}
    return Snapshot(step, tensors, {"r": 4}, {"a/exp_avg": torch.zeros(4, 4)}, {"step": step})


def _checkpoint(step: int) -> Any:
    def save(folder: Path) -> None:
        from yelp_hpc.training.checkpoint import CheckpointStore

        store = CheckpointStore(RunPaths(folder).checkpoints, keep=1)
        store.sweep()
        store.newest()
        store.save(_snapshot(step))

    return save


def _adapter(folder: Path) -> None:
    import torch

    from yelp_hpc.rundir.files import sweep
    from yelp_hpc.training.checkpoint import write_adapter

    sweep(RunPaths(folder).adapter)
    write_adapter(RunPaths(folder).adapter, {"a": torch.ones(4, 4)}, {"r": 4}, step=3, best=None)


def _shard(folder: Path) -> None:
    from yelp_hpc.inference.provenance import Provenance
    from yelp_hpc.inference.shard_files import (
        predictions_table,
        read_parts,
        write_part,
        write_shard,
    )
    from yelp_hpc.rundir.files import sweep

    parts, path = folder / "partial", folder / "shard-0000-of-0001.parquet"
    sweep(folder, parts)
    provenance = Provenance("base", "score", "fp32", None, "0", "", "0")
    table = predictions_table([1, 2, 3], [0, 1, 2], [0, 1, 1], [[0.5] * 5] * 3, None)
    part = write_part(parts, 0, 0, table, provenance.identity)
    write_shard(path, iter([read_parts([part])]), provenance)


def light_units() -> list[Unit]:
    """The units that need no torch, so that a fork is cheap."""
    append: dict[str, Any] = {"act": _append(3), "again": _append(4), "content": _known_records}
    return [
        Unit("append_jsonl", _two_records, lost=_records_lost({1, 2, 4}), **append),
        Unit("append_torn", _torn_tail, lost=_records_lost({1, 2, 4}), **append),
        Unit("append_new", nothing, lost=_records_lost({4}), **append),
        Unit("write_json", _old_json, _write_json("a.json")),
        Unit("atomic_path", nothing, _write_json("deep/er/a.json")),
        Unit("marker", _three_files, _mark),
        Unit("record_run", unsubmitted, record_run, content=_without_created),
        Unit("update_run", _submitted_run, _update),
        Unit("freeze", nothing, _freeze),
        Unit("freeze_planted", _planted, _freeze),
        Unit("settings", nothing, _settings),
        Unit("attempt", nothing, _attempt),
        Unit("collected", nothing, _collected),
        Unit("collected_anew", _old_metrics, _collected),
    ]


def torch_units() -> list[Unit]:
    """The small units that need torch or pyarrow."""
    return [
        Unit("checkpoint", _checkpoint(2), _checkpoint(4)),
        Unit("adapter", nothing, _adapter),
        Unit("shard", nothing, _shard),
    ]
