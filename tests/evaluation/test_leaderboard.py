"""A study's leaderboard: chosen on validation rows, means and intervals over seeds and rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.fabricated import logits, make_run, write_shards
from yelp_hpc.errors import StageError
from yelp_hpc.evaluation.across.leaderboard import leaderboard, spread
from yelp_hpc.evaluation.across.leaderboard_shown import leaderboard_page, notes
from yelp_hpc.evaluation.metrics import f1_honest
from yelp_hpc.proof.verify import verify_study
from yelp_hpc.rundir.files import read_json, write_json, write_marker
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.study import Study, StudyRun, write_study
from yelp_hpc.stages.collect import collect, rank

STRENGTH = {1: 1.0, 2: 1.6, 3: 1.3}
LOSS = {1: 0.9, 2: 0.8, 3: 0.7}
"""Trial → how well its runs answer test rows, and its validation loss: the best is another."""
VALUES = {trial: {"train.learning_rate": 10.0**-trial} for trial in STRENGTH}


def make_study(root: Path) -> Study:
    runs = [StudyRun(f"{t:02d}-seed{s}", t, VALUES[t], s) for t in STRENGTH for s in (1, 2)]
    for run in runs:
        paths, _ = make_run(root / run.name, rows=300)
        record = read_json(paths.run_json)
        record["config"]["resolved"]["train"] |= {"learning_rate": 10.0**-run.trial}
        record["config"]["resolved"]["seed"] = run.seed
        write_json(paths.run_json, record)
        labels = pq.read_table(paths.split("test"))["label"].to_pylist()
        scores = logits(labels, 10 * run.trial + run.seed, STRENGTH[run.trial])
        write_shards(paths, "tuned", labels, scores.argmax(axis=1).tolist(), 3, scores.tolist())
        with paths.train_log.open("a") as log:
            checked = {"validation_loss": LOSS[run.trial] + 0.01 * run.seed,
                       "validation_accuracy": 1 - LOSS[run.trial]}  # fmt: skip
            log.write(json.dumps({"step": 81, **checked}) + "\n")
        paths.split("validation").write_bytes(b"the same rows")
        write_json(paths.tokens, {})
        write_marker(paths.prepare, ["test.parquet", "validation.parquet", "tokens.json"])
        paths.adapter.mkdir()
        write_marker(paths.adapter, [])
        collect(paths, load_run(paths.root)[1])
    study = Study(root.resolve(), tuple(runs), {"file": "vary.yaml"})
    write_study(study)
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("studies") / "<study>")


def test_the_trial_is_chosen_on_validation_rows_and_reported_on_test_rows(study: Study) -> None:
    found = leaderboard(study)
    assert found["criterion"] == "validation_loss"
    assert [line["trial"] for line in found["trials"]] == [3, 2, 1]
    assert [line["chosen"] for line in found["trials"]] == [True, False, False]
    tops = [line["test"]["accuracy"]["mean"] for line in found["trials"]]
    assert tops[1] > tops[0]  # the best on test rows is not what is chosen
    chosen = found["trials"][0]
    own = [read_json(study.run(run).metrics)["models"]["tuned"] for run in chosen["runs"]]
    assert chosen["test"]["accuracy"] == {
        "mean": pytest.approx(np.mean([one["accuracy"] for one in own])),
        "sd": pytest.approx(np.std([one["accuracy"] for one in own], ddof=1)),
        "values": [one["accuracy"] for one in own],
        "ci95": chosen["test"]["accuracy"]["ci95"],
    }
    assert chosen["minus_chosen"] is None
    gap = found["trials"][1]["minus_chosen"]["accuracy"]
    assert gap["value"] == pytest.approx(tops[1] - tops[0])
    assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]
    assert found["cost"]["gpu_hours"] == pytest.approx(6 * 1.35, abs=0.06)
    assert found["base"] is not None and not found["unfinished"]


def test_the_interval_is_that_of_rows_and_seeds_drawn_one_by_one(study: Study) -> None:
    found = leaderboard(study)
    draw = np.random.default_rng(0)
    answers = {}
    for run in study.runs:
        shards = sorted(study.run(run).predictions("tuned").glob("*.parquet"))
        answers[run.trial, run.seed] = np.concatenate(
            [np.asarray(pq.read_table(path)["prediction"].to_pylist()) for path in shards]
        )
    labels = np.asarray(pq.read_table(study.run("01-seed1").split("test"))["label"].to_pylist())
    drawn: dict[tuple[int, str], list[float]] = {}
    for _ in range(1500):
        rows = draw.integers(0, len(labels), len(labels))
        for trial in STRENGTH:
            picked = [answers[trial, seed][rows] for seed in draw.integers(1, 3, 2)]
            right = [float((one == labels[rows]).mean()) for one in picked]
            drawn.setdefault((trial, "accuracy"), []).append(float(np.mean(right)))
            f1 = [f1_honest(table(labels[rows], one))["macro"] for one in picked]
            drawn.setdefault((trial, "f1.macro"), []).append(float(np.mean(f1)))
    for line in found["trials"]:
        for name in ("accuracy", "f1.macro"):
            expected = np.quantile(drawn[line["trial"], name], [0.025, 0.975])
            assert line["test"][name]["ci95"] == pytest.approx(expected, abs=0.012)


def table(labels: np.ndarray, answers: np.ndarray) -> np.ndarray:
    counts = np.zeros((5, 7), dtype=np.int64)
    np.add.at(counts, (labels, answers), 1)
    return counts


def test_a_log_without_its_end_is_not_judged_by_an_earlier_step(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    log = study.run("03-seed2").train_log
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-2]))
    assert '"validation_loss"' in log.read_text()
    found = leaderboard(study)
    assert [line["trial"] for line in found["trials"] if line["chosen"]] == [2]
    assert not next(line for line in found["trials"] if line["trial"] == 3)["validation"]


def test_an_unfinished_run_is_named_and_its_trial_not_chosen(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    (study.run("03-seed2").adapter / "complete.json").unlink()
    found = rank(study)
    assert found["unfinished"] == {"03-seed2": "it is not trained"}
    assert [line["trial"] for line in found["trials"] if line["chosen"]] == [2]
    assert [line["trial"] for line in found["trials"]] == [2, 1, 3]
    for run in study.runs:
        (study.run(run).adapter / "complete.json").unlink(missing_ok=True)
    with pytest.raises(StageError, match="no run of the study is finished"):
        leaderboard(study)


def test_trials_that_were_prepared_differently_are_chosen_by_accuracy(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for run in study.runs[:2]:
        write_json(study.run(run).tokens, {"another": "prompt"})
    found = leaderboard(study)
    assert found["criterion"] == "validation_accuracy"
    assert found["trials"][0]["trial"] == 3


def test_without_validation_rows_nothing_is_chosen(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for run in study.runs:
        study.run(run).train_log.write_text("")
    found = rank(study)
    assert [line["trial"] for line in found["trials"]] == [1, 2, 3]
    assert not any(line["chosen"] or line["minus_chosen"] for line in found["trials"])
    assert notes(found)[0].startswith("Nothing was chosen")


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "yelp_hpc", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )


def test_collect_prints_it_in_80_columns_and_writes_a_page_of_its_own(study: Study) -> None:
    done = command("collect", "--run", study.root)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    flat = " ".join(done.stdout.split())
    assert re.search(r"→ 03 .{0,20}2 0\.715 ±0\.007", flat)
    assert "base model" in flat and "GPU-h" in flat and "lowest validation loss" in flat
    page = study.paths.report.read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert 'href="03-seed1/report.html"' in page and page.count('role="img"') == 2
    assert "&lt;study&gt;" in page and "<study>" not in page
    shown = json.loads(command("collect", "--run", study.root, "--json").stdout)
    assert shown == read_json(study.leaderboard)
    assert leaderboard_page(shown) == page


def test_an_altered_leaderboard_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    rank(study)
    monkeypatch.setattr("yelp_hpc.proof.verify.verify", lambda run: [])  # these runs are made up
    assert verify_study(study) == []
    record = read_json(study.leaderboard)
    record["trials"][0]["test"]["accuracy"]["mean"] += 0.01
    write_json(study.leaderboard, record)
    (line,) = verify_study(study)
    assert "leaderboard.json: trials[0].test.accuracy.mean is" in line


def test_the_spread_of_one_seed_is_not_known() -> None:
    assert spread([0.5]) == {"mean": 0.5, "sd": None, "values": [0.5]}


def test_what_is_undefined_without_answers_is_null(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    for run in study.runs[:2]:
        paths = study.run(run)
        labels = pq.read_table(paths.split("test"))["label"].to_pylist()
        write_shards(paths, "tuned", labels, [None] * len(labels), 3)
        collect(paths, load_run(paths.root)[1])
    line = next(one for one in rank(study)["trials"] if one["trial"] == 1)
    assert line["test"]["accuracy"]["mean"] == 0
    assert line["test"]["mae"] == {"mean": None, "sd": None, "values": [None] * 2, "ci95": None}
    assert line["minus_chosen"]["mae"] == {"value": None, "ci95": None}
