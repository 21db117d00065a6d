"""A finished run is given another setting: the stages that read it run again and no other does."""

from __future__ import annotations

import csv
import json
import shutil
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cli.test_mistakes import typed
from tests.tiny import HEAD, TAIL, make_model, reviews
from yelp_hpc.config import load_config
from yelp_hpc.errors import StageError
from yelp_hpc.jobs.chain import plan
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.proof.verify import verify
from yelp_hpc.rundir.files import sha256_file, write_json
from yelp_hpc.rundir.manifest import load_run, record_run
from yelp_hpc.rundir.paths import RunPaths

CONFIG = f"""\
model: {{path: model}}
data: {{source: file, train: reviews.csv, train_rows: 60, test_rows: 20}}
prompt: {{template: {json.dumps(HEAD + "{review}" + TAIL + "{label}")}}}
lora: {{rank: 4}}
train: {{max_steps: 2, global_batch: 8, warmup_steps: 0}}
collect: {{bootstrap: 200}}
"""
AGAIN = ["infer-base", "infer-tuned", "collect"]


def planned(changes: tuple[str, ...] = ()) -> list[str]:
    """What `submit all` would run, with the configuration changed."""
    config = load_config("c.yaml", changes).config
    return [job.name for job in plan("all", config, RunPaths(Path("run").resolve()), CLUSTER)]


CLUSTER = ClusterConfig()


def carry_out(changes: tuple[str, ...] = ()) -> RunPaths:
    """The planned stages, here in this process, as `submit all` has them run in turn."""
    names = planned(changes)
    record_run("run", load_config("c.yaml", changes), "c.yaml", changes)
    run, config = load_run("run")
    for name in names:
        stage, _, model = name.partition("-")
        module = import_module(f"yelp_hpc.stages.{stage}")
        module.run(run, config, **({"model": model} if model else {}))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes") / "work"
    make_model(folder / "model")
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows((label, text) for text, label in reviews(80))
    (folder / "c.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert planned() == ["prepare", "train", *AGAIN]
        carry_out()
    shutil.copytree(folder / "run", folder.with_name("kept"))
    return folder


@pytest.fixture
def finished(whole: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """The run, at the place that it names in run.json, with its folder as the working directory."""
    shutil.rmtree(whole / "run")
    shutil.copytree(whole.with_name("kept"), whole / "run")
    shutil.rmtree(whole / "other", ignore_errors=True)
    monkeypatch.chdir(whole)
    return RunPaths(whole / "run")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("infer.mode=generate", AGAIN),
        ("infer.shards=3", AGAIN),
        ("collect.bootstrap=300", ["collect"]),
        ("collect.mistakes=3", ["collect"]),
        ("infer.models=[tuned]", ["collect"]),
        ("train.log_every=7", []),
    ],
)
def test_only_what_reads_it_runs_again(
    finished: RunPaths, change: str, expected: list[str]
) -> None:
    kept = [finished.adapter / "adapter_model.safetensors", finished.prepare / "complete.json"]
    before = [sha256_file(path) for path in kept]
    assert planned() == []
    assert planned((change,)) == expected
    run = carry_out((change,))
    assert [sha256_file(path) for path in kept] == before
    assert planned((change,)) == [] and verify(run) == []
    metrics = json.loads(run.metrics.read_text())
    if change == "infer.shards=3":
        files = sorted(run.predictions("tuned").glob("*.parquet"))
        assert [path.name for path in files] == [f"shard-000{k}-of-0003.parquet" for k in range(3)]
        assert sum(pq.read_metadata(path).num_rows for path in files) == 20
    if change == "infer.mode=generate":
        texts = pq.read_table(run.shard("tuned", 0, 1))["text"].to_pylist()
        assert all(isinstance(text, str) for text in texts)
    if change == "collect.bootstrap=300":
        assert metrics["method"]["resamples"] == 300
    if change == "infer.models=[tuned]":
        assert list(metrics["models"]) == ["tuned"]


def test_a_repository_named_later_is_published_to_and_nothing_else_runs(
    finished: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ("publish.repo_id=me/stars",)
    assert planned(named) == ["publish"]
    write_json(finished.published, {"repo_id": "me/other", "settings": {"publish.repo_id": "x"}})
    assert planned(named) == ["publish"]
    line = "submit publish --config c.yaml --run run --executor local"
    code, said = typed(line, monkeypatch, capsys)
    assert code == 2 and "publish.repo_id is not set" in said and "--set publish.repo_id=" in said


def test_what_training_read_is_refused_and_nothing_changes(
    finished: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in finished.root.rglob("*") if p.is_file()}
    line = "submit all --config c.yaml --run run --executor local --set train.learning_rate=1e-3"
    for flag in (" --dry-run", ""):
        code, said = typed(line + flag, monkeypatch, capsys)
        assert code == 2 and "train is done with it" in said
    assert {p: p.read_bytes() for p in finished.root.rglob("*") if p.is_file()} == before


def test_a_copied_adapter_is_refused_by_infer_and_collect(finished: RunPaths) -> None:
    marker = json.loads((finished.adapter / "complete.json").read_text())
    marker["fingerprint"]["train"]["learning_rate"] = 0.001  # as another run's marker says
    write_json(finished.adapter / "complete.json", marker)
    run, config = load_run("run")
    for stage, options in (("infer", {"model": "tuned"}), ("collect", {})):
        with pytest.raises(StageError, match=r"learning_rate is 5e-05.* was trained with 0.001"):
            import_module(f"yelp_hpc.stages.{stage}").run(run, config, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.train=missing.csv", "data.train missing.csv: missing"),
        ("data.text_column=review", "has no column review"),
        ("model.path=modle", "did you mean model?"),
        ("train.trackers=[mlflow]", "mlflow needs a package"),
    ],
)
def test_what_the_login_node_sees_is_refused_before_anything_is_written(
    whole: Path,
    change: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("model", "reviews.csv", "c.yaml"):
        (tmp_path / name).symlink_to(whole / name)
    monkeypatch.chdir(tmp_path)
    line = "--config c.yaml --run run --executor local"
    for flag in (" --dry-run", ""):
        code, said = typed(f"submit all {line} --set {change}{flag}", monkeypatch, capsys)
        assert code == 2 and words in said, said
        assert not Path("run").exists()
    code, said = typed(f"submit collect {line}", monkeypatch, capsys)
    assert code == 2 and "infer-base" in said and not Path("run").exists()
