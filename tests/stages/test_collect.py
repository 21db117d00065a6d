"""collect on fabricated predictions: the contract's keys, both conventions, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.fabricated import config_of, make_run, write_shards, write_test_set
from yelp_hpc.errors import StageError
from yelp_hpc.evaluation.measure import measure
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages.collect import collect

LABELS = [0, 1, 2, 3, 4]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "yelp_hpc", *arguments], capture_output=True, text=True, check=False
    )


def test_metrics_equal_scikit_learn_in_both_conventions(tmp_path: Path) -> None:
    run, config = RunPaths(tmp_path), config_of(shards=5)
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, 1000).tolist()
    write_test_set(run, labels)
    answers = {}
    for model in ("base", "tuned"):
        guess = rng.choice([0, 1, 2, 3, 4, 5, 77, -9], 1000).tolist()
        answers[model] = [None if rng.random() < 0.1 else y if rng.random() < 0.4 else g
                          for y, g in zip(labels, guess, strict=True)]  # fmt: skip
        write_shards(run, model, labels, answers[model], 5)
    metrics = collect(run, config)
    assert metrics == json.loads(run.metrics.read_text())
    for model, said in answers.items():
        found = metrics["models"][model]
        coded = [-1 if a is None else a for a in said]
        parsed = [(y, a) for y, a in zip(labels, said, strict=True) if a is not None]
        assert found["rows"] == 1000
        assert found["answered"] == len(parsed) == 1000 - found["unparsed"]
        assert found["outside"] == sum(not 0 <= a <= 4 for _, a in parsed)
        assert found["stray_labels"] == {
            str(s): sum(a == s for _, a in parsed) for s in (-9, 5, 77)
        }
        assert found["accuracy"] == pytest.approx(accuracy_score(labels, coded))
        for average in ("micro", "macro", "weighted"):
            honest = f1_score(labels, coded, labels=LABELS, average=average)
            assert found["f1"][average] == pytest.approx(honest)
            truth, answer = zip(*parsed, strict=True)
            report = f1_score(truth, answer, average=average)
            assert found["f1_report"][average] == pytest.approx(report)
            low, high = found["ci95"][f"f1.{average}"]
            assert low < found["f1"][average] < high
        assert np.array(found["confusion"]).sum() == 1000
        assert len(found["confusion_columns"]) == 7
        assert found["calibration"] is None
    right = {model: [y == a for y, a in zip(labels, said, strict=True)]
             for model, said in answers.items()}  # fmt: skip
    only = sum(t and not b for b, t in zip(right["base"], right["tuned"], strict=True))
    assert metrics["comparison"]["only_tuned_right"] == only
    assert metrics["report"]["tuned"]["f1"] == {"micro": 0.695, "macro": 0.579, "weighted": 0.695}
    assert "0.695 × 5/6 = 0.579" in metrics["report"]["why_conventions_differ"]


def test_the_same_predictions_give_the_same_bytes_whatever_the_shards(tmp_path: Path) -> None:
    one, config = make_run(tmp_path / "a", shards=1)
    many, other = make_run(tmp_path / "b", shards=7)
    collect(one, config)
    collect(many, other)
    first, second = json.loads(one.metrics.read_text()), json.loads(many.metrics.read_text())
    for model in ("base", "tuned"):
        a, b = (part["models"][model].pop("calibration") for part in (first, second))
        assert a["ece"] == pytest.approx(b["ece"], rel=1e-12)  # sums of floats, in another order
        first["models"][model].pop("ece"), second["models"][model].pop("ece")
    assert first == second
    before = one.metrics.read_bytes()
    collect(one, config)
    assert one.metrics.read_bytes() == before


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_one_model_alone_is_enough_when_only_it_was_asked_for(tmp_path: Path, model: str) -> None:
    run, config = make_run(tmp_path, models=[model])
    metrics = collect(run, config)
    assert list(metrics["models"]) == [model]
    assert "comparison" not in metrics
    assert run.report.is_file()


@pytest.mark.parametrize("answers", [[None], [3], [99]], ids=["unparsed", "right", "stray"])
def test_a_single_row_and_nothing_parsed(tmp_path: Path, answers: Any) -> None:
    run, config = RunPaths(tmp_path), config_of(models=["tuned"])
    write_test_set(run, [3])
    write_shards(run, "tuned", [3], answers)
    found = collect(run, config)["models"]["tuned"]
    assert found["accuracy"] == float(answers == [3])
    assert found["f1_report"]["macro"] == (None if answers == [None] else float(answers == [3]))


def test_the_worst_mistakes_are_the_farthest_then_the_surest(tmp_path: Path) -> None:
    run, config = make_run(tmp_path)
    _, counted = measure(run, config)
    mistakes = counted["base"].mistakes
    assert len(mistakes) == 20
    assert all(m.prediction != m.label for m in mistakes)
    keys = [(abs((m.prediction or 0) - m.label), m.confidence) for m in mistakes]
    assert keys == sorted(keys, reverse=True)


def test_an_incomplete_run_writes_nothing_and_exits_1_with_the_command(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    run.shard("base", 1, 3).unlink()
    torn = run.shard("tuned", 2, 3)
    torn.write_bytes(torn.read_bytes()[:700])
    done = command("collect", "--run", str(run.root))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "shard 1 of 3 missing" in done.stderr
    assert str(torn) in done.stderr
    assert f"run infer --run {run.root} --model base --shard 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.metrics.exists() and not run.report.exists()


def test_a_refusal_leaves_older_results_alone(tmp_path: Path) -> None:
    run, config = make_run(tmp_path)
    collect(run, config)
    before = run.metrics.read_bytes(), run.report.read_bytes()
    run.shard("base", 0, 3).unlink()
    with pytest.raises(StageError):
        collect(run, config)
    assert (run.metrics.read_bytes(), run.report.read_bytes()) == before


def test_the_command_prints_base_against_tuned(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    done = command("collect", "--run", str(run.root))
    assert done.returncode == 0, done.stderr
    found = json.loads(run.metrics.read_text())["models"]
    line = next(line for line in done.stdout.splitlines() if "F1 macro" in line)
    for model in ("base", "tuned"):
        assert f"{found[model]['f1']['macro']:.3f}" in line
    assert "McNemar" in done.stdout
    quiet = command("collect", "--run", str(run.root), "--json")
    assert json.loads(quiet.stdout)["models"] == found


def test_collecting_imports_neither_torch_nor_pandas(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    code = (
        "import sys\n"
        "from yelp_hpc.rundir.manifest import load_run\n"
        "from yelp_hpc.stages.collect import collect\n"
        f"collect(*load_run({str(run.root)!r}))\n"
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'submitit') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_table_is_shown_where_nothing_can_be_written(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    run, _ = make_run(tmp_path / "run")
    (run.report / "in the way").mkdir(parents=True)  # root may write into every folder
    done = command("collect", "--run", str(run.root), *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "metrics.json and report.html were not written" in done.stderr
    assert str(run.report) in done.stderr and not run.metrics.exists()
    if flags:
        assert json.loads(done.stdout)["models"]["tuned"]
    else:
        assert "F1 macro" in done.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_who_stops_reading_the_table_still_has_the_files(
    tmp_path: Path, options: list[str]
) -> None:
    """`collect | head -1`: the pipe is closed while the table is printed."""
    run, _ = make_run(tmp_path / "run", rows=60)
    argv = [sys.executable, "-m", "yelp_hpc", "collect", "--run", str(run.root), *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout and done.stderr
        done.stdout.close()
        said = done.stderr.read().decode()
    assert "Traceback" not in said and "Exception" not in said, said
    assert run.metrics.is_file() and run.report.is_file()
