"""A task of twenty labels of several tokens through every stage, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.topics import write_topics
from tests.test_pipeline import yelp_hpc
from tests.tiny import make_model
from yelp_hpc.data.answer_tree import scored_answers
from yelp_hpc.models.load import load_model, load_tokenizer
from yelp_hpc.rundir.files import read_json
from yelp_hpc.rundir.paths import RunPaths


def write_task(folder: Path) -> Path:
    """A tiny model, the topics as a csv, and a configuration of both; its path."""
    make_model(folder / "model")
    topics = write_topics(folder / "topics.csv")
    config = {
        "model": {"path": str(folder / "model")},
        "data": {"source": "file", "train": str(folder / "topics.csv"), "test_rows": 300,
                 "text_column": "sentence", "label_column": "topic", "train_rows": 160},
        "task": {"labels": list(topics), "noun": "sentence"},
        "prompt": {"template": "Sentence: {review}\nTopic: {label}"},
        "train": {"learning_rate": 1e-3, "warmup_steps": 2, "global_batch": 16, "max_tokens": 1024},
        "infer": {"shards": 2},
        "collect": {"bootstrap": 200},
    }  # fmt: skip
    path = folder / "c.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("topics")).parent


def submit(place: Path, name: str, *settings: str, stage: str = "all") -> RunPaths:
    options = [part for setting in settings for part in ("--set", setting)]
    done = yelp_hpc(
        "submit", stage, "--config", str(place / "c.json"), "--run", str(place / name),
        "--executor", "local", "--wait", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return RunPaths(place / name)


@pytest.fixture(scope="module")
def run(place: Path) -> RunPaths:
    return submit(place, "run")


def predictions(run: RunPaths, model: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        row
        for path in run.predictions(model).glob("shard-*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    return sorted(rows, key=lambda row: int(row["row"]))


def test_scores_are_whole_label_log_likelihoods(run: RunPaths, place: Path) -> None:
    """On all 300 rows, against one full forward pass an answer."""
    tokens, model = read_json(run.tokens), load_model(place / "model", "fp32")
    answers = scored_answers(tokens)
    assert len(answers) == 20
    assert max(map(len, answers)) > 2
    assert len(tokens["label_ids"]) == 20
    tokenizer = load_tokenizer(place / "model")
    test = {row["row"]: row for row in pq.read_table(run.split("test")).to_pylist()}
    found = predictions(run, "base")
    assert len(found) == 300
    labels = read_json(run.tokens)["labels"]
    worst = 0.0
    with torch.inference_mode():
        for row in found:
            prompt = test[row["row"]]["input_ids"]
            whole = [
                tokenizer(f"Sentence: {test[row['row']]['text']}\nTopic: {label}")["input_ids"]
                for label in labels
            ]
            assert [prompt + answer for answer in answers] == whole
            width = max(map(len, whole))
            padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in whole])
            chances = model(input_ids=padded).logits.log_softmax(-1)
            for i, ids in enumerate(whole):
                span = range(len(prompt), len(ids))
                expected = sum(chances[i, at - 1, ids[at]].item() for at in span)
                worst = max(worst, abs(expected - row["scores"][i]))
            assert row["prediction"] == row["scores"].index(max(row["scores"]))
    assert worst < 1e-4  # a sum of up to nine numbers of five digits, in fp32


def test_it_is_measured_and_verifies(run: RunPaths) -> None:
    metrics = read_json(run.metrics)
    for model in metrics["models"].values():
        assert len(model["per_class"]) == len(model["confusion"]) == 20
        assert [*model["top_k"]] == ["2", "3", "5", "10"]
        assert "mae" not in model
    done = yelp_hpc("verify", "--run", str(run.root))
    assert done.returncode == 0, done.stderr
    assert "20 kinds of sentence" in run.report.read_text()


def test_generation_agrees_with_scores_where_it_ends_in_a_label(run: RunPaths, place: Path) -> None:
    written = submit(place, "written", "infer.mode=generate", "infer.max_new_tokens=12")
    scored = {row["row"]: row for row in predictions(run, "tuned")}
    labels = read_json(run.tokens)["labels"]
    same = [
        scored[row["row"]]["prediction"] == row["prediction"]
        for row in predictions(written, "tuned")
        if row["text"].strip() in labels
    ]
    assert all(same)


def test_two_ranks_and_other_shards_give_the_same(run: RunPaths, place: Path) -> None:
    other = submit(place, "ranks", "train.nproc=2", "infer.shards=3")
    name = "adapter_model.safetensors"
    from safetensors.torch import load_file

    first, second = (load_file(paths.adapter / name) for paths in (run, other))
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-5
    pairs = zip(predictions(run, "tuned"), predictions(other, "tuned"), strict=True)
    for one, two in pairs:
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-3)


def test_answers_alone_are_those_of_the_scores(run: RunPaths, place: Path) -> None:
    alone = submit(place, "alone", "infer.mode=answer", f"train.adapter={run.root}")
    for model in ("base", "tuned"):
        scored, found = predictions(run, model), predictions(alone, model)
        assert [row["prediction"] for row in found] == [row["prediction"] for row in scored]
        assert all(row["scores"] is None and row["text"] is None for row in found)
    one, two = (read_json(paths.metrics)["models"] for paths in (run, alone))
    for model in one:
        assert two[model]["f1"] == one[model]["f1"]
        assert "calibration" not in two[model] or two[model]["calibration"] is None
    done = yelp_hpc("verify", "--run", str(alone.root))
    assert done.returncode == 0, done.stderr
