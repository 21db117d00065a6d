"""What a plan is made from where it is read or assumed: each number by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yelp_hpc.config import Config, config_from_dict
from yelp_hpc.errors import RequestError
from yelp_hpc.forecast.inputs import estimated_lengths, prepared_lengths
from yelp_hpc.rundir.files import write_json
from yelp_hpc.rundir.paths import SPLITS, RunPaths


def hub(**data: Any) -> Config:
    return config_from_dict({
        "model": {"path": "m"},
        "data": {"source": "hub", "path": "a/b", "validation_share": 0.25, **data},
    })  # fmt: skip


def rows_of(config: Config, mean: float | None = None) -> tuple[int, int, int]:
    found = estimated_lengths(config, mean)
    return len(found.train), len(found.validation), len(found.test)


def test_rows_of_a_hub_data_set_are_those_asked_for_or_known() -> None:
    assert rows_of(hub(train_rows=10, test_rows=3)) == (8, 2, 3)
    assert rows_of(hub(train_rows=14, test_rows=3, validation_share=0.0)) == (14, 0, 3)
    known = {"path": "Yelp/yelp_review_full"}
    assert rows_of(hub(**known, train_rows=8)) == (6, 2, 50_000)
    assert rows_of(hub(**known, test_rows=1)) == (487_500, 162_500, 1)
    for given, missing in (
        ({}, "data.train_rows and data.test_rows"),
        ({"train_rows": 5}, "data.test_rows"),
        ({"test_rows": 5}, "data.train_rows"),
    ):
        with pytest.raises(RequestError) as error:
            estimated_lengths(hub(**given))
        assert str(error.value) == (
            f"how many rows a/b has is not known here: set {missing}, or run prepare first and "
            "name its --run"
        )


def test_lengths_that_are_not_known_are_drawn_about_a_mean_and_cut_at_the_cutoff() -> None:
    config = hub(train_rows=3000, test_rows=1000, cutoff=4000)
    found = estimated_lengths(config, 300.0)
    every = [*found.train, *found.validation, *found.test]
    assert sum(every) / len(every) == pytest.approx(300 - found.prefix, rel=0.02)
    logs = [math.log(n) for n in every]
    middle = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - middle) ** 2 for x in logs) / len(logs))
    assert spread == pytest.approx(0.75, rel=0.02)
    assert found.source == "assumed mean 300 (--tokens changes it)"
    assert list(found.train) != sorted(found.train), "shuffled"
    short = estimated_lengths(hub(train_rows=3000, test_rows=1000, cutoff=100), 300.0)
    assert max(short.train) == 100 - short.prefix
    assert min(estimated_lengths(hub(train_rows=900, test_rows=9), 1.0).train) == 1
    assert estimated_lengths(config) == estimated_lengths(config, 200.0)


def test_lengths_of_a_file_are_counted_in_characters(tmp_path: Path) -> None:
    """4.2 characters a token, rounded up; the prefix is rounded, as it is shared."""
    texts = ["x" * n for n in (1, 42, 43, 400, 4200)]
    with (tmp_path / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts * 4, "01" * 10, strict=True)])
    config = config_from_dict({
        "model": {"path": "m"},
        "data": {"source": "file", "train": str(tmp_path / "r.csv"), "test_rows": 10,
                 "cutoff": 500, "validation_share": 0.0, "seed": 1},
        "prompt": {"template": "123456789{review}\n{label}"},
        "task": {"labels": ["0", "1"]},
    })  # fmt: skip
    found = estimated_lengths(config)
    assert found.prefix == 2  # 9 characters are 2.1 tokens
    tail = 3 + 1  # the line break, the cue and the end; an answer of one token
    most = 500 - 2
    lengths = [1 + tail, 10 + tail, 11 + tail, 96 + tail, most]
    assert sorted([*found.train, *found.test]) == sorted(lengths * 4)
    assert found.validation == []
    assert found.source == "estimated at 4.2 characters a token"
    # a mean is one of prompts: the tree of answers behind a test prompt is none of it
    named = {"labels": [f"{'label ' * 9}{n}" for n in range(20)], "values": [*map(str, range(20))]}
    scaled = estimated_lengths(config_from_dict({**config.model_dump(), "task": named}), 60.0)
    prompts = [*scaled.train, *(n - scaled.tree for n in scaled.test)]
    assert scaled.tree > 100 and sum(prompts) / len(prompts) == pytest.approx(60 - 2, rel=0.02)


def prepared(run: RunPaths, label_ids: list[Any]) -> None:
    run.prepare.mkdir(parents=True)
    write_json(run.tokens, {"prefix": [1, 2, 3], "label_ids": label_ids, "eos_id": 0})
    for split, lengths in zip(SPLITS, ([10, 20], [30], [40, 50]), strict=True):
        labels = [1, 0][: len(lengths)]
        pq.write_table(pa.table({"length": lengths, "label": labels}), run.split(split))


def test_lengths_of_a_prepared_run_have_their_answers(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "one")
    prepared(run, [7, 8])
    found = prepared_lengths(run)
    assert found is not None
    assert (found.train, found.validation, found.test) == ([8, 18], [28], [37, 47])
    assert (found.prefix, found.source) == (3, "counted in prepare/")
    # a label of three tokens: training has its own, a test prompt the tree of all
    run = RunPaths(tmp_path / "three")
    prepared(run, [[7, 8, 9], [7, 5]])
    found = prepared_lengths(run)
    assert found is not None
    assert (found.train, found.validation) == ([10 - 3 + 2, 20 - 3 + 3], [30 - 3 + 2])
    assert found.test == [40 - 3 + 2, 50 - 3 + 2]  # the 7 of both, and the 8 before the 9
    run.split("test").write_bytes(b"PAR1")
    with pytest.raises(RequestError) as error:
        prepared_lengths(run)
    assert str(error.value).startswith(f"{run.split('test')} cannot be read: ")
    run.split("validation").unlink()
    assert prepared_lengths(run) is None
    run = RunPaths(tmp_path / "tokens")
    prepared(run, [7, 8])
    run.tokens.unlink()
    assert prepared_lengths(run) is None
