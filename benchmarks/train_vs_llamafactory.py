"""Training beside LLaMA-Factory: same model, data and hyper-parameters, steps taken in turn.

    python benchmarks/train_vs_llamafactory.py --model FOLDER [--reviews FILE.csv] [--steps 30]
    python benchmarks/train_vs_llamafactory.py --model FOLDER --full-size [--steps 12]     (a GPU)

The peer is installed into its own virtual environment (`--peer-venv`) unless it is there already,
and runs in a process of its own that waits between steps, so that a change in the machine's load
meets both. Flags: LoRA rank 8, alpha 16, dropout 0.08 on q/k/v, learning rate 5e-5 cosine after 20
steps of warm-up, batch 4 x accumulation 8, cutoff 1024, template default, fp32. It is measured
twice: with its default switches, and with gradient checkpointing off and rows grouped by length.
Our micro-batches hold 1,024 tokens beside the first, 2,048 beside the second, whose memory is
larger. On a GPU both compute in bf16, the second time the peer takes 16 rows at once, ours the
budget that `train.max_tokens: auto` has there (8,192), and `--full-size` puts random weights of
Llama-2-7B's sizes behind FOLDER's tokenizer. Every step of ours takes the rows, and the very
tokens, that the peer took in its step. 128 reviews a step are read (where there are as many): the
peer's first group of lengths is then as many steps as are taken, and these meet all lengths, the
longest first. `--reviews` is a CSV with columns `label` and `text`; without it made-up text of
reviews' lengths stands in. Prints ratios of summed step times, peak memory and both loss curves.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_setup import GIVEN, PEER_FLAGS, SWITCHES, install_peer, peak_mb, write_dataset

ON_GPU: dict[str, dict[str, Any]] = {
    "default switches": {},
    "its own switches set well": {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
    },
}
# Tokens of our micro-batches: on a CPU as many as stay below the peer's memory.
BUDGETS = {"default switches": 1024, "its own switches set well": 2048}
GPU_BUDGET = 8192
LLAMA_2_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
RATE, WARM_UP, BATCH = 5e-5, 20, 32


def main() -> None:
    if sys.argv[1:2] == ["--peer-worker"]:
        return peer_worker(json.loads(sys.argv[2]))
    from yelp_hpc.runtime import set_runtime_defaults

    args = parse()
    set_runtime_defaults()
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # as the ranks of a training have it
    python = install_peer(args.peer_venv)
    with tempfile.TemporaryDirectory() as work:
        # transformers sorts groups of a fourth of the rows (of 50 steps' at most) by length.
        write_dataset(args.reviews, 4 * BATCH * (args.steps + 1), Path(work))
        if args.full_size:
            args.model = full_size(args.model, Path(work, "model"))
        results = {}
        for name in args.switches:
            print(f"\nLLaMA-Factory 0.9.5, {name}", flush=True)
            with tempfile.TemporaryDirectory(dir=work) as output:
                flags = {**SWITCHES[name], "output_dir": output}
                if args.cuda:
                    flags |= {"use_cpu": False, "bf16": True, **ON_GPU[name]}
                budget = args.max_tokens or (GPU_BUDGET if args.cuda else BUDGETS[name])
                results[name] = compare(args, python, Path(work), flags, budget)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def parse() -> argparse.Namespace:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--model", required=True, help="folder of a Llama-like model")
    parser.add_argument("--reviews", type=Path, help="CSV with columns label and text")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, help="our micro-batch's budget")
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, default=list(SWITCHES))
    default = Path.home() / ".cache/yelp_hpc/llamafactory"
    parser.add_argument("--peer-venv", type=Path, default=default)
    parser.add_argument("--full-size", action="store_true", help="random weights, Llama-2-7B's")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.cuda = importlib.util.find_spec("torch") is not None and cuda()
    return args


def cuda() -> bool:
    """Whether there is a GPU; asked in a child, whose torch is gone with it."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def full_size(model: str, folder: Path) -> str:
    """A folder of random weights in bf16 with the tokenizer of `model`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    for file in Path(model).glob("*token*"):
        shutil.copy(file, folder)
    vocabulary = len(AutoTokenizer.from_pretrained(model))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B, vocab_size=vocabulary))
    torch.set_default_dtype(torch.float32)
    made.cpu().save_pretrained(folder)
    return str(folder)


def compare(
    args: argparse.Namespace, python: Path, folder: Path, switches: dict[str, Any], budget: int
) -> dict[str, Any]:
    """Take `args.steps` steps of each in turn, after one of each that is not counted."""
    tokens = folder / "tokens.json"
    with peer(args, python, folder, tokens, switches) as (process, read):
        read()  # the model is loaded and the tokens are written
        ours = Ours(args, json.loads(tokens.read_text()), budget)
        times: dict[str, list[float]] = {"peer": [], "ours": []}
        busy: dict[str, list[float]] = {"peer": [], "ours": []}
        losses: dict[str, list[float]] = {"peer": [], "ours": []}
        tokens_taken: list[int] = []
        memory = 0.0
        for step in range(args.steps + 1):
            process.stdin.write("go\n")
            process.stdin.flush()
            answer = read()
            began, cpu = time.perf_counter(), time.process_time()
            loss = ours.step(answer["rows"])
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            memory = answer["peak_mb"]
            losses["peer"].append(answer["loss"])
            losses["ours"].append(loss)
            size = sum(len(ours.rows.sequence(row)) for row in answer["rows"])
            if step:
                tokens_taken.append(size)
                times["peer"].append(answer["seconds"])
                times["ours"].append(seconds)
                busy["peer"].append(answer["cpu_seconds"])
                busy["ours"].append(cpu)
            theirs = f"{answer['seconds']:.2f} s (CPU {answer['cpu_seconds']:.1f})"
            print(
                f"  step {step:3d}  {size:5d} tokens  peer {theirs}, loss {answer['loss']:.4f}   "
                f"ours {seconds:.2f} s (CPU {cpu:.1f}), loss {loss:.4f}",
                flush=True,
            )
    mine = peak_mb()
    ratio = sum(times["peer"]) / sum(times["ours"])
    speed = {who: BATCH * len(seconds) / sum(seconds) for who, seconds in times.items()}
    busy_ratio = sum(busy["peer"]) / sum(busy["ours"])
    print(
        f"  {ratio:.2f} times faster: {speed['ours']:.2f} against {speed['peer']:.2f} examples/s; "
        f"{busy_ratio:.2f} times less CPU time; "
        f"peak memory {mine:.0f} against {memory:.0f} MB"
    )
    return {
        **{"ratio": ratio, "max_tokens": budget, "cpu_time_ratio": busy_ratio},
        "examples_per_s": speed,
        "peak_mb": {"ours": mine, "peer": memory},
        "tokens": tokens_taken,
        "seconds": times,
        "cpu_seconds": busy,
        "losses": losses,
    }


@contextmanager
def peer(
    args: argparse.Namespace, python: Path, folder: Path, tokens: Path, switches: dict[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """The peer's process and a function that reads its next message."""
    flags = {
        **PEER_FLAGS,
        "model_name_or_path": str(args.model),
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.08,
        "lora_target": "q_proj,k_proj,v_proj",
        "template": "default",
        "cutoff_len": 1024,
        "dataset": "reviews",
        "dataset_dir": str(folder),
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARM_UP,
        "gradient_accumulation_steps": BATCH // 4,
        "max_steps": args.steps + 1,
        **switches,
    }
    request = json.dumps({"flags": flags, "tokens": str(tokens)})
    environment = {**GIVEN, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    with (folder / "peer.log").open("w") as log:
        process = subprocess.Popen(
            [python, __file__, "--peer-worker", request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )

    def read() -> dict[str, Any]:
        for line in process.stdout or ():
            if line.startswith("@"):
                message: dict[str, Any] = json.loads(line[1:])
                return message
        raise SystemExit("the peer ended:\n" + (folder / "peer.log").read_text()[-3000:])

    try:
        yield process, read
    finally:
        process.kill()
        process.wait()


def peer_worker(request: dict[str, Any]) -> None:
    """Runs under the peer's Python: its own `run_exp`, halted after every optimizer step."""
    import torch
    from llamafactory.train.tuner import run_exp
    from transformers import Trainer, TrainerCallback

    def hand_over(**message: Any) -> None:
        """Say this and halt until our turn; what it did meanwhile would run beside our step."""
        print("@" + json.dumps(message), flush=True)
        if not sys.stdin.readline():
            os._exit(1)  # the other side is gone

    index: dict[tuple[int, ...], int] = {}
    taken: list[int] = []
    training_step = Trainer.training_step

    def recorded(trainer: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            taken.append(index[tuple(ids[mask.bool()].tolist())])
        return training_step(trainer, model, inputs, *rest, **named)

    Trainer.training_step = recorded  # type: ignore[method-assign,assignment]

    class InTurn(TrainerCallback):
        seconds = cpu_seconds = began = cpu = 0.0

        def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
            rows = [
                {"input_ids": row["input_ids"], "labels": row["labels"]}
                for row in train_dataloader.dataset
            ]
            index.update({tuple(row["input_ids"]): i for i, row in enumerate(rows)})
            Path(request["tokens"]).write_text(json.dumps(rows))
            hand_over(ready=True)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.began
            self.cpu_seconds = time.process_time() - self.cpu

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                hand_over(
                    seconds=self.seconds,
                    cpu_seconds=self.cpu_seconds,
                    loss=float(logs["loss"]),
                    peak_mb=peak_mb(),
                    rows=taken,
                )
                taken.clear()

    run_exp(request["flags"], callbacks=[InTurn()])


def as_rows(rows: list[dict[str, list[int]]]) -> Any:
    """The peer's tokens as the engine reads rows.

    The template supervises the same few tokens at the end of every row: the stars, the end of text
    and a line feed, which is only ever a target.
    """
    import numpy as np

    from yelp_hpc.training.data import Rows

    last = sum(label != -100 for label in rows[0]["labels"])
    if any(row["labels"][-last - 1] != -100 or -100 in row["labels"][-last:] for row in rows):
        raise SystemExit(f"expected {last} supervised tokens at the end of every row")
    answers = [tuple(row["labels"][-last:]) for row in rows]
    known = sorted(set(answers))
    prompts = [row["input_ids"][:-last] for row in rows]
    alike = [len(set(column)) == 1 for column in zip(*prompts, strict=False)]
    prefix = min([*alike, False].index(False), min(map(len, prompts)) - 1)
    return Rows(
        np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
        np.cumsum([0, *map(len, prompts)]),
        [known.index(answer) for answer in answers],
        [list(answer[:-1]) for answer in known],
        known[0][-1],
        prefix,
    )


class Ours:
    """The engine on the peer's tokens: a step of the training stage without its files."""

    def __init__(
        self, args: argparse.Namespace, rows: list[dict[str, list[int]]], max_tokens: int
    ) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from yelp_hpc.data.packing import default_pieces, more_pieces
        from yelp_hpc.models.packed.batch import prepare_model
        from yelp_hpc.models.packed.dropout import use_sequence_dropout
        from yelp_hpc.ranks.rank import StopRequest
        from yelp_hpc.ranks.world import World
        from yelp_hpc.training.budget import Budget
        from yelp_hpc.training.gradients import Gradients
        from yelp_hpc.training.throughput import Meter

        torch.set_num_threads(args.threads)
        torch.manual_seed(42)
        self.rows = as_rows(rows)
        device, precision = torch.device("cpu"), "fp32"
        if args.cuda:
            device, precision = torch.device("cuda"), "bf16"
            torch.cuda.reset_peak_memory_stats()
            torch.use_deterministic_algorithms(True)  # as a rank does
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        dtype = torch.bfloat16 if args.cuda else torch.float32
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        lora = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.08, target_modules=["q_proj", "k_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = get_peft_model(base, lora).to(device)
        dropout = use_sequence_dropout(adapted, seed=42)
        model = prepare_model(adapted).train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)
        total = args.steps + 1

        def factor(step: int) -> float:
            if step < WARM_UP:
                return step / WARM_UP
            return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, total - WARM_UP)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        mean = sum(map(self.rows.own_length, range(len(rows)))) / len(rows)
        pieces = default_pieces(BATCH * mean, self.rows.prefix_length, BATCH)
        self.budget = Budget(0, max_tokens, pieces, False, args.threads, more=more_pieces(False))
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.gradients = Gradients(
            precision, 42, World(0, 1, device), model, dropout, scaler, self.rows, StopRequest(),
            Meter(model, device, precision), trained,
        )  # fmt: skip

    def step(self, rows: list[int]) -> float:
        """One optimizer step over these rows; returns the mean loss of their supervised tokens."""
        from torch.nn.utils import clip_grad_norm_

        summed = self.gradients.of(self.schedule.last_epoch, tuple(rows), self.budget)
        clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return summed.loss


if __name__ == "__main__":
    main()
