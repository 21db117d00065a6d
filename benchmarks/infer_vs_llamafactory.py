"""Inference against LLaMA-Factory's `do_predict` and a plain transformers pipeline, in turn.

    python benchmarks/infer_vs_llamafactory.py --run runs/demo

The same model, adapter, prompts and threads for all, fp32, greedy decoding. The rows are cut into
rounds; in every round each contender predicts the round's rows once, so that a busy machine slows
all alike; the figures are ratios of the sums. Loading is timed for nobody. Ours and the pipeline
have predicted a batch before the clock starts; the peer, a process of its own in each round, is
timed by its own `predict_runtime`, in which only the first batch of the round is a cold one.

Reads a run directory with `prepare/` and `train/adapter` (other reviews with `--reviews`); the
peer is installed into its own virtual environment (`--peer-venv`) unless it is there already.
Writes besides only the file named by `--json` and a temporary folder.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yelp_hpc.runtime import set_runtime_defaults

set_runtime_defaults()  # as `run` does, before torch is imported

import pyarrow.parquet as pq
import torch
from peer_setup import install_peer
from sklearn.metrics import f1_score

from yelp_hpc.config import Config
from yelp_hpc.data.answer_tree import scored_answers
from yelp_hpc.data.sources import read_file
from yelp_hpc.inference.answers import is_decided, parse_label
from yelp_hpc.inference.generation import GreedyDecoder
from yelp_hpc.inference.predictor import (
    Predictor,
    generate_predictor,
    score_predictor,
    with_adapter,
)
from yelp_hpc.models.load import load_model, load_tokenizer
from yelp_hpc.models.local import model_folder
from yelp_hpc.models.packed.batch import prepare_model
from yelp_hpc.rundir.files import read_json
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages.prepare import bind_prompt

CPU = torch.device("cpu")
BATCH = 8  # of the peer and of the pipeline

Prompts = list[list[int]]
Predict = Callable[[Prompts], tuple[list[int | None], float]]
"""Prompts → predictions and the seconds that they took."""


@dataclass
class Contender:
    """What one way of predicting did so far."""

    name: str
    predict: Predict
    predictions: list[int | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    options = arguments()
    run, config = load_run(options.run)
    if options.threads:
        torch.set_num_threads(options.threads)
    prompts, labels = reviews(run, config, options.reviews, options.rows)
    with tempfile.TemporaryDirectory(prefix="infer-benchmark-") as scratch:
        contenders, score = contenders_of(run, config, options, Path(scratch))
        size = -(-len(prompts) // options.rounds)
        rate = 0.0
        for contender in contenders:
            if contender.name != "LLaMA-Factory":
                contender.predict(prompts[:BATCH])  # warm
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            rate = max(rate, matrix_product_rate())
            for contender in contenders:
                found, seconds = contender.predict(chunk)
                contender.predictions += found
                contender.seconds.append(seconds)
                print(f"  {contender.name}: {len(chunk)} reviews in {seconds:.1f} s", flush=True)
    flops = 2 * layer_weights(run, config) * (sum(map(len, prompts)))
    result = summary(contenders, labels, flops, rate)
    if options.likelihood:
        prompts, _ = reviews(run, config, options.reviews, options.likelihood)
        result["likelihood"] = agreement_with_likelihoods(run, config, score, prompts)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a trained run")
    parser.add_argument("--reviews", type=Path, help="csv (text, label) instead of its test set")
    parser.add_argument("--rows", type=int, default=192, help="reviews, the same for all")
    parser.add_argument("--rounds", type=int, default=3)
    default = Path.home() / ".cache/yelp_hpc/llamafactory"
    parser.add_argument("--peer-venv", type=Path, default=default)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--threads", type=int, help="threads of every contender")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--skip-pipeline", action="store_true")
    parser.add_argument(
        "--likelihood",
        type=int,
        default=0,
        metavar="ROWS",
        help="also compare score mode with whole-answer log-likelihoods",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def reviews(
    run: RunPaths, config: Config, csv: Path | None, rows: int
) -> tuple[Prompts, list[int]]:
    """The prompts' token ids and the labels of the first `rows` reviews."""
    if csv is None:
        table = pq.read_table(run.split("test")).slice(0, rows)
        return table["input_ids"].to_pylist(), table["label"].to_pylist()
    found = read_file(csv, config.data.text_column, config.data.label_column)[:rows]
    prompt = bind_prompt(config, load_tokenizer(model_folder(config.model)))
    return prompt.fit([text for text, _ in found])[0], [label for _, label in found]


def contenders_of(
    run: RunPaths, config: Config, options: argparse.Namespace, scratch: Path
) -> tuple[list[Contender], Predictor]:
    """Everyone who takes part, loaded; and score mode's predictor by itself."""
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    tokens = read_json(run.tokens)
    prefix, budget = tokens["prefix"], config.infer.max_tokens

    def tuned() -> Any:
        return with_adapter(load_model(folder, "fp32"), run.adapter, merge=True).eval()

    def text(answer: list[int]) -> str:
        return str(tokenizer.decode(answer, skip_special_tokens=True))

    fast = prepare_model(tuned())
    score = score_predictor(fast, len(prefix), scored_answers(tokens), budget, CPU)
    decoder = GreedyDecoder(
        fast,
        len(prefix),
        {tokens["eos_id"]},
        options.max_new_tokens,
        decided=lambda answer: is_decided(text(answer)),
    )
    contenders = [
        Contender("score", timed(score)),
        Contender("generate", timed(generate_predictor(decoder, text, budget))),
    ]
    if not options.skip_peer:
        contenders.append(
            Contender("LLaMA-Factory", peer(run, folder, tokenizer, options, scratch))
        )
    if not options.skip_pipeline:
        contenders.append(
            Contender("pipeline", pipeline(tuned(), tokenizer, options.max_new_tokens))
        )
    return contenders, score


def timed(predictor: Predictor) -> Predict:
    def predict(prompts: Prompts) -> tuple[list[int | None], float]:
        start = time.perf_counter()
        found: list[int | None] = [None] * len(prompts)
        for batch in predictor.plan([len(prompt) for prompt in prompts]):
            predicted = predictor.predict([prompts[i] for i in batch])[0]
            for i, label in zip(batch, predicted, strict=True):
                found[i] = label
        return found, time.perf_counter() - start

    return predict


def pipeline(model: Any, tokenizer: Any, max_new_tokens: int) -> Predict:
    """transformers' text-generation pipeline, batches of 8 in the order of the rows."""
    from transformers import pipeline as make

    tokenizer.padding_side = "left"
    generator: Any = make("text-generation", model=model, tokenizer=tokenizer)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_full_text": False}

    def predict(prompts: Prompts) -> tuple[list[int | None], float]:
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        start = time.perf_counter()
        answers = generator(texts, batch_size=BATCH, **settings)
        seconds = time.perf_counter() - start
        return [parse_label(answer[0]["generated_text"]) for answer in answers], seconds

    return predict


def peer(
    run: RunPaths, folder: Path, tokenizer: Any, options: argparse.Namespace, scratch: Path
) -> Predict:
    """LLaMA-Factory's do_predict in its own environment; its `predict_runtime` is the time."""
    settings = {
        "stage": "sft",
        "do_predict": True,
        "predict_with_generate": True,
        "model_name_or_path": str(folder),
        "adapter_name_or_path": str(run.adapter.resolve()),
        "finetuning_type": "lora",
        "template": "empty",  # the prompt is complete
        "dataset_dir": str(scratch),
        "eval_dataset": "reviews",
        "cutoff_len": 4096,
        "per_device_eval_batch_size": BATCH,
        "max_new_tokens": options.max_new_tokens,
        "do_sample": False,
        "infer_dtype": "float32",
        "use_cpu": True,
        "overwrite_output_dir": True,
        "report_to": "none",
    }
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{options.peer_venv}/bin:{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    cli = install_peer(options.peer_venv).with_name("llamafactory-cli")
    rounds = iter(range(10_000))

    def predict(prompts: Prompts) -> tuple[list[int | None], float]:
        records = [
            {"instruction": tokenizer.decode(prompt), "input": "", "output": "0"}
            for prompt in prompts
        ]
        (scratch / "reviews.json").write_text(json.dumps(records))
        (scratch / "dataset_info.json").write_text(
            json.dumps({"reviews": {"file_name": "reviews.json"}})
        )
        out = scratch / f"peer-{next(rounds)}"
        request = scratch / "predict.yaml"  # JSON is YAML; its own reader of .json files is broken
        request.write_text(json.dumps({**settings, "output_dir": str(out)}))
        command = [str(cli), "train", str(request)]
        ended = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if ended.returncode:
            raise SystemExit(f"LLaMA-Factory failed:\n{ended.stdout[-3000:]}")
        seconds = read_json(out / "predict_results.json")["predict_runtime"]
        lines = (out / "generated_predictions.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        for answer, record in zip(answers, records, strict=True):
            if answer["prompt"].strip() != record["instruction"].strip():
                raise SystemExit(f"LLaMA-Factory saw another prompt: {answer['prompt']!r}")
        return [parse_label(answer["predict"]) for answer in answers], float(seconds)

    return predict


def matrix_product_rate(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of this machine's fp32 matrix product now, the best of some."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def layer_weights(run: RunPaths, config: Config) -> int:
    """Weights that every token is multiplied with: all but embeddings and vocabulary projection."""
    model = load_model(model_folder(config.model), "fp32")
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in layers if m is not head)


def summary(
    contenders: Sequence[Contender], labels: list[int], flops: float, rate: float
) -> dict[str, Any]:
    """Speeds, shares of the matrix-product rate, ratios of sums, agreement and F1."""
    by_name = {contender.name: contender for contender in contenders}
    result: dict[str, Any] = {
        "rows": len(labels),
        "gflop_per_review": flops / len(labels) / 1e9,
        "matrix_product_gflops": rate / 1e9,
        "contenders": {},
        "ratios": {},
    }
    score = by_name["score"]
    for name, contender in by_name.items():
        seconds = sum(contender.seconds)
        predicted = [-1 if label is None else label for label in contender.predictions]
        f1 = {
            average: float(
                f1_score(labels, predicted, labels=range(5), average=average, zero_division=0)
            )
            for average in ("micro", "macro")
        }
        same = sum(a == b for a, b in zip(contender.predictions, score.predictions, strict=True))
        result["contenders"][name] = {
            "seconds": contender.seconds,
            "reviews_per_second": len(labels) / seconds,
            "share_of_matrix_product_rate": flops / seconds / rate,
            "f1": f1,
            "unparsed": predicted.count(-1),
            "same_as_score": same / len(labels),
        }
    for rival in ("LLaMA-Factory", "pipeline"):
        if rival in by_name:
            for mode in ("score", "generate"):
                mine, theirs = sum(by_name[mode].seconds), sum(by_name[rival].seconds)
                result["ratios"][f"{mode} / {rival}"] = theirs / mine
    return result


@torch.inference_mode()
def agreement_with_likelihoods(
    run: RunPaths, config: Config, score: Predictor, prompts: Prompts
) -> dict[str, Any]:
    """Share of rows where score mode's label has the greatest log p(answer | prompt).

    The plain model with the adapter beside it, a row at a time, normalised over the whole
    vocabulary; an answer is one token, so one pass a row gives all five, as in the LM evaluation
    harness.
    """
    labels = read_json(run.tokens)["label_ids"]
    found, _ = timed(score)(prompts)
    base = load_model(model_folder(config.model), "fp32")
    model = with_adapter(base, run.adapter, merge=False).eval()
    expected = []
    for prompt in prompts:
        log_p = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[labels]
        expected.append(int(log_p.argmax()))
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    return {"rows": len(prompts), "equal": equal}


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['rows']} reviews of {result['gflop_per_review']:.1f} GFLOP; "
        f"matrix product {result['matrix_product_gflops']:.0f} GFLOP/s, "
        f"{torch.get_num_threads()} threads"
    )
    print("                reviews/s  of the rate  micro F1  macro F1  unparsed  as score")
    for name, row in result["contenders"].items():
        share = row["share_of_matrix_product_rate"]
        print(
            f"{name:15} {row['reviews_per_second']:9.2f} {share:11.0%}"
            f" {row['f1']['micro']:10.3f} {row['f1']['macro']:9.3f} {row['unparsed']:9}"
            f" {row['same_as_score']:9.1%}"
        )
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f} times as fast")
    if "likelihood" in result:
        found = result["likelihood"]
        print(f"score equals whole-answer likelihoods on {found['equal']} of {found['rows']} rows")


if __name__ == "__main__":
    main()
