"""The command line as a user types it: messages and exit codes, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from yelp_hpc.config import load_config
from yelp_hpc.errors import RequestError
from yelp_hpc.rundir.manifest import load_run, record_run

GOOD = "model: {path: somewhere}\ndata: {source: file, train: reviews.csv, test_rows: 5}\n"


def yelp_hpc(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yelp_hpc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


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


def test_a_run_directory_of_another_config_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    loaded = load_config(tmp_path / "c.yaml")
    record_run(tmp_path / "run", loaded, "c.yaml", [])
    before = (tmp_path / "run/run.json").read_bytes()
    record_run(tmp_path / "run", loaded, "c.yaml", [])  # the same again is fine
    other = load_config(tmp_path / "c.yaml", ["lora.rank=4", "seed=1"])
    with pytest.raises(RequestError, match=r"lora.rank: 8 .* 4 now[\s\S]*seed: 42"):
        record_run(tmp_path / "run", other, "c.yaml", [])
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_publish_may_change_later(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    record_run(tmp_path / "run", load_config(tmp_path / "c.yaml"), "c.yaml", [])
    later = load_config(tmp_path / "c.yaml", ["publish.repo_id=a/b"])
    record_run(tmp_path / "run", later, "c.yaml", [])
    assert load_run(tmp_path / "run")[1].publish.repo_id == "a/b"


def test_a_torn_run_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": ')
    with pytest.raises(RequestError, match=r"run\.json cannot be used"):
        load_run(tmp_path)
