"""The main job through the command line, every stage real, on tiny models of two architectures."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_install import SHADOWS
from tests.tiny import make_model, reviews
from yelp_hpc.rundir.files import read_json
from yelp_hpc.rundir.paths import RunPaths

GOLDEN = Path(__file__).parent / "models" / "golden"


def tiny_chatglm3(folder: Path) -> Path:
    """A random ChatGLM3 under the published names, with a sentencepiece tokenizer."""
    import torch

    from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM

    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.model", folder)
    values = json.loads((GOLDEN / "model" / "config.json").read_text(encoding="utf-8"))
    values |= {"hidden_size": 64, "num_attention_heads": 2, "multi_query_group_num": 1}

    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    values["padded_vocab_size"] = 6_100  # the tokenizer has 6,009 tokens
    values.pop("auto_map")
    torch.manual_seed(0)
    model = ChatGLMForCausalLM(ChatGLMConfig(**values))
    model.save_pretrained(folder)
    return folder


def yelp_hpc(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yelp_hpc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("architecture", ["llama", "chatglm3"])
def test_submit_all_gives_a_table_that_verifies(tmp_path: Path, architecture: str) -> None:
    make = {"llama": make_model, "chatglm3": tiny_chatglm3}[architecture]
    model = make(tmp_path / "model")
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        writer.writerows((label, text) for text, label in reviews(120))
    config = {
        "model": {"path": str(model)},
        "data": {"source": "file", "train": str(tmp_path / "reviews.csv"), "test_rows": 20},
        "lora": {"target": ["query_key_value"] if architecture == "chatglm3" else None},
        "train": {
            **{"learning_rate": 1e-3, "warmup_steps": 2, "global_batch": 16, "max_tokens": 1024},
            "gradient_checkpointing": "on" if architecture == "llama" else "auto",
        },
        "infer": {"shards": 2},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    run = RunPaths(tmp_path / "run")
    submit = (
        *("submit", "all", "--executor", "local", "--wait"),
        *("--config", str(tmp_path / "c.yaml"), "--run", str(run.root)),
    )

    for name in SHADOWS:  # nothing of the user's folder is in the way of any process of a run
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')\n")
    done = yelp_hpc(*submit, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logs = {log.name: log.read_text(encoding="utf-8") for log in run.logs.glob("*.log")}
    assert "prepare.log" in logs  # it wraps a twin, train and infer the model itself
    assert not [name for name, text in logs.items() if "Warning:" in f"{text}{done.stderr}"]
    metrics = read_json(run.metrics)
    for name in ("base", "tuned"):
        assert metrics["models"][name]["rows"] == 20
        assert metrics["models"][name]["answered"] == 20
    assert run.report.is_file() and run.loss_png.is_file()
    adapter = read_json(run.adapter / "adapter_config.json")
    if architecture == "chatglm3":
        assert adapter["target_modules"] == ["query_key_value"]

    again = yelp_hpc(*submit)
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True)
    verified = yelp_hpc("verify", "--run", str(run.root))
    assert verified.returncode == 0, verified.stderr

    whole = run.shard("tuned", 1, 2).read_bytes()
    run.shard("tuned", 1, 2).write_bytes(whole[: len(whole) // 2])  # cut in half
    before = run.metrics.read_bytes()
    refused = yelp_hpc("collect", "--run", str(run.root))
    assert refused.returncode == 1
    assert run.shard("tuned", 1, 2).name in refused.stderr
    assert run.metrics.read_bytes() == before
