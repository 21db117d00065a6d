"""compare: rows are shared by text and label or refused; statistics agree with other programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

from tests.fabricated import config_of, logits, make_run, write_shards
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.evaluation.across.compared import compare, letter
from yelp_hpc.evaluation.across.compared_shown import comparison_page, p_value
from yelp_hpc.evaluation.across.shared import read_shared, same_classes
from yelp_hpc.evaluation.significance import (
    bootstrap_draws,
    bootstrap_p,
    holm,
    joint_table,
    mcnemar,
    percentiles,
)
from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.paths import RunPaths

Run = tuple[RunPaths, Config]


def run_of(
    folder: Path, rows: list[tuple[int, str, int]], answers: Sequence[int | None], **changes: Any
) -> Run:
    """A run with one model, `tuned`, that gave `answers` to `(row id, text, label)`."""
    run, config = RunPaths(folder), config_of(models=["tuned"])
    config = Config.model_validate(config.model_dump(mode="json") | changes)
    ids, texts, labels = (list(column) for column in zip(*rows, strict=True))
    run.prepare.mkdir(parents=True)
    table = pa.table({"row": pa.array(ids, pa.int64()), "label": pa.array(labels, pa.int16()),
                      "text": texts, "length": pa.array([9] * len(ids), pa.int32())})  # fmt: skip
    pq.write_table(table, run.split("test"))
    write_shards(run, "tuned", labels, answers, rows=ids)
    write_json(run.run_json, {"config": {"resolved": config.model_dump(mode="json")}})
    return run, config


ROWS = [(i, f"text {i}", i % 5) for i in range(40)]


def test_rows_are_matched_by_text_and_label_whatever_their_order_and_number(tmp_path: Path) -> None:
    answers = [i % 5 if i % 3 else (i + 1) % 5 for i in range(40)]
    one = run_of(tmp_path / "a", ROWS, answers)
    order = np.random.default_rng(1).permutation(40).tolist()
    moved = [(1000 + place, ROWS[i][1], ROWS[i][2]) for place, i in enumerate(order)]
    two = run_of(tmp_path / "b", moved, [answers[i] for i in order])
    found = compare([one, two])
    assert found["rows"] == {"shared": 40, "of": {"a": 40, "b": 40}}
    (pair,) = found["pairs"]
    assert (pair["only_first_right"], pair["only_second_right"]) == (0, 0)
    assert pair["both_right"] == sum(i % 3 > 0 for i in range(40))
    assert pair["mcnemar"]["holm_p"] == 1.0


def test_figures_are_of_the_shared_rows_alone(tmp_path: Path) -> None:
    right = [label for *_, label in ROWS]
    wrong_outside = [label if i < 30 else (label + 1) % 5 for i, _, label in ROWS]
    one = run_of(tmp_path / "a", ROWS, wrong_outside)
    two = run_of(tmp_path / "b", [*ROWS[:30], (99, "elsewhere", 0)], [*right[:30], 1])
    found = compare([one, two])
    assert found["rows"] == {"shared": 30, "of": {"a": 40, "b": 31}}
    assert [m["metrics"]["accuracy"]["value"] for m in found["models"]] == [1.0, 1.0]
    assert [m["rows"] for m in found["models"]] == [30, 30]


def test_equal_rows_are_counted_as_often_as_both_have_them(tmp_path: Path) -> None:
    twice = [(0, "same", 1), (1, "same", 1), (2, "other", 2)]
    one = run_of(tmp_path / "a", twice, [1, 1, 2])
    two = run_of(tmp_path / "b", [*twice, (3, "same", 1)], [1, 0, 2, 0])
    assert compare([one, two])["rows"]["shared"] == 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(i, f"another {i}", i % 5) for i in range(40)], "no row in common"),
        ([(i, text, 4 - label) for i, text, label in ROWS], "another label"),
        ([(i, text, label if i else 3) for i, text, label in ROWS], "1 of the 40 texts"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, rows: list[tuple[int, str, int]], said: str
) -> None:
    one = run_of(tmp_path / "a", ROWS, [0] * 40)
    two = run_of(tmp_path / "b", rows, [0] * 40)
    with pytest.raises(RequestError, match=said):
        compare([one, two])


def test_other_classes_and_missing_answers_are_refused(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", ROWS, [0] * 40)
    kinds = {"labels": ["p", "q", "r", "s", "t"]}
    two = run_of(tmp_path / "b", ROWS, [0] * 40, task=kinds)
    with pytest.raises(RequestError, match="other classes"):
        read_shared([one, two])
    spelt = one[1].task.model_copy(update={"labels": ("one", "two", "three", "four", "five")})
    assert same_classes(one[1].task, spelt)  # the same classes under other words
    three = run_of(tmp_path / "c", ROWS, [0] * 40)
    next(three[0].predictions("tuned").glob("*.parquet")).unlink()
    with pytest.raises(StageError, match="run infer"):
        compare([one, three])


def test_an_answer_that_is_none_is_wrong_and_counted(tmp_path: Path) -> None:
    one = run_of(tmp_path / "a", ROWS, [None] * 20 + [label for *_, label in ROWS[20:]])
    two = run_of(tmp_path / "b", ROWS, [label for *_, label in ROWS])
    found = compare([one, two])
    assert [model["unparsed"] for model in found["models"]] == [20, 0]
    assert found["pairs"][0]["only_second_right"] == 20
    assert found["pairs"][0]["difference"]["accuracy"]["value"] == 0.5


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[RunPaths]:
    """Two runs that differ in seed, learning rate and answers, and one with the base alone."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name)[0] for name in ("first", "second")]
    record = read_json(runs[1].run_json)
    record["config"]["resolved"]["train"]["learning_rate"] = 1e-3
    record["config"]["resolved"]["seed"] = 7
    record["config"]["resolved"]["publish"]["private"] = False
    write_json(runs[1].run_json, record)
    labels = pq.read_table(runs[1].split("test"))["label"].to_pylist()
    scores = logits(labels, 9, 1.4)
    write_shards(runs[1], "tuned", labels, scores.argmax(axis=1).tolist(), 3, scores.tolist())
    return [*runs, make_run(folder / "base-alone", models=["base"])[0]]


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "yelp_hpc", "compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )


def test_the_command_shows_settings_figures_pairs_and_cost_in_80_columns(
    three: list[RunPaths], tmp_path: Path
) -> None:
    done = command(*(run.root for run in three), "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    flat = " ".join(done.stdout.split())
    assert "400 test rows that all runs share" in flat
    assert "train.learning_rate 5e-05: first, base-alone · 0.001: second" in flat
    assert "seed 42: first, base-alone · 7: second" in flat
    assert "publish" not in flat
    assert flat.count(" base ") == 1  # all three gave the same answers
    assert re.search(r"C − B .* : ", flat) and "McNemar" in flat and "Holm" in flat
    assert "1.35" in flat  # hours of the fabricated jobs
    page = (tmp_path / "page.html").read_text()
    again: list[str | Path] = [*(run.root for run in three), "--html"]
    assert command(*again, tmp_path / "page.html").returncode == 0
    (tmp_path / "other.html").write_text("<title>mine</title>")
    for other in (tmp_path / "other.html", three[0].run_json):
        before = other.read_bytes()
        done = command(*again, other)
        assert done.returncode == 2 and f"{other} is there already" in done.stderr
        assert not done.stdout and other.read_bytes() == before
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count('role="img"') == 2 and "C − B" in page


def test_json_holds_the_same(three: list[RunPaths]) -> None:
    found = json.loads(command(*(run.root for run in three), "--json").stdout)
    assert [(m["id"], m["run"], m["model"]) for m in found["models"]] == [
        ("A", "first", "base"), ("B", "first", "tuned"), ("C", "second", "tuned"),
    ]  # fmt: skip
    assert found["settings"]["train.learning_rate"] == {
        "first": 5e-05, "second": 0.001, "base-alone": 5e-05,
    }  # fmt: skip
    for key in ("accuracy", "f1.macro", "mae"):
        raw = [pair["difference"][key]["p"] for pair in found["pairs"]]
        assert [pair["difference"][key]["holm_p"] for pair in found["pairs"]] == holm(raw)
    own = read_json_metrics(three[0])
    assert found["models"][1]["metrics"]["f1.macro"]["value"] == own


def read_json_metrics(run: RunPaths) -> float:
    from yelp_hpc.evaluation.measure import measure
    from yelp_hpc.rundir.manifest import load_run

    return float(measure(*load_run(run.root))[0]["models"]["tuned"]["f1"]["macro"])


def test_wrong_requests(three: list[RunPaths], tmp_path: Path) -> None:
    twice = command(three[0].root, three[0].root)
    assert twice.returncode == 2 and "named twice" in twice.stderr
    nowhere = command(three[0].root, tmp_path)
    assert nowhere.returncode == 2 and "not a run directory" in nowhere.stderr
    assert command().returncode == 2


def test_texts_of_runs_are_escaped_in_the_page(tmp_path: Path) -> None:
    one = run_of(tmp_path / "<b>a", ROWS, [0] * 40, prompt={"template": "<i>{review} {label}"})
    two = run_of(tmp_path / "b", ROWS, [1] * 40)
    page = comparison_page(compare([one, two]))
    assert "<b>" not in page and "<i>" not in page and "&lt;i&gt;" in page


# --- the statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_mcnemar_is_the_binomial_test(seed: int) -> None:
    first, second = np.random.default_rng(seed).integers(0, 60, 2).tolist()
    if first + second:
        expected = scipy.stats.binomtest(min(first, second), first + second, 0.5).pvalue
        assert mcnemar(first, second)["exact_p"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closed_test_of_bonferroni(seed: int) -> None:
    """A hypothesis falls when every intersection with it does (Marcus, Peritz, Gabriel 1976)."""
    draw = np.random.default_rng(seed)
    p = (draw.random(6) ** draw.integers(1, 8)).round(draw.integers(1, 6)).tolist()
    sets = [s for size in range(1, 7) for s in combinations(range(6), size)]
    bonferroni = {s: min(1.0, len(s) * min(p[i] for i in s)) for s in sets}
    expected = [max(bonferroni[s] for s in sets if i in s) for i in range(6)]
    assert holm(p) == pytest.approx(expected, abs=1e-12)


def test_holm_equals_statsmodels() -> None:
    """`multipletests(p, method="holm")[1]` of statsmodels 0.15.0."""
    p = [0.01, 0.04, 0.03, 0.005, 0.2, 0.04]
    assert holm(p) == pytest.approx([0.05, 0.12, 0.12, 0.03, 0.2, 0.12], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_paired_bootstrap_agrees_with_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 5, 300)
    answers = [np.where(draw.random(300) < share, labels, draw.integers(0, 5, 300))
               for share in (0.4, 0.5)]  # fmt: skip
    joint = joint_table(labels, answers[0], answers[1], 5)
    mine = bootstrap_draws(joint.counts, joint.statistics, resamples=20_000, seed=1)["accuracy"]
    right = [(answer == labels).astype(float) for answer in answers]
    theirs = scipy.stats.bootstrap(
        (right[1] - right[0],), np.mean, n_resamples=20_000, method="percentile", rng=draw
    )
    ends = percentiles(mine)
    assert ends == pytest.approx([*theirs.confidence_interval], abs=0.008)
    distribution = theirs.bootstrap_distribution
    p = 2 * min((distribution <= 0).mean(), (distribution >= 0).mean())
    assert bootstrap_p(mine) == pytest.approx(min(p, 1.0), abs=0.02)


def test_a_bootstrap_p_is_never_zero_and_one_without_a_difference() -> None:
    assert bootstrap_p(np.full(999, 0.3)) == 2 / 1000
    assert bootstrap_p(np.zeros(999)) == 1.0
    assert bootstrap_p(np.full(3, np.nan)) == 1.0
    assert (p_value(0.0004), p_value(0.25)) == ("4e-04", "0.250")


def test_letters_are_those_of_a_spreadsheet() -> None:
    assert [letter(i) for i in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]
