"""run.json under two writers at once, and under a killed one."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest

from yelp_hpc.config import Config, LoadedConfig, Precision, load_config
from yelp_hpc.errors import RequestError
from yelp_hpc.inference.provenance import wanted
from yelp_hpc.rundir.files import read_json, write_json, write_marker
from yelp_hpc.rundir.manifest import (
    Asked,
    check_asked,
    code_state,
    load_run,
    record_run,
    recorded_config,
    settle_precision,
    update_run,
)
from yelp_hpc.rundir.paths import RunPaths


def test_sections_that_several_write_at_once_are_all_kept(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    write_json(run.run_json, {"seed": 1})

    def write(name: str) -> None:
        for i in range(25):
            update_run(run, **{f"{name}{i}": i})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_json(run.run_json)) == 76


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A finished run of a version in which a default was another and two keys were not there."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("model: {path: m}\ndata: {source: demo}\ntrain: {epochs: 2}\n")
    run = record_run("run", load_config("c.yaml"), "c.yaml", [])
    record = json.loads(run.run_json.read_text())
    record["config"]["resolved"]["train"]["warmup_steps"] = 20
    del record["config"]["resolved"]["task"], record["config"]["resolved"]["data"]["seed"]
    write_json(run.run_json, record)
    for folder in (run.prepare, run.adapter):
        folder.mkdir(parents=True)
        write_marker(folder, [])
    return run


def test_a_run_keeps_the_defaults_that_it_was_made_with(old: RunPaths) -> None:
    assert check_asked(old.root, Asked(load_config("c.yaml"), "c.yaml")) == []
    record_run(old.root, load_config("c.yaml"), "c.yaml", [])
    changed = ("collect.bootstrap=300",)
    asked = Asked(load_config("c.yaml", changed), "c.yaml", changed)
    assert check_asked(old.root, asked) == [("collect.bootstrap", 2000, 300)]
    asked.record(old.root)
    _, config = load_run(old.root)
    assert (config.train.warmup_steps, config.collect.bootstrap) == (20, 300)


@pytest.mark.parametrize(
    "given", ["train.warmup_steps=auto", "train.epochs=1", "task.labels=[a, b]", "data.seed=3"]
)
def test_what_is_given_is_another_configuration_still(old: RunPaths, given: str) -> None:
    asked = Asked(load_config("c.yaml", (given,)), "c.yaml")
    with pytest.raises(RequestError, match="was made with another configuration"):
        check_asked(old.root, asked)


def test_a_record_of_before_train_compile_went_is_read(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "data": {"source": "demo"}, "train": {"compile": False}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": {"resolved": values}}))
    assert recorded_config(path).train.epochs == 1
    path.write_text(json.dumps({"config": {"resolved": {**values, "train": {"compile": True}}}}))
    with pytest.raises(RequestError, match=r"train\.compile"):
        recorded_config(path)


# precision: auto


def begin(run: RunPaths, stage: str, chosen: Precision, *overrides: str) -> Config:
    """A stage's first look at the configuration on a machine whose `auto` is `chosen`."""
    config = asked_for(*overrides).config if overrides else load_run(run.root)[1]
    return settle_precision(run, config, stage, lambda: (chosen, f"a {chosen} machine"))


def asked_for(*overrides: str) -> LoadedConfig:
    return load_config("c.yaml", overrides)


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("model: {path: m}\ndata: {source: demo}\n")
    return record_run("run", asked_for(), "c.yaml", [])


def test_precision_auto_is_chosen_once_and_every_reader_has_it(auto: RunPaths) -> None:
    assert load_run(auto.root)[1].train.precision == "auto"
    assert begin(auto, "train", "bf16").train.precision == "bf16"
    again = begin(auto, "infer", "fp16")  # on an older card: the run keeps its own
    assert (again.train.precision, again.infer.precision) == ("bf16", "bf16")
    assert read_json(auto.run_json)["precision"] == {"chosen": "bf16", "on": "a bf16 machine"}
    config = load_run(auto.root)[1]
    assert (config.train.precision, config.infer.precision) == ("bf16", "bf16")
    assert wanted(auto, asked_for().config, "base").precision == "bf16"
    assert read_json(auto.run_json)["config"]["resolved"]["train"]["precision"] == "auto"


def test_an_inference_before_the_training_chooses_for_itself_alone(
    auto: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    config = begin(auto, "infer", "fp32")  # on a login node, say
    assert "chosen on a fp32 machine and kept until the training chooses" in capsys.readouterr().err
    assert config.infer.precision == "fp32"
    again = begin(auto, "infer", "bf16")  # its next shard, on another node
    assert (again.train.precision, again.infer.precision) == ("auto", "fp32")
    assert load_run(auto.root)[1].train.precision == "auto"
    before = wanted(auto, asked_for().config, "base")
    assert begin(auto, "train", "bf16").train.precision == "bf16"
    assert "an inference before it took fp32: what it predicted" in capsys.readouterr().err
    assert begin(auto, "infer", "fp32").infer.precision == "bf16"
    assert begin(auto, "train", "fp16").train.precision == "bf16"
    assert read_json(auto.run_json)["precision"] == {"chosen": "bf16", "on": "a bf16 machine"}
    after = wanted(auto, asked_for().config, "base")  # no shard of before is taken beside it
    assert (before.precision, after.precision) == ("fp32", "bf16")
    assert before.identity != after.identity
    assert "precision fp32, this run has bf16" in after.unlike(
        {key.removeprefix("yelp_hpc."): value for key, value in before.metadata().items()}
    )


def test_a_precision_that_is_named_later_is_the_inferences_too(auto: RunPaths) -> None:
    begin(auto, "infer", "fp32")
    record_run(auto.root, asked_for("train.precision=fp16"), "c.yaml", ["train.precision=fp16"])
    config = load_run(auto.root)[1]
    assert (config.train.precision, config.infer.precision) == ("fp16", "fp16")


def test_two_machines_that_begin_at_once_agree(auto: RunPaths) -> None:
    found: list[str] = []

    def begun(chosen: Precision) -> None:
        config = asked_for().config
        settled = settle_precision(auto, config, "infer", lambda: (chosen, chosen))
        found.append(settled.infer.precision)

    choices: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
    threads = [threading.Thread(target=begun, args=(one,)) for one in choices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len({*found}) == 1


def test_a_stage_whose_precision_is_named_chooses_nothing(auto: RunPaths) -> None:
    config = begin(auto, "infer", "fp16", "infer.precision=fp32")
    assert (config.train.precision, config.infer.precision) == ("auto", "fp32")
    named = begin(auto, "infer", "fp16", "train.precision=bf16")
    assert (named.train.precision, named.infer.precision) == ("bf16", "bf16")
    assert wanted(auto, asked_for("train.precision=bf16").config, "base").precision == "bf16"
    assert "precision" not in read_json(auto.run_json)


def test_auto_and_what_it_was_chosen_to_be_are_one_configuration(auto: RunPaths) -> None:
    def asked(value: str) -> Asked:
        return Asked(asked_for(f"train.precision={value}"), "c.yaml")

    both = [(f"{stage}.precision", "auto", "fp16") for stage in ("infer", "train")]
    assert check_asked(auto.root, asked("fp16")) == both
    begin(auto, "train", "bf16")
    auto.adapter.mkdir(parents=True)
    write_marker(auto.adapter, [])
    for value in ("auto", "bf16"):
        assert check_asked(auto.root, asked(value)) == []
        asked(value).record(auto.root)
        assert load_run(auto.root)[1].train.precision == "bf16"
    with pytest.raises(RequestError, match=r"train\.precision: 'bf16' in the run .* 'fp16'"):
        check_asked(auto.root, asked("fp16"))
    free = Asked(asked_for("infer.precision=fp32"), "c.yaml")
    assert check_asked(auto.root, free) == [("infer.precision", "bf16", "fp32")]


def test_a_run_of_before_auto_keeps_fp32(old: RunPaths) -> None:
    record = read_json(old.run_json)
    for stage in ("train", "infer"):
        record["config"]["resolved"][stage]["precision"] = "fp32"
    write_json(old.run_json, record)
    assert check_asked(old.root, Asked(load_config("c.yaml"), "c.yaml")) == []


@pytest.mark.parametrize("section", ["bf16", {"chosen": "int8"}, {"chosen": 3}, []])
def test_a_garbled_choice_is_said(auto: RunPaths, section: object) -> None:
    update_run(auto, precision=section)
    with pytest.raises(RequestError, match="precision"):
        load_run(auto.root)


def test_the_record_of_the_code_is_the_same_however_the_shell_has_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "yelp_hpc" / "__init__.py"
    source.parent.mkdir()
    source.write_text("before\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *step], check=True)
    source.write_text("after\n")
    monkeypatch.setattr("yelp_hpc.rundir.manifest.IMPORT_ROOT", tmp_path)
    said = "[diff]\nexternal = true\nnoprefix = true\n[color]\nui = always\n"
    (tmp_path / ".gitconfig").write_text(said)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # of the hook of another repository
    found = code_state()
    monkeypatch.delenv("GIT_DIR")
    assert found["git_sha"] and found["dirty"]
    back = [*git, "apply", "--check", "-R"]
    subprocess.run(back, input=found["diff"], text=True, check=True)
