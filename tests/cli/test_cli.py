"""The command line as a user types it: messages and exit codes, never a traceback."""

from __future__ import annotations

import errno
import json
import re
import sys
from pathlib import Path

import pytest

from tests.test_pipeline import yelp_hpc
from yelp_hpc.cli.main import interrupted, main
from yelp_hpc.config import Config, load_config
from yelp_hpc.errors import RequestError
from yelp_hpc.rundir import manifest
from yelp_hpc.rundir.files import MARKER, write_json
from yelp_hpc.rundir.manifest import load_run, record_run
from yelp_hpc.rundir.paths import RunPaths

GOOD = "model: {path: somewhere}\ndata: {source: file, train: reviews.csv, test_rows: 5}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "train", "--run", "nowhere"], "not a run directory"),
        (["run", "nonsense", "--run", "x"], "nonsense"),
        (["run", "train"], "--run"),
        (["submit", "all", "--config", "none.yaml", "--run", "x"], "does not exist"),
        (["collect", "--run", "nowhere"], "not a run directory"),
        (["status", "--run", "nowhere"], "not a run directory"),
        (["config", "show", "--config", "none.yaml"], "does not exist"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_code_2(
    arguments: list[str], expected: str
) -> None:
    done = yelp_hpc(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_config_show_names_origins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    done = yelp_hpc("config", "show", "--config", "c.yaml", "--set", "seed=7", cwd=tmp_path)
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert lines["seed"][1:] == ["7", "--set"]
    assert lines["model.path"][1:] == ['"somewhere"', "c.yaml:1"]
    assert lines["train.epochs"][1:] == ["1", "default"]
    shown = json.loads(
        yelp_hpc("config", "show", "--config", "c.yaml", "--json", cwd=tmp_path).stdout
    )
    assert shown["config"]["train"]["epochs"] == 1


def test_a_key_is_locked_by_the_finished_stage_that_read_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    run = RunPaths(tmp_path / "run")

    def record(*changes: str) -> Config:
        record_run(run.root, load_config(tmp_path / "c.yaml", changes), "c.yaml", changes)
        return load_run(run.root)[1]

    def refused(*changes: str) -> str:
        before = run.run_json.read_bytes()
        with pytest.raises(RequestError) as error:
            record(*changes)
        assert run.run_json.read_bytes() == before
        return str(error.value)

    record()
    assert record("lora.rank=4", "seed=1", "model.path=elsewhere").seed == 1  # nothing is done
    assert json.loads(run.run_json.read_text())["model"]["path"] == "elsewhere"
    record()
    write_marker_of(run.prepare)
    assert record("lora.rank=4").lora.rank == 4  # prepare has not read it
    said = refused("data.cutoff=64", "seed=7")
    assert re.search(r"data.cutoff: 1024 .* 64 now \(prepare is done", said) and "seed: 42" in said
    (run.checkpoints / "step-000004").mkdir(parents=True)
    assert "train has begun with it" in refused("lora.rank=8", "train.epochs=2")
    write_marker_of(run.adapter)
    said = refused("train.epochs=2", "lora.rank=4", "infer.mode=generate")
    assert "train is done with it" in said and "infer.mode" not in said
    free = ("lora.rank=4", "infer.mode=generate", "infer.shards=3", "collect.bootstrap=500",
            "publish.repo_id=a/b", "train.log_every=5", "train.save_every_steps=7")  # fmt: skip
    assert record(*free).infer.shards == 3
    record_run(run.root, load_config(tmp_path / "c.yaml", free), "c.yaml", free, {"infer": "77"})
    with pytest.raises(RequestError, match=r"infer\.shards: 3 .* 4 now .*job 77.*cancel"):
        changed = load_config(tmp_path / "c.yaml", [*free, "infer.shards=4"])
        record_run(run.root, changed, "c.yaml", [], {"infer": "77"})


def write_marker_of(folder: Path) -> None:
    write_json(folder / MARKER, {"files": {}})


def test_publish_may_change_later(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    record_run(tmp_path / "run", load_config(tmp_path / "c.yaml"), "c.yaml", [])
    later = load_config(tmp_path / "c.yaml", ["publish.repo_id=a/b"])
    record_run(tmp_path / "run", later, "c.yaml", [])
    assert load_run(tmp_path / "run")[1].publish.repo_id == "a/b"


def test_a_torn_run_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": ')
    with pytest.raises(RequestError, match=r"run\.json cannot be read as JSON"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("typed", "run"),
    [("study vary.yaml --out runs/s", "runs/s"), ("status --run=runs/r", "runs/r"), ("plan", "")],
)
def test_ctrl_c_names_the_run_or_the_study_that_goes_on(typed: str, run: str) -> None:
    said = interrupted(typed.split())
    assert (f"cancel --run {run}" in said) if run else said == "interrupted"


def test_a_file_server_that_is_away_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "/nfs/run/run.json")

    monkeypatch.setattr(manifest, "load_run", away)
    monkeypatch.setattr(sys, "argv", ["yelp-hpc", "cancel", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("/nfs/run/run.json: Stale file handle. ")
    assert len(said.splitlines()) == 1
