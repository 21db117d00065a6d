"""The commands themselves on one GPU: prepare, a training that is stopped and killed, scores, F1.

    python benchmarks/gpu_commands.py [--work build/gpu] [--out gpu_commands.json] [--small]

Writes a model folder of ChatGLM3-6B's sizes with random weights (12.5 GB) and made-up reviews, and
runs each stage as a job does. One training runs through; another, from the same prepared data, is
told to save and stop, goes on, is killed, goes on: both adapters must be the same bytes. The
scores of both models then go through `collect` and `verify`. `--small` takes a tiny model, for a
CPU. Prints what was measured; 1 if a command failed or the bytes differ.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.tiny import FILLER, WORDS
from yelp_hpc.rundir.files import read_json, read_jsonl, sha256_file
from yelp_hpc.rundir.paths import RunPaths

HERE = Path(__file__).resolve().parents[1]
GOLDEN = HERE / "tests" / "models" / "golden"
WRITE_MODEL = """
import sys, torch
from yelp_hpc.forecast.model_shape import KNOWN
from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM
sizes = {k: v for k, v in KNOWN["THUDM/chatglm3-6b-base"].items() if k != "model_type"}
if sys.argv[2] == "small":
    sizes |= {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128,
              "num_attention_heads": 2, "multi_query_group_num": 1, "kv_channels": 32,
              "padded_vocab_size": 6100}
torch.manual_seed(0)
torch.set_default_dtype(torch.float16)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = ChatGLMForCausalLM(ChatGLMConfig(**sizes, seq_length=8192))
model.to("cpu").save_pretrained(sys.argv[1])
"""
SAVES = 4


def main() -> int:
    """Run it; 1 if it does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/gpu"))
    parser.add_argument("--out", type=Path, default=Path("gpu_commands.json"))
    parser.add_argument("--small", action="store_true", help="a tiny model")
    args = parser.parse_args()
    work: Path = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found: dict[str, Any] = {"same bytes": False}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was found is written
    try:
        measure(work, args.small, found)
    finally:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1), flush=True)
    return not found["same bytes"]


def measure(work: Path, small: bool, found: dict[str, Any]) -> None:
    """Every step; `found` is filled as it goes."""
    seconds: dict[str, float] = {}
    found["seconds"] = seconds

    def timed(name: str, *argv: str) -> None:
        began = time.perf_counter()
        yelp_hpc(*argv)
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"== {name}: {seconds[name]} s", flush=True)

    began = time.perf_counter()
    model = work / "model"
    command = [sys.executable, "-c", WRITE_MODEL, str(model), "small" if small else "full"]
    subprocess.run(command, check=True, cwd=HERE)
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.model", model)
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    seconds["model"] = round(time.perf_counter() - began, 1)
    _write_reviews(work / "reviews.csv", 120 if small else 1400)
    (work / "run.yaml").write_text(json.dumps(_config(work, small)))  # JSON is YAML
    whole, broken = RunPaths(work / "whole"), RunPaths(work / "broken")
    submit = ("submit", "prepare", "--executor", "local", "--config", str(work / "run.yaml"))
    timed("prepare", *submit, "--wait", "--run", str(whole.root))
    shutil.copytree(whole.root, broken.root)

    timed("train", "run", "train", "--run", str(whole.root))
    log = [line for line in read_jsonl(whole.train_log) if "tokens_per_second" in line]
    found["precision"] = read_json(whole.run_json)["precision"]
    found["steps"] = len(log)
    for name in ("tokens_per_second", "examples_per_second", "mfu"):
        values = [line[name] for line in log[SAVES:] if line.get(name)]
        found[name] = statistics.median(values) if values else None
    found["last"] = log[-1]

    began = time.perf_counter()
    stop(broken, 3, signal.SIGUSR2, expected=75)
    stop(broken, 2 * SAVES + 2, signal.SIGKILL, expected=-signal.SIGKILL)
    seconds["train, twice stopped"] = round(time.perf_counter() - began, 1)
    timed("train, to the end", "run", "train", "--run", str(broken.root))
    digests = [sha256_file(run.adapter / "adapter_model.safetensors") for run in (whole, broken)]
    found["same bytes"] = len(set(digests)) == 1

    timed("infer", "run", "infer", "--run", str(whole.root))
    timed("collect", "collect", "--run", str(whole.root))
    timed("verify", "verify", "--run", str(whole.root))
    found["metrics"] = {
        name: {key: model[key] for key in ("rows", "accuracy")}
        for name, model in read_json(whole.metrics)["models"].items()
    }


def yelp_hpc(*argv: str) -> None:
    """One command, to its end; what it says goes where ours goes."""
    subprocess.run([sys.executable, "-m", "yelp_hpc", *argv], check=True, cwd=HERE)


def stop(run: RunPaths, steps: int, number: signal.Signals, expected: int) -> None:
    """Train until so many steps stand in the log, then strike the whole job with a signal."""
    command = [sys.executable, "-m", "yelp_hpc", "run", "train", "--run", str(run.root)]
    job = subprocess.Popen(command, cwd=HERE, start_new_session=True)
    while job.poll() is None and _steps(run) < steps:
        time.sleep(0.02)
    if number == signal.SIGKILL:
        os.killpg(job.pid, number)
    else:
        job.send_signal(number)
    if job.wait() != expected:
        raise SystemExit(f"the training ended with {job.returncode}, not {expected}")


def _steps(run: RunPaths) -> int:
    lines = read_jsonl(run.train_log) if run.train_log.is_file() else []
    return max((line.get("step", 0) for line in lines), default=0)


def _config(work: Path, small: bool) -> dict[str, Any]:
    return {
        "model": {"path": str(work / "model")},
        "data": {
            "source": "file", "train": str(work / "reviews.csv"), "test_rows": 20 if small else 400,
        },
        "lora": {"target": ["query_key_value"]},
        "train": {"global_batch": 8 if small else 32, "save_every_steps": SAVES, "max_steps": 20},
        "infer": {"shards": 2},
    }  # fmt: skip


def _write_reviews(path: Path, count: int) -> None:
    """Of lengths like Yelp's: a median of about 130 tokens, a few of some hundreds."""
    draw = random.Random(0)
    words = [*FILLER, *(word for label in WORDS.values() for word in label)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        for i in range(count):
            length = min(700, max(5, int(draw.lognormvariate(4.2, 0.8))))
            writer.writerow([i % 5, " ".join(draw.choice(words) for _ in range(length))])


if __name__ == "__main__":
    sys.exit(main())
