"""Natural mistakes: the message names the thing and the next command; nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from yelp_hpc.cli.main import main

SUBMIT = "submit all --config c.yaml --run run --executor local"
SHOW = "config show --config c.yaml --set"
DRY = "submit all --config c.yaml --run run --dry-run --cluster cl.yaml"

TYPED = [
    # flags of other tools
    (f"{SUBMIT} --lr 1e-4", "--set train.learning_rate=VALUE"),
    (f"{SUBMIT} --learning_rate 1e-4", "--set train.learning_rate=VALUE"),
    (f"{SUBMIT} --epochs 3", "--set train.epochs=VALUE"),
    (f"{SUBMIT} --num_train_epochs 3.0", "--set train.epochs=VALUE"),
    (f"{SUBMIT} --batch-size 8", "--set train.global_batch=VALUE"),
    (f"{SUBMIT} --per_device_train_batch_size 4", "--set train.global_batch=VALUE"),
    (f"{SUBMIT} --gradient_accumulation_steps 2", "--set train.global_batch=VALUE"),
    (f"{SUBMIT} --lora_rank 8", "--set lora.rank=VALUE"),
    (f"{SUBMIT} --lora_target q_proj", "--set lora.target=VALUE"),
    (f"{SUBMIT} --model_name_or_path x", "--set model.path=VALUE"),
    (f"{SUBMIT} --cutoff_len 512", "--set data.cutoff=VALUE"),
    (f"{SUBMIT} --max_samples 100", "--set data.train_rows=VALUE"),
    (f"{SUBMIT} --val_size 0.1", "--set data.validation_share=VALUE"),
    (f"{SUBMIT} --lr_scheduler_type cosine", "--set train.schedule=VALUE"),
    (f"{SUBMIT} --logging_steps 10", "--set train.log_every=VALUE"),
    (f"{SUBMIT} --save_steps 100", "--set train.save_every_steps=VALUE"),
    (f"{SUBMIT} --fp16", "--set train.precision=VALUE"),
    (f"{SUBMIT} --seed 1", "--set seed=VALUE"),
    (f"{SUBMIT} --train.epochs 1", "--set train.epochs=VALUE"),
    (f"{SUBMIT} --hub_model_id a/b", "--set publish.repo_id=VALUE"),
    (f"{SUBMIT} --shards 4", "--set infer.shards=VALUE"),
    # keys that are called otherwise
    (f"{SHOW} train.lr=1", "did you mean train.learning_rate?"),
    (f"{SHOW} train.batch=1", "did you mean train.global_batch?"),
    (f"{SHOW} train.batch_size=1", "did you mean train.global_batch?"),
    (f"{SHOW} train.num_train_epochs=1", "did you mean train.epochs?"),
    (f"{SHOW} model.name_or_path=x", "did you mean model.path?"),
    (f"{SHOW} lora.r=4", "did you mean lora.rank?"),
    (f"{SHOW} data.max_length=4", "did you mean data.cutoff?"),
    (f"{SHOW} train.seed=4", "did you mean seed?"),
    (f"{SHOW} learning_rate=4", "did you mean train.learning_rate?"),
    # commands
    ("train --config c.yaml --run run", "submit train --config FILE --run DIR"),
    ("infer --run run", "run infer --run DIR"),
    ("prepare", "submit prepare"),
    ("eval --run run", "python -m yelp_hpc collect"),
    ("kill --run run", "python -m yelp_hpc cancel"),
    ("download --config c.yaml", "python -m yelp_hpc fetch"),
    ("finetune", "python -m yelp_hpc submit train"),
    # the request
    ("submit publish --config c.yaml --run run --executor local", "--set publish.repo_id="),
    ("submit collect --config c.yaml --run run --executor local", "submit infer"),
    ("submit infer --config c.yaml --run run --executor local", "submit prepare"),
    ("submit train --config cc.yaml --run run", "did you mean c.yaml?"),
    ("status --run run", "submit all --config FILE --run run"),
    (f"{SUBMIT} --set model.path=modle", "did you mean model?"),
    (f"{SUBMIT} --set data.train=rewiews.csv", "did you mean reviews.csv?"),
    (f"{SUBMIT} --set data.label_column=stars", "it has: label, text"),
    (f"{SUBMIT} --cluster gone.yaml", "gone.yaml does not exist"),
]
CLUSTERS = [
    ("defaults: {account: 0123}", "defaults.account: put it in quotes: YAML reads it as a number"),
    ("defaults: {gpu_type: 3090}", "put it in quotes"),
    ("defaults: {partition: 2024-01-01}", "put it in quotes"),
    ("defaults: {walltime: '1:00:00'}", "did you mean defaults.time?"),
    ("defaults: {mem: 4G}", "did you mean defaults.memory?"),
    ("train: {gres: 'gpu:4'}", "did you mean train.gpus?"),
    ("defaults: {queue: gpu}", "did you mean defaults.partition?"),
    ("container: {sif: x.sif}", "did you mean container.image?"),
    ("container: {image: gone.sif}", "image build"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "reviews.csv").write_text("label,text\n0,bad\n4,good\n")
    (tmp_path / "c.yaml").write_text(
        "model: {path: model}\ndata: {source: file, train: reviews.csv, test_rows: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["yelp_hpc", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out + captured.err


@pytest.mark.parametrize(("line", "expected"), TYPED, ids=[line for line, _ in TYPED])
def test_the_message_names_the_thing_and_the_next_command(
    folder: Path,
    line: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(folder.rglob("*"))
    code, said = typed(line, monkeypatch, capsys)
    assert code == 2 and expected in " ".join(said.split()), said
    assert "Traceback" not in said and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("text", "expected"), CLUSTERS, ids=[text for text, _ in CLUSTERS])
def test_a_cluster_file_is_mended_by_its_message(
    folder: Path,
    text: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "cl.yaml").write_text(text + "\n")
    code, said = typed(DRY, monkeypatch, capsys)
    assert code == 2 and expected in " ".join(said.split()), said


def test_memory_is_taken_as_people_write_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from yelp_hpc.jobs.cluster import load_cluster

    for text in ("64GB", "64GiB", "64g", "64G"):
        (folder / "cl.yaml").write_text(f"defaults: {{memory: {text}}}\n")
        assert load_cluster(folder / "cl.yaml").defaults.memory == "64G"
