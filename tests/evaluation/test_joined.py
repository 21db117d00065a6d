"""export --predictions: what stands in the file, of every test row, in each format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from tests.fabricated import config_of, make_run, write_test_set
from yelp_hpc.cli.main import cli
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.evaluation.joined import expected_values, export_predictions
from yelp_hpc.inference.shard_files import predictions_table
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.task import TaskConfig

ROWS = 400
LABELS = [str(i) for i in range(5)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Config]:
    return make_run(tmp_path_factory.mktemp("run"), rows=ROWS, shards=3)


def exported(made: tuple[RunPaths, Config], out: Path) -> Path:
    assert export_predictions(*made, out) == ROWS
    return out


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        (["-1", "0.5", "1e1"], [-1.0, 0.5, 10.0]),
        (["nan", "1", "inf"], [0.0, 1.0, 2.0]),
        (["1_0", "2_0"], [0.0, 1.0]),
        (["low", "3"], [0.0, 1.0]),
    ],
)
def test_what_a_label_counts_in_the_expected_value(labels: list[str], values: list[float]) -> None:
    assert expected_values(TaskConfig(labels=tuple(labels), ordinal=True)) == values


def export(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["export", *arguments])


def test_every_row_stands_beside_its_review_truth_and_both_answers(
    made: tuple[RunPaths, Config], tmp_path: Path
) -> None:
    run, config = made
    table = pandas.read_parquet(exported(made, tmp_path / "all.parquet"))
    test = pandas.read_parquet(run.split("test"))
    assert table["row"].tolist() == test["row"].tolist()
    assert table["text"].tolist() == test["text"].tolist()
    assert table["truth"].tolist() == [str(label) for label in test["label"]]
    assert table["truth_name"].tolist() == [config.task.shown[label] for label in test["label"]]
    for model in config.infer.models:
        shards = pandas.read_parquet(run.predictions(model))
        assert table[f"{model}_answer"].tolist() == [str(p) for p in shards["prediction"]]
        names = [config.task.shown[p] for p in shards["prediction"]]
        assert table[f"{model}_name"].tolist() == names
        scores = np.stack(shards["scores"].to_list()).astype(float)
        chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        found = table[[f"{model}_p_{label}" for label in LABELS]].to_numpy()
        assert np.allclose(found, chances, atol=1e-6)
        assert np.allclose(table[f"{model}_expected"], chances @ np.arange(5), atol=1e-5)


def test_all_formats_hold_the_same(made: tuple[RunPaths, Config], tmp_path: Path) -> None:
    table = pq.read_table(exported(made, tmp_path / "a.parquet")).to_pylist()
    lines = exported(made, tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == table
    with exported(made, tmp_path / "a.CSV").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: str(value) for key, value in record.items()} for record in table]


def test_generated_texts_are_not_called_text_and_unparsed_answers_are_null(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    config = config_of(shards=2, models=["base"], mode="generate")
    rows = [7, 3, 11]  # in the order of the test set, whatever the ids
    write_test_set(run, [0, 1, 4], rows)
    run.predictions("base").mkdir(parents=True)
    written: list[tuple[list[int], list[int | None], list[str]]] = [
        (rows[:2], [4, None], ["4", "no, sorry"]),
        (rows[2:], [1], ["two stars\nmore"]),
    ]
    for shard, (part, answer, text) in enumerate(written):
        labels = [{7: 0, 3: 1, 11: 4}[row] for row in part]
        table = predictions_table(part, labels, answer, None, text)
        pq.write_table(table, run.shard("base", shard, 2))
    export_predictions(run, config, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["row"] for one in found] == rows
    assert [one["text"][:6] for one in found] == ["review"] * 3
    assert [one["base_answer"] for one in found] == ["4", None, "1"]
    assert [one["base_generated"] for one in found] == ["4", "no, sorry", "two stars\nmore"]
    assert {one["base_p_0"] for one in found} == {None}


@pytest.mark.parametrize("damage", ["missing", "torn", "doubled"])
def test_an_incomplete_run_is_refused_and_nothing_is_written(damage: str, tmp_path: Path) -> None:
    run, config = make_run(tmp_path / "run", rows=60)
    shard = run.shard("tuned", 1, 3)
    if damage == "missing":
        shard.unlink()
    elif damage == "torn":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        shard.write_bytes(run.shard("tuned", 0, 3).read_bytes())
    with pytest.raises(StageError, match=r"tuned.*(missing|torn|more than once)"):
        export_predictions(run, config, tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_cannot_be_written_is_refused_first(
    made: tuple[RunPaths, Config], tmp_path: Path
) -> None:
    for name, message in (
        ("out.xlsx", "must end in .csv, .jsonl, .parquet"),
        ("no/such/folder.csv", "there is no folder"),
    ):
        with pytest.raises(RequestError, match=message):
            export_predictions(*made, tmp_path / name)


def test_a_file_of_somebody_else_stays(made: tuple[RunPaths, Config], tmp_path: Path) -> None:
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        mine = exported(made, tmp_path / name).read_bytes()
        assert exported(made, tmp_path / name).read_bytes() == mine  # our own is made again
        for content in (b"label,text\n0,bad\n", b'{"label": 0}\n', b"", b"PAR1"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(RequestError, match="is there already; name another file"):
                export_predictions(*made, tmp_path / name)
            assert (tmp_path / name).read_bytes() == content


def test_the_command(made: tuple[RunPaths, Config], tmp_path: Path) -> None:
    run = str(made[0].root)
    done = export("--run", run, "--predictions", str(tmp_path / "out.csv"))
    assert done.exit_code == 0 and (tmp_path / "out.csv").is_file()
    wrong: list[Any] = [[], ["--merged"], ["--out", str(tmp_path / "x")]]
    for arguments in wrong:
        refused = export("--run", run, *arguments)
        assert isinstance(refused.exception, RequestError)
        assert "--merged --out DIR, or --predictions FILE" in str(refused.exception)
