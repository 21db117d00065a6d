"""How much of this machine's matrix-product rate training and scoring reach.

    python benchmarks/train_efficiency.py --model FOLDER [--reviews FILE.csv] [--steps 10]

Measures, in turn: torch's own fp32 product of large matrices, oneDNN's of this model's shapes,
optimizer steps of LoRA (rank 8 on q/k/v, dropout 0.08, global batch 32, cutoff 1024) and scoring of
the same sequences. Two counts of the work, each as a share of both products' rates:

*   Model FLOP utilisation: 4 × the layers' weights for every token of every sequence (2 × for
    scoring), however it was computed (Chowdhery et al. 2022, arXiv:2204.02311, appendix B);
    `log.jsonl` counts the shared prefix once a micro-batch instead. Attention and vocabulary are
    left out. A token whose work is spared counts, so this compares programs that do the same task
    in different ways.
*   Arithmetic done: the frozen weights' forward and, for training, their backward to the
    activations, the vocabulary product and attention, for the tokens computed. Neither tokens that
    the shared prefix spares, nor positions that the last layer skips, nor anything computed twice,
    nor LoRA's own products count. This says how busy the machine was.

`--reviews` is a CSV with columns `label` and `text`; without it random tokens of reviews' lengths
stand in. Prints a table; writes JSON with `--json FILE`.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

from yelp_hpc.runtime import set_runtime_defaults

set_runtime_defaults()  # as `run` does, before torch is imported

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from yelp_hpc.data.packing import plan_microbatches
from yelp_hpc.models.packed.batch import (
    PackedBatch,
    forward_selected,
    pack,
    prepare_model,
)
from yelp_hpc.models.packed.dropout import DropoutContext, use_sequence_dropout
from yelp_hpc.models.packed.linear import matmul, pack_weight
from yelp_hpc.training.throughput import flops_per_token

INSTRUCTION = (
    "Instruction: The following is a user's review of a merchant. Please judge and output the "
    "corresponding five-star rating for this review.\nReview: "
)
BATCH = 32
clock = time.perf_counter


def main() -> None:
    global clock
    args = parse()
    if args.cpu_time:
        clock = time.process_time
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    sequences, prefix = load_sequences(args)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    per_token = flops_per_token(model)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.08,
        target_modules=["q_proj", "k_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    dropout = use_sequence_dropout(model, seed=1)
    model = prepare_model(model, fused=not args.generic)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.0
    )
    order = random.Random(1).sample(range(len(sequences)), min(len(sequences), BATCH * args.steps))
    steps = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]

    rates: dict[str, list[float]] = {"torch.mm": [], "oneDNN": [], "training": [], "scoring": []}
    work: dict[str, list[float]] = {"training": [], "scoring": []}
    train_step(model, optimizer, dropout, sequences, steps[0], prefix, args.max_tokens)  # warm up
    tokens = 0
    for rows in steps:
        rates["torch.mm"].append(mm_rate())
        rates["oneDNN"].append(onednn_rate(model.config))
        began = clock()
        batches = train_step(model, optimizer, dropout, sequences, rows, prefix, args.max_tokens)
        rates["training"].append(clock() - began)
        work["training"].append(sum(count(model.config, batch, train=True) for batch in batches))
        tokens += sum(len(sequences[i]) for i in rows)
        began = clock()
        batches = score(model, sequences, rows, prefix, args.max_tokens)
        rates["scoring"].append(clock() - began)
        work["scoring"].append(sum(count(model.config, batch, train=False) for batch in batches))
    report(args, rates, work, tokens, len(order), per_token)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Llama-like model")
    parser.add_argument("--reviews", type=Path, help="CSV with columns label and text")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=1024, help="budget of a micro-batch")
    parser.add_argument("--generic", action="store_true", help="without the fused layers")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds: for a machine that others load; with --threads 1",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def load_sequences(args: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Training sequences (prompt and answer) of at most 1024 tokens; the length they share."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.reviews is None:
        dice = random.Random(1)
        head = tokenizer(INSTRUCTION)["input_ids"]
        lengths = [min(1000, max(8, int(dice.lognormvariate(4.7, 0.8)))) for _ in range(2000)]
        body = [[dice.randrange(100, tokenizer.vocab_size) for _ in range(n)] for n in lengths]
        sequences = [(head + tokens)[:1024] for tokens in body]
    else:
        with args.reviews.open(newline="") as file:
            rows = list(csv.DictReader(file))
        sequences = []
        for row in rows:
            head = tokenizer(f"{INSTRUCTION}{row['text']}")["input_ids"]
            tail = tokenizer(f"\nOutput: {row['label']}")["input_ids"]
            sequences.append(head[: 1024 - len(tail)] + tail)
    prefix = 0
    while all(len(s) > prefix + 2 and s[prefix] == sequences[0][prefix] for s in sequences):
        prefix += 1
    return sequences, prefix


def microbatches(
    sequences: list[list[int]], rows: list[int], prefix: int, max_tokens: int, last: int
) -> list[tuple[list[int], PackedBatch]]:
    """Rows of each micro-batch, and it."""
    lengths = [len(sequences[i]) - prefix for i in rows]
    groups = [[rows[i] for i in group] for group in plan_microbatches(lengths, max_tokens, prefix)]
    return [(group, pack([sequences[i] for i in group], prefix, last)) for group in groups]


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    dropout: DropoutContext,
    sequences: list[list[int]],
    rows: list[int],
    prefix: int,
    max_tokens: int,
) -> list[PackedBatch]:
    model.train()
    batches = microbatches(sequences, rows, prefix, max_tokens, last=2)
    for group, batch in batches:
        with dropout.batch(0, group, batch):
            logits = forward_selected(model, batch)
            targets = torch.randint(logits.shape[1], (logits.shape[0],))
            (F.cross_entropy(logits, targets, reduction="sum") / (2 * len(rows))).backward()
    optimizer.step()
    optimizer.zero_grad()
    return [batch for _, batch in batches]


def score(
    model: Any, sequences: list[list[int]], rows: list[int], prefix: int, max_tokens: int
) -> list[PackedBatch]:
    model.eval()
    batches = [batch for _, batch in microbatches(sequences, rows, prefix, max_tokens, last=1)]
    with torch.inference_mode():
        for batch in batches:
            forward_selected(model, batch, torch.arange(5))
    return batches


def count(config: Any, batch: PackedBatch, *, train: bool) -> float:
    """Useful floating-point operations of one micro-batch."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, head_dim = config.num_attention_heads, config.head_dim
    qkv = hidden * (heads + 2 * config.num_key_value_heads) * head_dim
    rest = heads * head_dim * hidden + 3 * hidden * inner
    layers, total, kept = config.num_hidden_layers, len(batch.input_ids), len(batch.select)
    forward = layers * total * qkv + ((layers - 1) * total + kept) * rest
    prefix = batch.prefix_length
    pairs = prefix * (prefix + 1) / 2
    pairs += sum(prefix * n + n * (n + 1) / 2 for n in batch.lengths)
    attention = 4 * layers * heads * head_dim * pairs
    vocabulary = 2 * kept * hidden * (config.vocab_size if train else 5)
    if not train:
        return float(2 * forward + attention + vocabulary)
    # Nothing before the first layer's q/k/v is trained, so no gradient goes through them.
    backward = forward - total * qkv
    return float(2 * (forward + backward) + 3 * attention + 2 * vocabulary)


def rate(call: Any, operations: float, seconds: float = 0.3) -> float:
    """Operations per second: the median of repeated calls."""
    call()
    times = []
    end = clock() + seconds
    while clock() < end:
        began = clock()
        call()
        times.append(clock() - began)
    return operations / sorted(times)[len(times) // 2]


def mm_rate(size: int = 2048) -> float:
    a, b, out = (torch.randn(size, size) for _ in range(3))
    return rate(lambda: torch.mm(a, b, out=out), 2 * size**3)


def onednn_rate(config: Any, tokens: int = 1536) -> float:
    """The faster of a large square product and the model's widest projection."""
    hidden, wide = config.hidden_size, 2 * config.intermediate_size
    best = 0.0
    for shape in ((tokens, hidden, wide), (2048, 2048, 2048)):
        x, weight = torch.randn(shape[0], shape[1]), pack_weight(torch.randn(shape[2], shape[1]))
        best = max(
            best,
            rate(lambda x=x, weight=weight: matmul(x, weight), 2 * shape[0] * shape[1] * shape[2]),
        )
    return best


def report(
    args: argparse.Namespace,
    rates: dict[str, list[float]],
    work: dict[str, list[float]],
    tokens: int,
    examples: int,
    per_token: int,
) -> None:
    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    mm, onednn = median(rates["torch.mm"]), median(rates["oneDNN"])
    result: dict[str, Any] = {
        "threads": args.threads,
        "examples": examples,
        "tokens": tokens,
        "training_flops_per_token": per_token,
        "torch_mm_gflops": mm / 1e9,
        "onednn_gflops": onednn / 1e9,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(
        f"matrix product, fp32, {args.threads} threads: "
        f"torch.mm {mm / 1e9:.0f} GFLOP/s, oneDNN {onednn / 1e9:.0f}"
    )
    for name, flops in (("training", per_token), ("scoring", per_token // 2)):
        seconds = sum(rates[name])
        counted = {"model_flops": tokens * flops / seconds, "done": sum(work[name]) / seconds}
        result[name] = {
            "examples_per_s": examples / seconds,
            "tokens_per_s": tokens / seconds,
            "s_per_step": seconds / len(work[name]),
        }
        print(
            f"{name}: {examples / seconds:.2f} examples/s, {tokens / seconds:.0f} tokens/s, "
            f"{seconds / len(work[name]):.2f} s a step of {BATCH}"
        )
        for which, label in (("model_flops", "model FLOPs"), ("done", "arithmetic done")):
            achieved = counted[which]
            result[name][which] = {
                "gflops": achieved / 1e9,
                "of_torch_mm": achieved / mm,
                "of_onednn": achieved / onednn,
            }
            print(
                f"    {label:15} {achieved / 1e9:4.0f} GFLOP/s = {achieved / mm:.0%} of torch.mm, "
                f"{achieved / onednn:.0%} of oneDNN"
            )
    print(f"peak memory {result['peak_rss_mb']:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
