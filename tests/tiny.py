"""A tiny model and a prepared run directory for tests: real files, random weights, no downloads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.config import Config, config_from_dict
from yelp_hpc.rundir.files import write_json
from yelp_hpc.rundir.paths import RunPaths

WORDS = {
    0: ["awful", "rude", "dirty", "never", "cold", "broken", "refund", "worst"],
    1: ["slow", "bland", "poor", "late", "small", "wrong", "noisy", "meh"],
    2: ["fine", "okay", "average", "plain", "usual", "normal", "decent", "middling"],
    3: ["good", "nice", "tasty", "friendly", "clean", "quick", "pleasant", "solid"],
    4: ["amazing", "perfect", "wonderful", "best", "love", "superb", "great", "stunning"],
}
FILLER = "the food was and service place we they had our table came with a it".split()  # noqa: SIM905
HEAD = "Instruction: judge the review.\nReview: "
TAIL = "\nOutput: "

SIF = bytes(32) + b"SIF_MAGIC\0" + bytes(200)
"""How an image begins: enough for whoever only looks at it."""


def reviews(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Texts whose words give their label away, and the labels, balanced; 4 to 40 words."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = i % 5
        words = [
            draw.choice(WORDS[label] if draw.random() < 0.5 else FILLER)
            for _ in range(draw.randint(4, 40))
        ]
        rows.append((" ".join(words), label))
    return rows


def make_model(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """A random Llama (2 layers, width 32) and a byte-level BPE tokenizer trained on `reviews`.

    Each digit is a token of its own; `<pad>` is 0, `<eos>` 1.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{HEAD}{text}{TAIL}{label}" for text, label in reviews(200)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        **{
            "vocab_size": len(fast),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            **sizes,
        }
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_config(model_path: Path, /, **changes: dict[str, Any]) -> Config:
    """Settings that fit the tiny model; `changes` replace keys section by section."""
    values: dict[str, Any] = {
        "model": {"path": str(model_path)},
        "data": {"source": "file", "train": "reviews.csv", "test_rows": 10},
        "prompt": {"template": HEAD + "{review}" + TAIL + "{label}"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "global_batch": 8,
            "max_tokens": 128,
            "save_every_steps": 4,
            "precision": "fp32",
        },
        "infer": {"precision": "fp32"},
    }
    for section, settings in changes.items():
        values[section] = {**values.get(section, {}), **settings}
    return config_from_dict(values)


def prepare_run(
    root: Path, model: Path, train: int = 84, validation: int = 20, test: int = 25
) -> RunPaths:
    """A run directory with the files that the stage prepare writes for `reviews`."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    run = RunPaths(root)
    run.prepare.mkdir(parents=True, exist_ok=True)
    everything = []
    for number, (split, count) in enumerate(
        [("train", train), ("validation", validation), ("test", test)]
    ):
        rows = reviews(count, seed=number + 1)
        ids = [tokenizer(f"{HEAD}{text}{TAIL}")["input_ids"] for text, _ in rows]
        everything += ids
        table = pa.table(
            {
                "row": pa.array(range(count), pa.int64()),
                "label": pa.array([label for _, label in rows], pa.int8()),
                "text": [text for text, _ in rows],
                "input_ids": pa.array(ids, pa.list_(pa.int32())),
                "length": pa.array([len(x) for x in ids], pa.int32()),
            }
        )
        pq.write_table(table, run.split(split))
    prefix = []
    for column in zip(*everything, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    labels = [tokenizer(str(i))["input_ids"] for i in range(5)]
    assert all(len(label) == 1 for label in labels)
    write_json(
        run.tokens,
        {"prefix": prefix, "label_ids": [x[0] for x in labels], "eos_id": 1, "pad_id": 0},
    )
    return run
