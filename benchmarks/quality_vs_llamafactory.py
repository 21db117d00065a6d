"""Is the fast training as good? Ours and LLaMA-Factory's on the same rows, over several seeds.

    python benchmarks/quality_vs_llamafactory.py --run runs/demo [--seeds 1 2 3] [--steps 94]

Takes a prepared run directory. For every seed both train LoRA with the run's own hyper-parameters
on its training rows: ours through `run train`, the peer (its own switches set well) on the tokens
that `prepare` wrote, with the same two supervised at the end of each row. Only the order of the
rows and the draws of dropout and of the adapter's start differ. Both adapters then rate the same
test rows by the largest of the five labels' logits. Prints the training loss over the last tenth of
the steps, the loss of the label on the test rows, accuracy and macro F1 of each, and their means.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_setup import PEER_FLAGS, SWITCHES, install_peer

FIGURES = ("training_loss", "label_loss", "accuracy", "f1_macro")


def main() -> None:
    if sys.argv[1:2] == ["--peer-worker"]:
        return peer_worker(json.loads(sys.argv[2]))
    args = parse()
    args.run = args.run.resolve()
    python = install_peer(args.peer_venv)
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name, train in (("ours", train_ours), ("LLaMA-Factory", train_peer)):
            with tempfile.TemporaryDirectory() as work:
                figures = train(args, python, seed, Path(work))
            results.append({"seed": seed, "who": name, **figures})
            print(line(name, f"seed {seed}", results[-1]), flush=True)
    for name in ("ours", "LLaMA-Factory"):
        mine = [result for result in results if result["who"] == name]
        print(line(name, "mean", {k: statistics.mean(r[k] for r in mine) for k in FIGURES}))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def line(name: str, which: str, figures: dict[str, Any]) -> str:
    return (
        f"{which:8} {name:14} training loss {figures['training_loss']:.4f}  "
        f"label loss {figures['label_loss']:.4f}  "
        f"accuracy {figures['accuracy']:.3f}  macro F1 {figures['f1_macro']:.3f}"
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
    # not at the top: the peer's Python, which runs this file too, has no yelp_hpc
    from train_saves import copy_run

    from yelp_hpc.rundir.files import read_jsonl
    from yelp_hpc.rundir.manifest import load_run

    steps = steps_of(args, load_run(args.run)[1])
    train = {"max_steps": steps, "evaluate_every": steps}
    run = copy_run(args.run, work / "run", train, seed)
    command = [sys.executable, "-m", "yelp_hpc", "run", "train", "--run", str(run.root)]
    call(command, args, work)
    return found(args, run.adapter, [line["loss"] for line in read_jsonl(run.train_log)])


def train_peer(args: argparse.Namespace, python: Path, seed: int, work: Path) -> dict[str, Any]:
    """LLaMA-Factory on the same tokens, same LoRA and schedule."""
    from yelp_hpc.models.local import model_folder
    from yelp_hpc.rundir.manifest import load_run

    _, config = load_run(args.run)
    flags = {
        **PEER_FLAGS,
        "model_name_or_path": str(model_folder(config.model)),
        "lora_rank": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "lora_target": ",".join(config.lora.target or ("q_proj", "k_proj", "v_proj")),
        "template": "empty",
        "dataset": "written as tokens",
        "tokenized_path": str(work / "tokens"),
        "learning_rate": config.train.learning_rate,
        "lr_scheduler_type": config.train.schedule,
        "warmup_steps": config.train.warmup_steps,
        "gradient_accumulation_steps": config.train.global_batch // 4,
        "max_steps": steps_of(args, config),
        "seed": seed,
        "output_dir": str(work / "peer"),
        **SWITCHES["its own switches set well"],
    }
    request = json.dumps({"prepare": str(args.run / "prepare"), "flags": flags})
    call([str(python), __file__, "--peer-worker", request], args, work)
    state = json.loads((work / "peer" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return found(args, work / "peer", losses)


def peer_worker(request: dict[str, Any]) -> None:
    """Runs under the peer's Python: writes the rows as it keeps tokens, then its own `run_exp`."""
    import pyarrow.parquet as pq
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    prepare, flags = Path(request["prepare"]), request["flags"]
    tokens = json.loads((prepare / "tokens.json").read_text())
    rows = []
    for row in pq.read_table(prepare / "train.parquet", columns=["label", "input_ids"]).to_pylist():
        answer = [tokens["label_ids"][row["label"]], tokens["eos_id"]]
        ids = row["input_ids"] + answer
        labels = [-100] * len(row["input_ids"]) + answer
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(flags["tokenized_path"])
    run_exp(flags)


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


def found(args: argparse.Namespace, adapter: Path, losses: list[float]) -> dict[str, Any]:
    """The losses of the training, and what its adapter reaches on the run's test rows."""
    import pyarrow.parquet as pq
    import torch
    from sklearn.metrics import accuracy_score, f1_score

    from yelp_hpc.data.packing import plan_microbatches
    from yelp_hpc.inference.predictor import with_adapter
    from yelp_hpc.models.load import load_model
    from yelp_hpc.models.local import model_folder
    from yelp_hpc.models.packed.batch import forward_selected, pack, prepare_model
    from yelp_hpc.rundir.files import read_json
    from yelp_hpc.rundir.manifest import load_run

    run, config = load_run(args.run)
    torch.set_num_threads(args.threads)
    folder = model_folder(config.model)
    model = prepare_model(with_adapter(load_model(folder, "fp32"), adapter, merge=True).eval())
    labels = pq.read_table(run.split("test"), columns=["label"])["label"].to_pylist()
    prompts = pq.read_table(run.split("test"), columns=["input_ids"])["input_ids"].to_pylist()
    choices = read_json(run.tokens)["label_ids"]
    answers, loss = [0] * len(prompts), 0.0
    with torch.inference_mode():
        for group in plan_microbatches([len(p) for p in prompts], 1536, 0):
            logits = forward_selected(model, pack([prompts[i] for i in group], 0))
            truth = torch.tensor([choices[labels[i]] for i in group])
            loss += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
            for i, answer in zip(group, logits[:, choices].argmax(1).tolist(), strict=True):
                answers[i] = answer
    return {
        "losses": losses,
        "training_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "label_loss": loss / len(prompts),
        "accuracy": float(accuracy_score(labels, answers)),
        "f1_macro": float(f1_score(labels, answers, average="macro", labels=list(range(5)))),
    }


if __name__ == "__main__":
    main()
