"""train.adapter: an adapter that exists is evaluated as plain peft evaluates it, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import make_model, prepare_run, tiny_config
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.inference.provenance import wanted
from yelp_hpc.models.local import folder_fingerprint
from yelp_hpc.proof.verify import verify
from yelp_hpc.publishing.export import export_merged
from yelp_hpc.rundir.files import read_json, read_marker, write_json, write_marker
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.origin import foreign_adapter
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages import collect, infer, publish, train

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "everywhere": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "rslora": {"r": 5, "lora_alpha": 7, "target_modules": ["down_proj"], "use_rslora": True},
    "bias": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "lora_bias": True},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base")


def peft_folder(folder: Path, model: Path, **settings: Any) -> Path:
    """An adapter with random weights, saved by plain peft."""
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(5)
    tuned: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    tuned.save_pretrained(folder)
    return folder


def run_of(root: Path, model: Path, adapter: object, **changes: Any) -> tuple[RunPaths, Config]:
    """A prepared run whose adapter is one that exists."""
    run = prepare_run(root, model)
    train_settings = {"adapter": str(adapter), **changes.pop("train", {})}
    config = tiny_config(model, train=train_settings, **changes)
    write_marker(run.prepare, [p.name for p in run.prepare.iterdir() if p.name != "complete.json"])
    resolved = config.model_dump(mode="json")
    record = {"config": {"given": resolved, "resolved": resolved}, "seed": config.seed,
              "model": {"fingerprint": folder_fingerprint(model)}}  # fmt: skip
    write_json(run.run_json, record)
    return run, config


def scored_as_by(plain: Any, run: RunPaths) -> pa.Table:
    """The tuned model's predictions, once its scores are a plain model's."""
    table = pq.read_table(run.predictions("tuned"))
    labels = read_json(run.tokens)["label_ids"]
    prompts = pq.read_table(run.split("test"))["input_ids"].to_pylist()
    for prompt, scores in zip(prompts, table["scores"].to_pylist(), strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt])).logits[0, -1, labels]
        assert scores == pytest.approx(logits.tolist(), abs=1e-5)
    return table


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_plain_peft(tmp_path: Path, model: Path, kind: str) -> None:
    adapter = peft_folder(tmp_path / "adapter", model, **KINDS[kind])
    run, config = run_of(tmp_path / "run", model, adapter)
    train.run(run, config)
    infer.run(run, config, model="tuned")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    table = scored_as_by(plain, run)
    infer.run(run, config, model="base")
    base = pq.read_table(run.predictions("base"))["scores"].to_pylist()
    assert base[0] != pytest.approx(table["scores"].to_pylist()[0], abs=1e-2)
    merged = tmp_path / "merged"
    if kind == "bias":
        with pytest.raises(RequestError, match=r"a bias of its own for \S+v_proj, which has none"):
            export_merged(run, config, merged)
        assert not merged.exists()
    else:
        export_merged(run, config, merged)
        scored_as_by(AutoModelForCausalLM.from_pretrained(merged), run)


def test_an_output_that_is_adapted_leaves_the_input_that_shares_its_weight(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base", tie_word_embeddings=True)
    settings = {"adapter": None, "max_steps": 3, "learning_rate": 0.05}
    lora = {"target": ["q_proj", "lm_head"]}
    run, config = run_of(tmp_path / "run", model, None, train=settings, lora=lora)
    train.run(run, config)
    infer.run(run, config, model="tuned")
    base = AutoModelForCausalLM.from_pretrained(model)
    scored_as_by(PeftModel.from_pretrained(base, run.adapter), run)
    export_merged(run, config, tmp_path / "merged")
    scored_as_by(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), run)
    assert read_json(tmp_path / "merged/config.json")["tie_word_embeddings"] is False


def test_it_is_one_chain_whose_record_says_what_was_taken(tmp_path: Path, model: Path) -> None:
    adapter = peft_folder(tmp_path / "adapter", model, **KINDS["rslora"])
    run, config = run_of(tmp_path / "run", model, adapter)
    for _ in range(2):  # again: nothing to do
        train.run(run, config)
        for name in config.infer.models:
            infer.run(run, config, model=name)
    collect.run(run, config)
    assert verify(run) == []
    taken = (read_marker(run.adapter) or {})["taken"]
    assert taken["from"] == str(adapter) and taken["trained"] is None
    assert wanted(run, config, "tuned").adapter_sha256 == taken["sha256"]
    export_merged(run, config, tmp_path / "merged")
    with pytest.raises(StageError, match="publish the run that trained it"):
        publish.run(run, config, dry_run=True)
    record = read_json(run.run_json)
    record["config"]["resolved"]["train"]["adapter"] = str(tmp_path / "another")
    write_json(run.run_json, record)
    assert any("train.adapter is" in line for line in verify(run))


def trained(root: Path, model: Path) -> RunPaths:
    run, _ = run_of(root, model, None)
    record = read_json(run.run_json)
    for part in ("given", "resolved"):
        record["config"][part]["train"] |= {"adapter": None, "max_steps": 2}
    write_json(run.run_json, record)
    train.run(*load_run(root))
    return run


def test_an_adapter_of_a_run_carries_its_training_along(tmp_path: Path, model: Path) -> None:
    source = trained(tmp_path / "source", model)
    run, config = run_of(tmp_path / "run", model, source.root)
    train.run(run, config)
    for name in config.infer.models:
        infer.run(run, config, model=name)
    collect.run(run, config)
    assert verify(run) == []
    theirs = read_marker(source.adapter) or {}
    taken = (read_marker(run.adapter) or {})["taken"]
    assert taken["trained"] == theirs["fingerprint"] and taken["step"] == 2
    source.split("train").write_bytes(b"other rows")  # what it says it was trained on
    assert any("not what the adapter was trained on" in line for line in verify(run))
    shutil.rmtree(source.root)  # what was recorded stays
    assert verify(run) == []
    marker = run.adapter / "complete.json"
    altered = json.loads(marker.read_text())
    altered["taken"]["sha256"] = "0" * 64
    marker.write_text(json.dumps(altered))
    assert any("not the one that was taken" in line for line in foreign_adapter(run, config))


def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path: Path, model: Path) -> None:
    def refused(adapter: object, said: str) -> None:
        run, config = run_of(tmp_path / "run", model, adapter)
        with pytest.raises((RequestError, StageError), match=said):
            train.run(run, config)
        assert not run.adapter.exists()

    wide = make_model(tmp_path / "wide", hidden_size=64)
    twin = make_model(tmp_path / "twin", seed=1)
    refused(tmp_path / "nowhere", "neither a folder here nor a Hub")
    refused(model, "it is no adapter's folder")
    good = KINDS["plain"]
    refused(peft_folder(tmp_path / "a", twin, **good), "another base model")
    other = peft_folder(tmp_path / "b", wide, **good)
    settings = read_json(other / "adapter_config.json")
    write_json(other / "adapter_config.json", {**settings, "base_model_name_or_path": "gone"})
    refused(other, r"is \(8, 64\), the model wants \(8, 32\)")
    folder = peft_folder(tmp_path / "c", model, **good)
    settings = read_json(folder / "adapter_config.json")
    for change, said in (
        ({"r": 4}, r"is \(8, 32\), the model wants \(4, 32\)"),
        ({"target_modules": ["q_proj"]}, "v_proj.* belongs to no module"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj.* is missing"),
        ({"target_modules": ["nonsense"]}, "does not fit the model"),
        ({"peft_type": "PROMPT_TUNING"}, "LORA is wanted"),
        ({"alora_invocation_tokens": [5]}, "an aLoRA"),
    ):
        write_json(folder / "adapter_config.json", {**settings, **change})
        refused(folder, said)
    write_json(folder / "adapter_config.json", settings)
    output = {**good, "target_modules": ["lm_head"]}
    refused(peft_folder(tmp_path / "d", model, **output), "save_embedding_layers=False")
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    refused(folder, "torn or no safetensors")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "pickle")
    source = trained(tmp_path / "source", model)
    (source.adapter / "complete.json").unlink()
    refused(source.root, "no finished adapter")
