"""prepare on a real tokenizer and a real csv: sets, hashes, and what LLaMA-Factory reads."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tiny import make_model, reviews
from yelp_hpc.config import Config, load_config
from yelp_hpc.errors import RequestError
from yelp_hpc.rundir.files import is_complete, read_json
from yelp_hpc.rundir.manifest import load_run, record_run
from yelp_hpc.rundir.paths import SPLITS, RunPaths
from yelp_hpc.stages import prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def new_run(tmp_path: Path, model: Path, *overrides: str) -> tuple[RunPaths, Config]:
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows((label, text) for text, label in reviews(100))
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {model}}}\n"
        f"data: {{source: file, train: {tmp_path}/reviews.csv, test_rows: 20, cutoff: 320}}\n"
    )
    loaded = load_config(tmp_path / "c.yaml", overrides)
    record_run(tmp_path / "run", loaded, "c.yaml", list(overrides))
    return load_run(tmp_path / "run")


def test_sets_are_whole_and_the_alpaca_files_hold_the_same_rows(
    tmp_path: Path, model: Path
) -> None:
    run, config = new_run(tmp_path, model)
    prepare.run(run, config)
    assert is_complete(run.prepare)
    tables = {name: pq.read_table(run.split(name)).to_pydict() for name in SPLITS}
    assert {name: len(t["row"]) for name, t in tables.items()} == {
        "train": 75,
        "validation": 5,
        "test": 20,
    }
    rows = [row for table in tables.values() for row in table["row"]]
    assert sorted(rows) == list(range(100))
    source = reviews(100)
    tokens = read_json(run.tokens)
    assert len(tokens["prefix"]) > 10
    info = read_json(run.dataset_info)
    for name, table in tables.items():
        alpaca = json.loads((run.prepare / info[f"yelp_{name}"]["file_name"]).read_text())
        for i, row in enumerate(table["row"]):
            assert (table["text"][i], table["label"][i]) == source[row]
            assert table["input_ids"][i][: len(tokens["prefix"])] == tokens["prefix"]
            assert table["length"][i] == len(table["input_ids"][i])
            assert table["text"][i] in alpaca[i]["input"]
            assert alpaca[i]["output"] == str(table["label"][i])
    described = read_json(run.run_json)["data"]
    assert described["rows"] == {"train": 75, "validation": 5, "test": 20}


def test_done_work_is_left_alone_and_altered_work_is_made_again(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = new_run(tmp_path, model)
    prepare.run(run, config)
    whole = {path.name: path.read_bytes() for path in run.prepare.iterdir()}
    prepare.run(run, config)
    assert "nothing to do" in capsys.readouterr().err
    half = run.split("train").read_bytes()[:500]
    run.split("train").write_bytes(half)
    prepare.run(run, config)
    assert "train.parquet is not what was written" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.prepare.iterdir()} == whole


def test_long_reviews_are_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = new_run(tmp_path, model)
    shortest = min(pq_lengths(run, config))
    (tmp_path / "short").mkdir()
    run, config = new_run(tmp_path / "short", model, f"data.cutoff={shortest + 12}")
    prepare.run(run, config)
    assert read_json(run.prepare / "complete.json")["summary"]["truncated"] > 0
    assert "lost their end" in capsys.readouterr().err
    assert max(pq.read_table(run.split("train"))["length"].to_pylist()) <= shortest + 10


def pq_lengths(run: RunPaths, config: Config) -> list[int]:
    prepare.run(run, config)
    lengths: list[int] = pq.read_table(run.split("train"))["length"].to_pylist()
    return lengths


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("[a, b <pad>]", r"special tokens in task.labels \(b <pad>\).*task.values"),
        ("[<pad> a, <pad> b]", r"special tokens in task.labels \(<pad> a, <pad> b\)"),
        ("[<eos>, b]", "'<eos>' holds the token that ends a sequence"),
        ("[<eos> a, <eos> b]", "'<eos> a' holds the token that ends a sequence"),
    ],
)
def test_labels_that_hold_special_tokens_are_refused(
    tmp_path: Path, model: Path, labels: str, expected: str
) -> None:
    run, config = new_run(tmp_path, model, f"task.labels={labels}", "task.values=[0, 1]")
    rows = "".join(f"{i % 2},fine {i}\n" for i in range(40))
    (tmp_path / "reviews.csv").write_text("label,text\n" + rows)
    with pytest.raises(RequestError, match=expected):
        prepare.run(run, config)
    assert not run.prepare.exists()


@pytest.mark.parametrize(("most", "warned"), [(2, True), (32, False)])
def test_labels_longer_than_what_may_be_written_are_said(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], most: int, warned: bool
) -> None:
    labels = "[bad, poor, fine, good, a wonderful one]"
    overrides = [f"task.labels={labels}", "infer.mode=generate", f"infer.max_new_tokens={most}"]
    prepare.run(*new_run(tmp_path, model, *overrides))
    assert ("the longest label has" in capsys.readouterr().err) is warned


def test_positions_are_counted_to_the_end_of_the_longest_label(tmp_path: Path, model: Path) -> None:
    labels = "task.labels=[bad, poor, fine, good, a wonderful one]"
    (tmp_path / "counted").mkdir()
    run, config = new_run(tmp_path / "counted", model, labels)
    prepare.run(run, config)
    longest = max(max(pq.read_table(run.split(name))["length"].to_pylist()) for name in SPLITS)
    learnt = Path(shutil.copytree(model, tmp_path / "learnt"))
    sizes: dict[str, Any] = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(n_positions=longest + 1, **sizes)).save_pretrained(learnt)
    with pytest.raises(RequestError, match=f"{longest + 1} learnt positions, and rows have up to"):
        prepare.run(*new_run(tmp_path, learnt, labels))


def test_a_faulty_source_leaves_nothing_behind(tmp_path: Path, model: Path) -> None:
    run, config = new_run(tmp_path, model)
    (tmp_path / "reviews.csv").write_text("label,text\n9,x\n")
    with pytest.raises(RequestError, match="line 2: label"):
        prepare.run(run, config)
    assert not run.prepare.exists()
