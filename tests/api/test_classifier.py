"""Classifier: the answers of the run, from wherever a model lies, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from tests.hub.finished import BASE, REPO, finish_run, settings
from tests.hub.server import serving
from tests.hub.state import Hub
from yelp_hpc import Classifier, Prediction
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.own_files import IMPORT_ROOT
from yelp_hpc.publishing.export import export_merged
from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages import publish
from yelp_hpc.training.adapter import adapter_config

Finished = tuple[RunPaths, Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    return finish_run(folder / "run", folder / "model"), folder / "model"


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> RunPaths:
    shutil.copytree(finished[0].root, tmp_path / "run")
    return RunPaths(tmp_path / "run")


def texts_of(run: RunPaths) -> list[str]:
    found: list[str] = pandas.read_parquet(run.split("test"))["text"].tolist()
    return found


def shards_of(run: RunPaths, model: str = "tuned") -> pandas.DataFrame:
    return pandas.read_parquet(run.predictions(model))


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_it_answers_as_the_shards_do(finished: Finished, model: str) -> None:
    run, base = finished
    classifier = Classifier(run.root, model, base=base)
    assert "loaded when first asked" in repr(classifier) and "5 stars" in repr(classifier)
    found = classifier.predict(texts_of(run))
    shards = shards_of(run, model)
    assert [one.label for one in found] == [str(p) for p in shards["prediction"]]
    assert model == "base" or len({one.label for one in found}) > 1
    scores = np.stack(shards["scores"].to_list()).astype(float)
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert np.allclose([list(one.probabilities.values()) for one in found], chances, atol=1e-5)
    expected = np.array([one.expected for one in found], dtype=float)
    assert np.allclose(expected, chances @ np.arange(5), atol=1e-4)
    assert [one.name for one in found] == [classifier.names[int(one.label or 0)] for one in found]
    # however few are asked at once, from whatever holds texts
    few = classifier.predict(pandas.Series(texts_of(run)[3:5]))
    assert [one.label for one in few] == [one.label for one in found[3:5]]
    assert classifier.predict([]) == []
    assert repr(classifier).endswith("; loaded)")


def test_a_prediction_shows_what_matters() -> None:
    one = Prediction("4", "5 stars", {"0": 0.25, "4": 0.75}, 3.0)
    assert repr(one) == "Prediction('4', name='5 stars', probability=0.750, expected=3.00)"
    written = Prediction(None, None, {}, None, "no idea")
    assert repr(written) == "Prediction(None, generated='no idea')"


def test_generate_mode_gives_what_was_written(run: RunPaths, finished: Finished) -> None:
    record = read_json(run.run_json)
    record["config"]["resolved"]["infer"] |= {"mode": "generate", "max_new_tokens": 4}
    write_json(run.run_json, record)
    found = Classifier(run.root, base=finished[1]).predict(texts_of(run)[:4])
    assert all(isinstance(one.generated, str) and not one.probabilities for one in found)
    assert all((one.label is None) == (one.name is None) for one in found)


def test_answers_alone_are_those_with_probabilities(run: RunPaths, finished: Finished) -> None:
    texts = texts_of(run)[:6]
    scored = Classifier(run.root, base=finished[1]).predict(texts)
    alone = Classifier(run.root, base=finished[1], answers_only=True).predict(texts)
    assert [one.label for one in alone] == [one.label for one in scored]
    assert all(one.name and not one.probabilities and one.expected is None for one in alone)


FORKED = """
import multiprocessing, os, pickle, sys, threading
from dataclasses import asdict
from yelp_hpc import Classifier
os.chdir(sys.argv[1])
classifier = Classifier("run/train/adapter", base="model")
os.chdir("/")
texts = [f"the food was {word} and cold" for word in "awful rude fine good great".split()] * 4
def labels(part):
    return [one.label for one in classifier.predict(part)]
together = []
threads = [threading.Thread(target=lambda: together.append(labels(texts))) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
wanted = labels(texts)
assert together == [wanted] * 3
assert asdict(classifier.predict(texts)[0])["probabilities"]
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert [one.label for one in pool.apply(classifier.predict, (texts,))] == wanted
    assert pool.apply(labels, (texts,)) == wanted
"""


def test_threads_forks_and_copies_of_it_answer_alike(run: RunPaths, finished: Finished) -> None:
    """Named by relative paths, and the working directory is another when it is asked."""
    (run.root.parent / "model").symlink_to(finished[1])
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT), "OMP_NUM_THREADS": "2"}
    argv = [sys.executable, "-c", FORKED, str(run.root.parent)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


FRESH = """
import json, sys
import yelp_hpc
from yelp_hpc import Classifier
assert yelp_hpc.__file__.startswith(sys.prefix), yelp_hpc.__file__
assert not {"torch", "transformers", "pyarrow", "pandas"} & set(sys.modules)
texts = json.loads(sys.argv[1])
answers = {
    source: [one.label for one in Classifier(source).predict(texts)] for source in sys.argv[2:6]
}
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

head, tail = json.loads(sys.argv[6])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[5])
ids = [tokenizer(head + text + tail, return_tensors="pt") for text in texts]
digits = [tokenizer(str(i))["input_ids"][-1] for i in range(5)]
for name, model in {
    "peft": AutoPeftModelForCausalLM.from_pretrained(sys.argv[7]),
    "transformers": AutoModelForCausalLM.from_pretrained(sys.argv[5]),
}.items():
    logits = [model.eval()(**one).logits[0, -1, digits] for one in ids]
    answers[name] = [str(int(one.argmax())) for one in logits]
print(json.dumps(answers))
"""


def test_three_lines_in_a_fresh_environment_from_a_run_a_merged_model_a_copy_and_the_hub(
    run: RunPaths,
    finished: Finished,
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the published adapter by transformers, the run's by PEFT's Auto class.

    The environment has the wheel, and the working directory is empty.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read at import
    model = finished[1]
    config = settings(model)
    with serving(Hub(tmp_path / "hub")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "good-token")
        state = hub.create(BASE, private=False)
        files = {p.name: hub.put_blob(p.read_bytes()) for p in model.iterdir()}
        hub.commit(state, "refs/heads/main", files, "base", state["refs"]["refs/heads/main"])
        hub.save(BASE, state)
        publish.run(run, config)
        copy = tmp_path / "copy"
        copy.mkdir()
        for name, content in hub.files(REPO).items():
            (copy / name).write_bytes(content)
        local = config.model.model_copy(update={"path": str(model)})
        export_merged(run, config.model_copy(update={"model": local}), tmp_path / "merged")
        sources = [str(run.root), str(tmp_path / "merged"), str(copy), REPO]
        head, _, tail = config.prompt.template.removesuffix("{label}").partition("{review}")
        empty = tmp_path / "empty"
        empty.mkdir()
        given = [json.dumps(texts_of(run)), *sources, json.dumps([head, tail]), str(run.adapter)]
        done = subprocess.run(
            [installed / "python", "-c", FRESH, *given],
            env={
                **{
                    k: v
                    for k, v in os.environ.items()
                    if not k.startswith(("HF_", "YELP_", "PYTHON"))
                },
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": "good-token",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path / "home"),
                "YELP_HPC_CACHE": str(tmp_path / "cache"),
            },
            cwd=empty,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    wanted = [str(p) for p in shards_of(run)["prediction"]]
    assert answers == dict.fromkeys([*sources, "peft", "transformers"], wanted)


def test_the_demos_adapter_names_the_folder_of_its_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Shape:
        def to_dict(self) -> dict[str, Any]:
            return {"r": 4}

    class Adapted:
        peft_config = {"default": Shape()}  # noqa: RUF012

    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path))
    config = settings(tmp_path)
    demo = config.model.model_copy(update={"path": "demo:smollm2-135m"})
    values = adapter_config(Adapted(), config.model_copy(update={"model": demo}))
    assert values["base_model_name_or_path"] == str(tmp_path / "models" / "smollm2-135m")
    assert adapter_config(Adapted(), config)["base_model_name_or_path"] == BASE


def test_the_adapter_folder_of_a_run_is_enough(run: RunPaths, finished: Finished) -> None:
    classifier = Classifier(run.adapter, base=finished[1])
    wanted = [str(p) for p in shards_of(run)["prediction"][:3]]
    assert [one.label for one in classifier.predict(texts_of(run)[:3])] == wanted


def test_what_is_no_source_is_refused(
    run: RunPaths, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RequestError, match="neither a folder here nor a Hub repository"):
        Classifier(tmp_path / "nothing")
    with pytest.raises(StageError, match="me/nothing"):
        Classifier("me/nothing")
    with pytest.raises(RequestError, match="not a run directory"):
        Classifier(tmp_path)
    with pytest.raises(RequestError, match="one of 'base', 'tuned'"):
        Classifier(run.root, "best")
    alone = tmp_path / "alone"
    shutil.copytree(run.adapter, alone)
    with pytest.raises(RequestError, match=r"has no run\.json, which tells the prompt"):
        Classifier(alone, base=finished[1])
    record = read_json(run.run_json)
    record["config"]["resolved"]["model"]["path"] = "gone"
    write_json(run.run_json, record)
    with pytest.raises(RequestError, match=r"gone, is neither a folder.*base='PATH'"):
        Classifier(run.root, "base")
    with pytest.raises(StageError, match="was not trained by this run"):
        Classifier(run.root, base=finished[1])
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RequestError, match="no finished adapter"):
        Classifier(run.root, base=finished[1])


def test_what_is_no_text_is_refused_before_anything_is_loaded(finished: Finished) -> None:
    classifier = Classifier(finished[0].root, base=finished[1])
    with pytest.raises(TypeError, match="a list of texts"):
        classifier.predict("one text")
    column = pandas.Series(["good", "bad"])
    for table in (pandas.DataFrame({"text": column}), {"text": "good"}, {"good", "bad"}):
        with pytest.raises(TypeError, match="a list or a column of texts, not a "):
            classifier.predict(table)
    with pytest.raises(RequestError, match=r"texts\[1\] holds half a character"):
        classifier.predict(["gut, schön", "bad \udc80"])
    odd: Any = "int8"
    with pytest.raises(RequestError, match="precision"):
        Classifier(finished[0].root, base=finished[1], precision=odd)
    wrong: Any = ["good", None]
    with pytest.raises(TypeError, match=r"texts\[1\] is None"):
        classifier.predict(wrong)
    with pytest.raises(RequestError, match=r"texts\[0\] is blank(.|\n)*texts\[2\] is blank"):
        classifier.predict(["", "good", " \n"])
    assert "loaded when first asked" in repr(classifier)
