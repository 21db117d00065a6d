"""A study: what FILE asks for, who makes what is shared, and played stages on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fake_study import CONFIG, FILE, FakeStudy
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs.chain import submit
from yelp_hpc.jobs.study.plan import plan_study, read_file
from yelp_hpc.jobs.study.status import collect_study, render, state_of
from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.manifest import load_run, update_run
from yelp_hpc.rundir.study import Study, read_study, share, take_shared, write_study


def planned(tmp_path: Path, file: str, *overrides: str, config: str = CONFIG) -> Study:
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "vary.yaml").write_text(file)
    arguments = (str(tmp_path / "config.yaml"), overrides, tmp_path / "out")
    return plan_study(tmp_path / "vary.yaml", *arguments)[0]


def file_of(tmp_path: Path, text: str) -> tuple[list[dict[str, Any]], list[int]]:
    (tmp_path / "vary.yaml").write_text(text)
    return read_file(tmp_path / "vary.yaml", 42)


def test_lists_are_a_grid_and_the_seeds_are_apart(tmp_path: Path) -> None:
    settings, seeds = file_of(
        tmp_path, "seed: [3, 1]\ntrain.learning_rate: [5e-5, 1e-4]\nlora.rank: [4, 8]\n"
    )
    assert seeds == [3, 1]
    assert settings == [
        {"train.learning_rate": rate, "lora.rank": rank} for rate in (5e-5, 1e-4) for rank in (4, 8)
    ]


def test_settings_are_tried_as_they_stand_each_once(tmp_path: Path) -> None:
    listed = (
        "- {lora.rank: 4, lora.target: [q_proj]}\n- {}\n- {lora.rank: 4, lora.target: [q_proj]}\n"
    )
    expected = [{"lora.rank": 4, "lora.target": ["q_proj"]}, {}]
    assert file_of(tmp_path, listed) == (expected, [42])
    indented = "".join(f"  {line}\n" for line in listed.splitlines())
    settings, seeds = file_of(tmp_path, f"seed: [7]\ntrain.epochs: [1, 2]\nsettings:\n{indented}")
    assert seeds == [7]
    assert settings == [{"train.epochs": n, **some} for some in expected for n in (1, 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must map keys"),
        ("seed: 3\n", "seed: a list of values is wanted"),
        ("seed: [1, 1]\n", "twice"),
        ("seed: [a]\n", "whole numbers"),
        ("train.epochs: []\n", "a list of values is wanted"),
        ("name: [a, b]\n", "no result depends on it"),
        ("train.nproc: [1, 2]\n", "no result depends on it"),
        ("settings: [{seed: 1}]\n", "give the seeds once"),
        ("settings: 3\n", "a list of mappings"),
        ("train.epochs: [1]\nsettings: [{train.epochs: 2}]\n", "stands in settings, too"),
        ("a: [1\n", "is not YAML"),
        ("train.epochs: [1, 2024-01-01]\n", "train.epochs: 2024-01-01 is no value of a config"),
        ("train.epochs: &a [*a]\n", "is no value of a config; a text stands in quotes"),
        ("- {lora.rank: 1, lora.rank: 2}\n", "lora.rank is written twice"),
        ("? 2024-01-01\n: [1]\n", "2024-01-01: a dotted key of the config is wanted"),
        ("'': [1]\n", "'': a dotted key of the config is wanted"),
        ("".join(f"train.a{n}: [1, 2, 3]\n" for n in range(40)), "12157665459056928801 runs"),
        (f"seed: {list(range(501))}\n", "501 runs"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        file_of(tmp_path, text)


def test_every_setting_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as error:
        planned(tmp_path, "train.learning_rat: [1]\ntrain.epochs: [1, 0]\nlora.rank: [x]\n")
    for words in ("train.learning_rate", "train.epochs", "lora.rank"):
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="must name tuned"):
        planned(tmp_path, "seed: [1]\n", "infer.models=[base]")


def test_seeds_share_the_rows_and_so_prepare_and_the_base_model(tmp_path: Path) -> None:
    study = planned(tmp_path, FILE)
    assert [run.name for run in study.runs] == ["01-seed1", "01-seed2", "02-seed1", "02-seed2"]
    both = {"prepare": "01-seed1", "base": "01-seed1"}
    assert [run.takes for run in study.runs] == [{}, both, both, both]


def test_only_what_was_made_with_the_same_settings_is_shared(tmp_path: Path) -> None:
    def takes(file: str, *overrides: str) -> dict[str, dict[str, str]]:
        return {run.name: dict(run.takes) for run in planned(tmp_path, file, *overrides).runs}

    cut = takes("data.cutoff: [64, 128]\nseed: [1, 2]\n")
    assert cut["02-seed1"] == {}
    assert cut["02-seed2"] == {"prepare": "02-seed1", "base": "02-seed1"}
    mode = takes("infer.precision: [fp32, bf16]\n")
    assert mode["02-seed42"] == {"prepare": "01-seed42"}
    trained = takes("train.precision: [fp32, bf16]\n", "infer.precision=fp32")
    assert trained["02-seed42"]["base"] == "01-seed42"
    # where infer.precision is auto, it is the training's
    assert takes("train.precision: [fp32, bf16]\n")["02-seed42"] == {"prepare": "01-seed42"}
    drawn = takes("data.seed: [1, 2]\n")
    assert drawn["02-seed42"] == {}
    alone = takes("seed: [1, 2]\n", "infer.models=[tuned]")
    assert alone["01-seed2"] == {"prepare": "01-seed1"}


def test_a_longer_file_keeps_the_names_of_what_is_there(tmp_path: Path) -> None:
    write_study(planned(tmp_path, FILE))
    again = planned(tmp_path, "seed: [0, 1, 2]\ntrain.learning_rate: [1e-2, 1e-3, 1e-4]\n")
    numbers = {run.trial: run.values["train.learning_rate"] for run in again.runs}
    assert numbers == {1: 1e-4, 2: 1e-3, 3: 1e-2} and len(again.runs) == 9
    assert {run.takes.get("prepare", run.name) for run in again.runs} == {"01-seed1"}
    with pytest.raises(RequestError, match=r"holds 01-seed2, .* does not ask for"):
        planned(tmp_path, "seed: [1]\ntrain.learning_rate: [1e-4]\n")


# --- played, on this machine --------------------------------------------------------------------


@pytest.fixture
def fake_study(tmp_path: Path) -> Any:
    def make(cluster: dict[str, Any] | None = None, **plan: Any) -> FakeStudy:
        return FakeStudy(tmp_path / "s", cluster or {}, **{"steps": 1, **plan})

    return make


def test_shared_work_is_done_once_and_a_second_start_does_nothing(fake_study: Any) -> None:
    made = fake_study()
    study = made.go()
    own = ["infer-tuned-0", "collect"]
    first = ["prepare", "train", "infer-base-0", *own]
    others = {f"{name}": ["train", *own] for name in ("01-seed2", "02-seed1", "02-seed2")}
    assert made.starts() == {".": ["collect"], "01-seed1": first, **others}
    for run in study.runs:
        paths = study.run(run)
        assert len(list(paths.predictions("base").glob("*.parquet"))) == 1
        assert json.loads(paths.metrics.read_text())[0].startswith("shard")
        config = load_run(paths.root)[1]
        assert submit("all", paths.root, config, made.cluster, "local") == []
    before = made.starts()
    made.go()
    assert made.starts() == before
    assert made.said == ["study: nothing to do, everything is there"]


def test_a_failed_run_does_not_end_the_others_and_is_made_up_for(fake_study: Any) -> None:
    made = fake_study(fail=["01-seed2/train", "02-seed1/infer-tuned-0"])
    with pytest.raises(StageError) as error:
        made.go()
    assert "01-seed2: train failed" in str(error.value) and "02-seed1: infer" in str(error.value)
    study = read_study(made.out)
    found, _ = collect_study(study)
    states = {name: state_of(lines) for name, lines in found.items()}
    assert {name: state for name, (state, _) in states.items()} == {
        "01-seed1": "done", "01-seed2": "failed", "02-seed1": "failed", "02-seed2": "done",
    }  # fmt: skip
    assert states["01-seed2"][1].startswith("train")
    text = render(study, found, "")
    assert "4 runs: 2 done, 2 failed" in text and "train.learning_rate=0.001" in text
    before = made.starts()
    made.plan(steps=1)
    made.go()
    done = {name: made.starts()[name][len(lines) :] for name, lines in before.items()}
    assert done == {
        ".": ["collect"],
        "01-seed1": [],
        "01-seed2": ["train", "infer-tuned-0", "collect"],
        "02-seed1": ["infer-tuned-0", "collect"],
        "02-seed2": [],
    }


def test_a_run_with_other_settings_is_never_given_files(fake_study: Any) -> None:
    made = fake_study()
    (made.folder / "vary.yaml").write_text("seed: [1, 2]\n")
    study = made.go()
    one, two = study.run("01-seed1"), study.run("01-seed2")
    for path in two.prepare.iterdir():
        path.unlink()
    record = read_json(two.run_json)
    record["config"]["resolved"]["data"]["cutoff"] = 99
    write_json(two.run_json, record)
    with pytest.raises(StageError, match=r"differ in data\.cutoff"):
        take_shared(two)
    assert not list(two.prepare.iterdir())
    share(two, {})
    assert take_shared(two) == [] and one.prepare.is_dir()


def test_a_run_takes_over_what_precision_auto_is_with_what_it_takes(fake_study: Any) -> None:
    made = fake_study()
    (made.folder / "vary.yaml").write_text("seed: [1, 2]\n")
    study = made.go()
    one, two = study.run("01-seed1"), study.run("01-seed2")
    update_run(one, precision={"chosen": "bf16", "on": "a card"})
    assert load_run(two.root)[1].infer.precision == "auto"
    assert take_shared(two) == []  # all of it is there
    assert load_run(two.root)[1].infer.precision == "bf16"
    update_run(one, precision={"chosen": "fp16", "on": "another card"})
    next(two.predictions("base").iterdir()).unlink()
    with pytest.raises(StageError, match=r"differ in infer\.precision"):
        take_shared(two)


def test_one_wrong_run_refuses_all_and_nothing_is_written(fake_study: Any) -> None:
    made = fake_study()
    (made.folder / "vary.yaml").write_text("model.path: ['demo:smollm2-135m', /nowhere/model]\n")
    before = sorted(made.folder.rglob("*"))
    with pytest.raises(RequestError, match="/nowhere/model"):
        made.go()
    assert sorted(made.folder.rglob("*")) == before


def test_the_commands_know_a_study(fake_study: Any) -> None:
    made = fake_study()
    (made.folder / "vary.yaml").write_text("seed: [1, 2]\n")
    made.go()

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "yelp_hpc", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, cwd=made.folder)

    status = command("status", "--run", "study", "--json")
    runs = json.loads(status.stdout)["runs"]
    assert {run["state"] for run in runs.values()} == {"done"} and len(runs) == 2
    assert "nothing to cancel" in command("cancel", "--run", "study").stdout
    asked = ("study", "vary.yaml", "--config", "config.yaml", "--executor", "local", "--out")
    dry = command(*asked, "elsewhere", "--dry-run")
    assert dry.returncode == 0 and "prepare of 01-seed1" in dry.stdout
    assert not (made.folder / "elsewhere").exists()
    inside = command(*asked, "study/01-seed1")
    assert inside.returncode == 2 and "is a run directory" in inside.stderr
    (made.out / "study.json").write_text("{")
    torn = command("status", "--run", "study")
    assert torn.returncode == 2 and "Traceback" not in torn.stderr
