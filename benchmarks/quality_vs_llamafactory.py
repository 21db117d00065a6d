"""Is the fast training as good? Ours and LLaMA-Factory's on the same rows, over several seeds.

    python benchmarks/quality_vs_llamafactory.py --run runs/demo [--seeds 1 2 3] [--steps 94]

Takes a prepared run directory. For every seed both train LoRA with the run's own hyper-parameters
on its training rows: ours through `run train`, the peer (template empty, its own switches set well)
from the alpaca files that `prepare` wrote. Both adapters then rate the same test rows in the words
that they were trained on, by the largest of the five labels' logits. Prints the loss of the label
on the test rows (training losses cannot be compared: ours counts the end of the answer as well),
accuracy and macro F1 of each, and their means.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from train_vs_llamafactory import PEER_FLAGS, SWITCHES, install_peer, stub_torchaudio


def main() -> None:
    if sys.argv[1:2] == ["--peer-worker"]:
        stub_torchaudio()
        from llamafactory.train.tuner import run_exp

        run_exp(json.loads(sys.argv[2]))
        return
    args = parse()
    args.run = args.run.resolve()
    python = install_peer(args.peer_venv)
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name, train in (("ours", train_ours), ("LLaMA-Factory", train_peer)):
            with tempfile.TemporaryDirectory() as work:
                found = train(args, python, seed, Path(work))
            results.append({"seed": seed, "who": name, **found})
            print(line(name, f"seed {seed}", results[-1]), flush=True)
    for name in ("ours", "LLaMA-Factory"):
        mine = [result for result in results if result["who"] == name]
        keys = ("label_loss", "accuracy", "f1_macro")
        print(line(name, "mean", {k: statistics.mean(r[k] for r in mine) for k in keys}))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def line(name: str, which: str, found: dict[str, Any]) -> str:
    return (
        f"{which:8} {name:14} label loss {found['label_loss']:.4f}  "
        f"accuracy {found['accuracy']:.3f}  macro F1 {found['f1_macro']:.3f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a prepared run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="default: one epoch")
    parser.add_argument("--threads", type=int, default=2)
    default = Path.home() / ".cache/yelp_hpc/llamafactory"
    parser.add_argument("--peer-venv", type=Path, default=default)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def train_ours(args: argparse.Namespace, _: Path, seed: int, work: Path) -> dict[str, Any]:
    """`run train` in a copy of the run with another seed."""
    from yelp_hpc.config import Config
    from yelp_hpc.files import read_json, read_jsonl, write_json
    from yelp_hpc.manifest import load_run
    from yelp_hpc.paths import RunPaths

    _, config = load_run(args.run)
    values = config.model_dump(mode="json")
    values["seed"] = seed
    values["train"]["max_steps"] = steps_of(args, config)
    values["train"]["evaluate_every"] = values["train"]["max_steps"]
    Config.model_validate(values)
    run = RunPaths(work / "run")
    shutil.copytree(args.run / "prepare", run.prepare)
    record = read_json(args.run / "run.json")
    write_json(run.run_json, {**record, "config": {**record["config"], "resolved": values}})
    command = [sys.executable, "-m", "yelp_hpc", "run", "train", "--run", str(run.root)]
    call(command, args, work)
    losses = [line["loss"] for line in read_jsonl(run.train_log)]
    return {"losses": losses, **evaluate(args, run.adapter, empty_template=False)}


def train_peer(args: argparse.Namespace, python: Path, seed: int, work: Path) -> dict[str, Any]:
    """LLaMA-Factory on the alpaca files, same LoRA and schedule."""
    from yelp_hpc.manifest import load_run
    from yelp_hpc.models.local import model_folder

    _, config = load_run(args.run)
    flags = {
        **PEER_FLAGS,
        "model_name_or_path": str(model_folder(config.model)),
        "lora_rank": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "lora_target": ",".join(config.lora.target or ("q_proj", "k_proj", "v_proj")),
        "template": "empty",
        "cutoff_len": config.data.cutoff,
        "dataset_dir": str(args.run / "prepare"),
        "dataset": "yelp_train",
        "learning_rate": config.train.learning_rate,
        "lr_scheduler_type": config.train.schedule,
        "warmup_steps": config.train.warmup_steps,
        "gradient_accumulation_steps": config.train.global_batch // 4,
        "max_steps": steps_of(args, config),
        "seed": seed,
        "output_dir": str(work / "peer"),
        **SWITCHES["its own switches set well"],
    }
    call([str(python), __file__, "--peer-worker", json.dumps(flags)], args, work)
    state = json.loads((work / "peer" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return {"losses": losses, **evaluate(args, work / "peer", empty_template=True)}


def steps_of(args: argparse.Namespace, config: Any) -> int:
    import pyarrow.parquet as pq

    rows = pq.read_metadata(args.run / "prepare" / "train.parquet").num_rows
    return int(args.steps or rows // config.train.global_batch)


def call(command: list[str], args: argparse.Namespace, work: Path) -> None:
    """Run to the end; its output is shown only when it fails."""
    threads = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **threads}
    if "--peer-worker" in command:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, env=environment, cwd=work, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def evaluate(args: argparse.Namespace, adapter: Path, *, empty_template: bool) -> dict[str, float]:
    """The label's mean loss, accuracy and macro F1 of an adapter on the run's test rows."""
    import pyarrow.parquet as pq
    import torch
    from sklearn.metrics import accuracy_score, f1_score

    from yelp_hpc.files import read_json
    from yelp_hpc.manifest import load_run
    from yelp_hpc.models.load import load_model, load_tokenizer
    from yelp_hpc.models.local import model_folder
    from yelp_hpc.models.packed import forward_selected, pack, prepare_model
    from yelp_hpc.packing import plan_microbatches
    from yelp_hpc.predictor import with_adapter

    run, config = load_run(args.run)
    torch.set_num_threads(args.threads)
    folder = model_folder(config.model)
    model = prepare_model(with_adapter(load_model(folder, "fp32"), adapter, merge=True).eval())
    labels = pq.read_table(run.split("test"), columns=["label"])["label"].to_pylist()
    if empty_template:
        tokenizer = load_tokenizer(folder)
        records = json.loads((run.prepare / "alpaca_test.json").read_text())
        prompts = [tokenizer(f"{r['instruction']}\n{r['input']}")["input_ids"] for r in records]
        choices = [tokenizer(str(label))["input_ids"][0] for label in range(5)]
    else:
        prompts = pq.read_table(run.split("test"), columns=["input_ids"])["input_ids"].to_pylist()
        choices = read_json(run.tokens)["label_ids"]
    found, loss = [0] * len(prompts), 0.0
    with torch.inference_mode():
        for group in plan_microbatches([len(p) for p in prompts], 1536, 0):
            logits = forward_selected(model, pack([prompts[i] for i in group], 0))
            truth = torch.tensor([choices[labels[i]] for i in group])
            loss += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
            answers = logits[:, choices].argmax(1).tolist()
            for i, answer in zip(group, answers, strict=True):
                found[i] = answer
    return {
        "label_loss": loss / len(prompts),
        "accuracy": float(accuracy_score(labels, found)),
        "f1_macro": float(f1_score(labels, found, average="macro", labels=list(range(5)))),
    }


if __name__ == "__main__":
    main()
