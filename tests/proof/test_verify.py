"""verify passes on a good run and names the file that was tampered with; reproduce and compare."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from tests.hub.finished import finish_run
from yelp_hpc.cli.main import cli
from yelp_hpc.errors import RequestError
from yelp_hpc.evaluation import measure, significance
from yelp_hpc.proof import second_opinion
from yelp_hpc.proof.reproduce import compare, reproduce
from yelp_hpc.proof.verify import verify
from yelp_hpc.publishing.public import public_record
from yelp_hpc.rundir.collected import write_collected
from yelp_hpc.rundir.files import MARKER, json_bytes, read_json, sha256_file, write_json
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.paths import RunPaths


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    folder = tmp_path_factory.mktemp("finished")
    run = finish_run(folder / "run", folder / "model")
    names = {"metrics.json": run.metrics, "loss.png": run.loss_png}
    weights = "adapter_model.safetensors"
    names[weights] = run.adapter / weights
    files = [{"name": n, "size": 0, "sha256": sha256_file(p)} for n, p in names.items()]
    public = json_bytes(public_record(read_json(run.run_json), load_run(run.root)[1]))
    files.append({"name": "run.json", "size": 0, "sha256": hashlib.sha256(public).hexdigest()})
    write_json(run.published, {"repo_id": "me/stars", "files": files})
    lines = run.train_log.read_text().splitlines(keepends=True)
    lines[-1] = json.dumps({**json.loads(lines[-1]), "validation_loss": 0.75}) + "\n"
    run.train_log.write_text("".join(lines))
    write_json(run.budgets, [{"step": 0, "max_tokens": 128}])
    marker = read_json(run.adapter / MARKER)
    marker |= {"best": {"step": 11, "validation_loss": 0.75}, "budgets": read_json(run.budgets)}
    write_json(run.adapter / MARKER, marker)
    return run


@pytest.fixture
def run(finished: RunPaths, tmp_path: Path) -> RunPaths:
    shutil.copytree(finished.root, tmp_path / "run")
    return RunPaths(tmp_path / "run")


def edit(path: Path, *keys: Any, to: Any) -> Path:
    """Set one value inside a JSON file."""
    content = read_json(path)
    place = content
    for key in keys[:-1]:
        place = place[key]
    assert place[keys[-1]] != to
    place[keys[-1]] = to
    write_json(path, content)
    return path


def flip(path: Path) -> Path:
    """One other bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def change_shard(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """Other rows in a shard that is otherwise well-formed, provenance kept."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, write_page_checksum=True)
    return path


def forged_marker(folder: Path, name: str) -> Path:
    """Alter a file and put its new hash into the marker."""
    flip(folder / name)
    marker = read_json(folder / MARKER)
    marker["files"][name] = sha256_file(folder / name)
    write_json(folder / MARKER, marker)
    return folder / name


def other_answer(rows: list[dict[str, Any]]) -> None:
    rows[0]["prediction"] = (rows[0]["prediction"] + 1) % 5


def other_answer_and_scores(rows: list[dict[str, Any]]) -> None:
    """An answer made to follow from forged scores: only the figures betray it."""
    right = next(r for r in rows if r["prediction"] != r["label"])
    right["scores"] = [float(i == right["label"]) for i in range(5)]
    right["prediction"] = right["label"]


def remove(path: Path) -> Path:
    path.unlink()
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9])
    return path


def foreign_shard(run: RunPaths) -> Path:
    """The base model's predictions passed off as the tuned model's."""
    shutil.copy(run.shard("base", 0, 2), run.shard("tuned", 0, 2))
    return run.shard("tuned", 0, 2)


def forget(folder: Path, name: str) -> Path:
    """A marker that no longer covers a file."""
    marker = read_json(folder / MARKER)
    del marker["files"][name]
    write_json(folder / MARKER, marker)
    return folder / MARKER


def exchanged(one: Path, other: Path) -> Path:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    return one.parent


def copied(source: Path, target: Path) -> Path:
    shutil.copy(source, target)
    return target


def cut_lines(log: Path) -> Path:
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    return log


def logged_loss(run: RunPaths) -> Path:
    """A study chooses by it."""
    text = run.train_log.read_text()
    assert '"validation_loss": 0.75' in text
    run.train_log.write_text(text.replace('"validation_loss": 0.75', '"validation_loss": 0.65'))
    return run.train_log


def figure_in(page: Path) -> Path:
    text = page.read_text()
    at = text.index("<td>accuracy</td><td>0.") + len("<td>accuracy</td><td>0.")
    page.write_text(f"{text[:at]}9{text[at + 1 :]}")
    return page


def collect_again(run: RunPaths) -> Path:
    """The page of other metrics, as a `collect` that was killed leaves it."""
    metrics = run.metrics.read_bytes()
    changed = {**json.loads(metrics), "method": {}}
    write_collected(run, changed, "<html>another</html>")
    run.metrics.write_bytes(metrics)
    return run.report


WEIGHTS = "adapter_model.safetensors"
TAMPERINGS: dict[str, Callable[[RunPaths], Path]] = {
    "test set altered": lambda r: flip(r.split("test")),
    "training set cut short": lambda r: truncate(r.split("train")),
    "label ids altered": lambda r: edit(r.tokens, "label_ids", 0, to=3),
    "prepare's marker removed": lambda r: remove(r.prepare / MARKER),
    "adapter altered": lambda r: flip(r.adapter / WEIGHTS),
    "adapter's scaling altered": lambda r: edit(
        r.adapter / "adapter_config.json", "lora_alpha", to=64
    ),
    "learning rate in run.json": lambda r: edit(
        r.run_json, "config", "resolved", "train", "learning_rate", to=1e-4
    ),
    "seed in run.json": lambda r: edit(r.run_json, "seed", to=7),
    "base model's fingerprint in run.json": lambda r: edit(
        r.run_json, "model", "fingerprint", to="f" * 64
    ),
    "data's fingerprint in run.json": lambda r: edit(
        r.run_json, "data", "fingerprint", to="f" * 64
    ),
    "data's fingerprint gone from run.json": lambda r: edit(
        r.run_json, "data", to={"rows": {"test": 25}}
    ),
    "shard missing": lambda r: remove(r.shard("tuned", 1, 2)),
    "shard torn": lambda r: truncate(r.shard("base", 0, 2)),
    "shard of the other model": foreign_shard,
    "answer altered in a shard": lambda r: change_shard(r.shard("tuned", 0, 2), other_answer),
    "true label altered in a shard": lambda r: change_shard(
        r.shard("tuned", 0, 2), lambda rows: rows[0].update(label=(rows[0]["label"] + 1) % 5)
    ),
    "row twice in a shard": lambda r: change_shard(
        r.shard("base", 1, 2), lambda rows: rows.append(rows[0])
    ),
    "row of no test set in a shard": lambda r: change_shard(
        r.shard("base", 1, 2), lambda rows: rows[0].update(row=999)
    ),
    "row left out of a shard": lambda r: (
        change_shard(r.shard("base", 1, 2), lambda rows: rows.pop()).parent
    ),
    "answer and scores altered together": lambda r: (
        change_shard(r.shard("tuned", 0, 2), other_answer_and_scores),
        r.metrics,
    )[1],
    "accuracy in metrics.json": lambda r: edit(r.metrics, "models", "tuned", "accuracy", to=0.99),
    "confusion in metrics.json": lambda r: edit(
        r.metrics, "models", "base", "confusion", 0, 0, to=77
    ),
    "hash in published.json": lambda r: edit(r.published, "files", 0, "sha256", to="0" * 64),
    "repository in published.json": lambda r: edit(r.published, "repo_id", to="you/stars"),
    "metrics.json no JSON": lambda r: truncate(r.metrics),
    "adapter's settings no longer covered": lambda r: forget(r.adapter, "adapter_config.json"),
    "shards of a model exchanged": lambda r: exchanged(
        r.shard("tuned", 0, 2), r.shard("tuned", 1, 2)
    ),
    "another parquet file beside the shards": lambda r: copied(
        r.shard("base", 0, 2), r.predictions("base") / "more.parquet"
    ),
    "last step of the log gone": lambda r: cut_lines(r.train_log),
    "validation loss in the log": lambda r: logged_loss(r),
    "budgets that batches were cut by": lambda r: edit(r.budgets, 0, "max_tokens", to=999),
    "figure in report.html": lambda r: figure_in(r.report),
    "report.html of other metrics": lambda r: collect_again(r),
    "report.html removed": lambda r: remove(r.report),
    "label that is none in a shard": lambda r: change_shard(
        r.shard("tuned", 1, 2), lambda rows: rows[0].update(label=5)
    ),
    "run.json removed": lambda r: remove(r.run_json),
}


def test_a_good_run_passes(run: RunPaths) -> None:
    assert verify(run) == []


def test_a_count_that_is_wrong_is_found_by_scikit_learn(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same fault in `collect` and `verify` would go unseen without a second opinion."""
    honest = significance.headline

    def wrong(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**honest(*arguments, **options), "f1.macro": np.float64(0.99)}

    monkeypatch.setattr(measure, "headline", wrong)
    metrics = read_json(run.metrics)
    for model in metrics["models"].values():
        model["f1"]["macro"] = 0.99
    write_json(run.metrics, metrics)
    problems = [problem for problem in verify(run) if "scikit-learn" in problem]
    assert len(problems) == 2
    assert f"{run.metrics}: models.tuned.f1.macro is 0.99 by our counts" in problems[1]


def test_it_is_said_when_there_is_no_second_opinion(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for there in (True, False):
        monkeypatch.setattr(second_opinion, "available", partial(bool, there))
        said[there] = CliRunner().invoke(cli, ["verify", "--run", str(run.root)]).output
    assert "scikit-learn finds the same F1" in said[True]
    assert "scikit-learn is not installed here" in said[False]


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_tampering_is_named_by_its_file(run: RunPaths, kind: str) -> None:
    path = TAMPERINGS[kind](run)
    problems = verify(run)
    assert any(problem.startswith(str(path)) for problem in problems), problems


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_forged_adapter_is_found_by_the_shards_or_the_config(run: RunPaths, name: str) -> None:
    """The marker was forged too: the predictions still name the adapter that made them."""
    if name == WEIGHTS:
        forged_marker(run.adapter, name)
        assert any("adapter_sha256" in problem for problem in verify(run))
        return
    edit(run.adapter / name, "r", to=99)
    marker = read_json(run.adapter / MARKER)
    marker["files"][name] = sha256_file(run.adapter / name)
    write_json(run.adapter / MARKER, marker)
    assert any(str(run.adapter / name) in problem for problem in verify(run))


def test_forged_training_data_is_found_by_the_adapter(run: RunPaths) -> None:
    path = forged_marker(run.prepare, "train.parquet")
    assert any(problem.startswith(str(path)) for problem in verify(run))


def test_a_setting_that_the_adapters_record_no_longer_tells_is_missed(run: RunPaths) -> None:
    marker = read_json(run.adapter / MARKER)
    del marker["fingerprint"]["train"]["learning_rate"]
    write_json(run.adapter / MARKER, marker)
    told = "train.learning_rate is 0.005, the adapter was trained with None"
    assert any(told in problem for problem in verify(run))


def test_settings_of_publish_may_change_later(run: RunPaths) -> None:
    run.published.unlink()
    edit(run.run_json, "config", "resolved", "publish", "private", to=False)
    assert verify(run) == []


# reproduce


def as_demo(run: RunPaths) -> None:
    """Let run.json name nothing local, as a downloaded one of the demo does."""
    for part in ("resolved", "given"):
        edit(run.run_json, "config", part, "data", to={"source": "demo", "test_rows": 10})


def test_reproduce_asks_for_the_same(run: RunPaths, tmp_path: Path) -> None:
    as_demo(run)
    made = reproduce(run.run_json, tmp_path / "again")
    _, first = load_run(run.root)
    _, second = load_run(tmp_path / "again")
    assert second.publish.repo_id is None
    assert second.model_dump(exclude={"publish"}) == first.model_dump(exclude={"publish"})
    assert str(made.config_file) in made.command
    from yelp_hpc.config import load_config

    assert load_config(made.config_file).config == second  # `submit` accepts the directory
    assert any("commit" in warning for warning in made.warnings)
    reproduce(run.root, tmp_path / "again")  # a second time changes nothing
    with pytest.raises(RequestError, match="the run itself"):
        reproduce(run.run_json, run.root)


def test_reproduce_says_which_local_files_it_needs(run: RunPaths, tmp_path: Path) -> None:
    edit(run.run_json, "config", "resolved", "data", "train", to="/nowhere/reviews.csv")
    with pytest.raises(RequestError, match=r"/nowhere/reviews\.csv"):
        reproduce(run.run_json, tmp_path / "again")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RequestError, match=r"no run\.json"):
        reproduce(tmp_path / "x.json", tmp_path / "again")
    with pytest.raises(RequestError, match="there is no run"):
        reproduce(tmp_path / "y.json", tmp_path / "again")


def test_compare(run: RunPaths, finished: RunPaths, tmp_path: Path) -> None:
    found = compare(finished, run)
    assert found.identical, found
    assert any(WEIGHTS in line for line in found.same)
    change_shard(run.shard("tuned", 0, 2), other_answer)
    forged_marker(run.adapter, WEIGHTS)
    edit(run.metrics, "models", "tuned", "accuracy", to=0.5)
    run.shard("base", 0, 2).unlink()
    found = compare(finished, run)
    assert not found.identical
    told = "\n".join(found.differences)
    assert "1 of 25 rows differ" in told and WEIGHTS in told and "tuned.accuracy" in told
    assert found.missing == ["predictions of the base model: missing in the new"]
    assert json.loads(finished.metrics.read_text())  # the first run is left alone
