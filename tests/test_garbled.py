"""Forty garbled small files: each command that may meet one says one thing, and no traceback.

Wrong shapes, a million brackets, numbers that no float holds, control characters, bytes that are no
text: in every small file of a run directory, a model folder and a data file.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from tests.test_malformed import ROWS, call, folder, prepared, snapshot, write
from yelp_hpc.config import load_config
from yelp_hpc.errors import StageError
from yelp_hpc.progress import plain
from yelp_hpc.rundir.files import read_json
from yelp_hpc.rundir.manifest import record_run

__all__ = ["folder"]  # a fixture

DEEP = "[" * 1_000_000
DEEP_OBJECT = '{"a":' * 1_000_000
HUGE = "9" * 400
ESCAPES = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \x07 \u202egnol"
JSON = {
    "deep": DEEP,
    "deep object": DEEP_OBJECT,
    "1e309": '{"step": 1e309, "started": 1e309, "rows": 1e309, "name": "train", "job": "1"}',
    "a long integer": f'{{"step": {HUGE}, "started": {HUGE}, "rows": {HUGE}, "job": {HUGE}}}',
    "NaN": '{"step": NaN, "rows": NaN, "done": NaN, "state": "running"}',
    "a list": "[1, 2]",
    "a text": '"text"',
    "null": "null",
    "wrong kinds": '{"name": 3, "job": {}, "rows": "x", "done": [], "state": 1, "started": true}',
    "half a character": '{"state": "\\ud800", "name": "\\ud800", "job": "1", "executor": "slurm"}',
    "bytes": "\udcff\udcfe\udc80",
}
RUN_FILES = (
    "submissions.jsonl",
    "train/log.jsonl",
    "logs/attempts/train/1-0.json",
    "infer/.progress/base/shard-0000-of-0001.json",
    "prepare/complete.json",
    "metrics.json",
    "published.json",
)
COMMANDS = ("status --run run", "status --run run --json", "logs --run run", "cancel --run run")
TABLE = [(file, kind) for n, file in enumerate(RUN_FILES) for kind in list(JSON)[n % 2 :: 2]]


def garbled(kind: str) -> bytes:
    return JSON[kind].encode(errors="surrogateescape" if kind == "bytes" else "surrogatepass")


def check(output: str, code: int) -> None:
    assert "Traceback" not in output and "Error:" not in output
    assert code in (0, 1, 2) and (code == 0 or output.strip())
    assert len(output) < 6000, "a message, not a flood"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", output)


@pytest.mark.parametrize(("file", "kind"), TABLE, ids=[f"{f}-{k}" for f, k in TABLE])
def test_what_a_run_directory_says_of_itself(
    file: str,
    kind: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    record_run(folder / "run", load_config(folder / "good.yaml"), "good.yaml", [])
    write(folder / "run", {file: garbled(kind), "logs/train.log": "a line\n"})
    before = snapshot(folder)
    for command in COMMANDS:
        code, output = call(command.split(" "), monkeypatch, capfd)
        check(output, code)
    after = snapshot(folder)
    assert {name: after.get(name) for name in before} == before


RECORDS: dict[str, dict[str, object]] = {
    "submissions.jsonl": {
        "time": 1.0, "name": "train", "job": "7", "executor": "slurm", "tasks": [""], "host": "h",
        "user": "u", "slurm_cluster": "lab", "job_name": "n", "script": "s", "submitted": 1.0,
    },
    "train/log.jsonl": {
        "step": 5, "epoch": 0.5, "loss": 1.0, "tokens_per_second": 10.0, "seconds": 1.0,
        "eta_seconds": 5.0, "memory_bytes": 10,
    },
    "logs/attempts/train/7-0.json": {
        "name": "train", "job": "7", "restart": 0, "shards": "", "node": "n", "started": 1.0,
        "ended": 2.0, "verdict": "failed", "reason": "r", "stalled": 1, "lost": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("file", RECORDS)
@pytest.mark.parametrize("value", ["x", [], {}, 10**30, "x" * 2000, True], ids=str)
def test_one_value_of_another_kind_in_a_record(
    file: str,
    value: object,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    record_run(folder / "run", load_config("good.yaml"), "good.yaml", [])
    write(folder, {"run/plan.json": "{}"})
    wrong = [{**RECORDS[file], key: value} for key in RECORDS[file]]
    for name, record in RECORDS.items():
        write(folder, {f"run/{name}": json.dumps(record) + "\n"})
    if file.endswith(".jsonl"):
        write(folder, {f"run/{file}": "".join(f"{json.dumps(line)}\n" for line in wrong)})
    for n, line in enumerate([] if file.endswith(".jsonl") else wrong):
        write(folder, {f"run/logs/attempts/train/7-{n}.json": json.dumps(line)})
    for command in (
        *COMMANDS,
        "plan --compare --run run",
        "submit train --config good.yaml --run run --dry-run",
    ):
        code, output = call(command.split(" "), monkeypatch, capfd)
        check(output, code)


@pytest.mark.parametrize("kind", [k for k in JSON if k not in ("wrong kinds", "half a character")])
def test_what_stages_read_before_they_work(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record_run(folder / "run", load_config(folder / "good.yaml"), "good.yaml", [])
    write(folder, {"r.csv": ROWS})
    prepared(folder)
    for file, command in (
        ("run/prepare/complete.json", "collect --run run"),
        ("run/prepare/complete.json", "run infer --run run"),
        ("run/run.json", "status --run run"),
        ("run/run.json", "collect --run run"),
        ("m/config.json", "plan --config good.yaml"),
        ("m/config.json", "run infer --run run"),
    ):
        path = folder / file
        there = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(garbled(kind))
        code, output = call(command.split(" "), monkeypatch, capfd)
        check(output, code)
        assert code in (1, 2), output
        if there is None:
            path.unlink()
        else:
            path.write_bytes(there)


@pytest.mark.parametrize("value", ["text", 3, [1]], ids=str)
def test_a_section_of_the_record_that_is_none(
    value: object, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every section of run.json, and every command that reads it."""
    record_run(folder / "run", load_config(folder / "good.yaml"), "good.yaml", [])
    path = folder / "run" / "run.json"
    whole = json.loads(path.read_text())
    for section in ("code", "packages", "lock_sha256", "image", "model", "data"):
        path.write_text(json.dumps({**whole, section: value}))
        for command in (
            "status --run run",
            "collect --run run",
            "publish --run run --dry-run",
            "verify --run run",
            "reproduce --from run --run again",
            "run infer --run run",
            "doctor --run run",
            "plan --run run",
        ):
            code, output = call(command.split(" "), monkeypatch, capfd)
            check(output, code)
            assert code in (1, 2) and f"{section}: is a section" in output, output


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for half in (b'"\\ud83d"', b'"\\uDE00"', b'{"\\ude00\\ud83d": 1}', b'"\xed\xa0\x80"'):
        path.write_bytes(half)
        with pytest.raises(StageError):
            read_json(path)
    for whole in (b'"\\ud83d\\ude00"', '\ufeff"\U0001f600"'.encode()):
        path.write_bytes(whole)
        assert read_json(path) == "\U0001f600"


@pytest.mark.parametrize(
    "header",
    [DEEP, "[]", '{"a": 3}', '{"a": {"data_offsets": 1}}', '{"a": {"data_offsets": [0, 1e309]}}'],
    ids=range(5),
)
def test_the_header_of_safetensors(header: str, tmp_path: Path) -> None:
    from yelp_hpc.errors import RequestError
    from yelp_hpc.models.checkpoint import weight_files

    path = tmp_path / "model.safetensors"
    for length in (len(header), 1 << 62):
        path.write_bytes(struct.pack("<Q", length) + header.encode())
        with pytest.raises(RequestError, match=r"model\.safetensors"):
            weight_files(tmp_path)


@pytest.mark.parametrize("metadata", [None, "x", 3, {"format": "pt"}])
def test_metadata_of_safetensors_is_no_tensor(metadata: object, tmp_path: Path) -> None:
    from yelp_hpc.models.checkpoint import check_folder

    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata, "w": tensor}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    write(tmp_path, {"config.json": '{"model_type": "llama"}'})
    assert check_folder(tmp_path, tokenizer=False) == {"model_type": "llama"}


def test_foreign_text_loses_what_a_terminal_would_obey(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert plain(f"a\r\nb\tc {ESCAPES}") == "a\nb\tc red    gnol"
    write(folder, {"r.csv": f"{ESCAPES},b\n1,2\n"})
    record_run(folder / "run", load_config(folder / "good.yaml"), "good.yaml", [])
    model = {"model_type": ESCAPES, "hidden_size": ESCAPES}
    write(folder, {"m/config.json": json.dumps(model), "run/logs/train.log": f"one {ESCAPES}\n"})
    attempt = {"name": "train", "job": "1", "restart": 0, "started": 1.0, "ended": 2.0}
    attempt |= {"verdict": "failed", "reason": ESCAPES, "node": ESCAPES}
    write(folder / "run", {"logs/attempts/train/1-0.json": json.dumps(attempt)})
    shown = ""
    for command in ("run prepare --run run", "plan --config good.yaml", *COMMANDS):
        code, output = call(command.split(" "), monkeypatch, capfd)
        check(output, code)
        shown += output
    assert shown.count("red") >= 4, "the words stay"
