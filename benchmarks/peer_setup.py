"""LLaMA-Factory as the benchmarks beside it run it: its environment, flags and data."""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEER = ("llamafactory==0.9.5", "jieba", "nltk", "rouge-chinese")
TORCH = "torch==2.13.0"
INSTRUCTION = (
    "The following is a user's review of a merchant. Please judge and output the corresponding "
    "five-star rating for this review."
)
SWITCHES: dict[str, dict[str, Any]] = {
    "default switches": {},
    "its own switches set well": {
        "disable_gradient_checkpointing": True,
        "train_sampling_strategy": "group_by_length",
    },
}
PEER_FLAGS: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
GIVEN = dict(os.environ)  # the peer's; ours also has what `run` sets


def install_peer(venv: Path) -> Path:
    """The peer's Python; makes its virtual environment if there is none (minutes)."""
    python = venv / "bin/python"
    ready = (
        "import importlib.util as u; assert all(map(u.find_spec, ('llamafactory', 'torchaudio')))"
    )
    if python.exists() and subprocess.run([python, "-c", ready], check=False).returncode == 0:
        return python
    print(f"installing LLaMA-Factory into {venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
        print(TORCH, file=constraint, flush=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", "-c", constraint.name, TORCH, *PEER], check=True)
    # The registry's builds of these do not load beside a CPU torch and break `import transformers`.
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio"], check=True)
    # The peer imports torchaudio, which it never uses for text: an empty one stands in.
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    stub = Path(packages, "torchaudio", "__init__.py")
    stub.parent.mkdir(exist_ok=True)
    stub.touch()
    return python


def write_dataset(reviews: Path | None, wanted: int, folder: Path) -> None:
    """The rows as LLaMA-Factory reads them: alpaca records and dataset_info.json."""
    dice = random.Random(1)
    if reviews is not None:
        with reviews.open(newline="") as file:
            rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
        rows = dice.sample(rows, min(wanted, len(rows)))
    else:
        words = ["the", "food", "was", "good", "bad", "service", "place", "we", "came", "never"]
        counts = [min(900, max(5, int(dice.lognormvariate(4.4, 0.8)))) for _ in range(wanted)]
        rows = [(" ".join(dice.choices(words, k=n)), str(dice.randrange(5))) for n in counts]
    records = [{"instruction": INSTRUCTION, "input": text, "output": label} for text, label in rows]
    (folder / "reviews.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text('{"reviews": {"file_name": "reviews.json"}}')


def peak_mb() -> float:
    """The most memory that this process held: of the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
