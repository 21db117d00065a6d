"""Figures of plans to the last digit: who changes a formula changes `figures.json` and sees it.

`python -m tests.forecast.test_figures` writes the file anew; the formulas themselves are held
against built models, measured peaks and the engine's own plan in test_plan.py.
"""

from __future__ import annotations

import csv
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import reviews
from yelp_hpc.config import Config, config_from_dict
from yelp_hpc.forecast.forecast import checkpoint_interval, forecast, time_limit
from yelp_hpc.forecast.inputs import estimated_lengths
from yelp_hpc.forecast.machine import Probe
from yelp_hpc.forecast.memory import (
    activation_bytes,
    choose_budget,
    infer_memory,
    traffic_bytes,
    training_memory,
)
from yelp_hpc.forecast.model_shape import ModelShape, model_shape
from yelp_hpc.forecast.work import Lengths
from yelp_hpc.gpus import find_card

FIGURES = Path(__file__).with_name("figures.json")
SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 512}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "intermediate_size": 200, "num_key_value_heads": 2},
    "qwen2": {**SIZES, "intermediate_size": 200, "num_key_value_heads": 2, "head_dim": 32,
              "tie_word_embeddings": True},
    "gpt2": {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 512},
    "chatglm": {"hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
                "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128,
                "ffn_hidden_size": 13696, "padded_vocab_size": 65024},
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "dense",
           "query_key_value", "dense_h_to_4h", "dense_4h_to_h", "c_attn", "layers.0.mlp.up_proj",
           "no_such_projection")  # fmt: skip
LENGTHS = Lengths([40 + 13 * i % 97 for i in range(600)], [55, 80, 21] * 9, [90, 34] * 50, 30, "x")
PROBE = Probe(
    "a machine", False, 7.0, 2e-3, 3_000_000_000, 3_200_000_000, 700, 4, 3.0, 9e-4, 2_500_000_000
)


def shapes() -> dict[str, ModelShape]:
    return {
        kind: model_shape({"model_type": kind, **sizes}, kind) for kind, sizes in MODELS.items()
    }


def settings(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"path": "m"},
        "data": {"source": "file", "train": "t.csv", "test_rows": 100},
        "train": {"global_batch": 16, "max_tokens": 512, "epochs": 2, "precision": "fp32"},
        "infer": {"max_tokens": 700, "precision": "fp32"},
    }
    return config_from_dict({k: {**values.get(k, {}), **sections.get(k, {})} for k in
                             {**values, **sections}})  # fmt: skip


def sizes_of_models() -> dict[str, Any]:
    return {
        kind: {
            **asdict(shape),
            "parameters": shape.parameters,
            "layer_weights": shape.layer_weights,
            "last_layer_saved": shape.last_layer_saved,
            "adapter": {name: shape.adapter_parameters([name], 8) for name in TARGETS},
            "adapter by default": shape.adapter_parameters(None, 3),
            "activations": [
                activation_bytes(shape, settings(train={"precision": precision}), cuda)
                for precision in ("fp32", "fp16", "bf16")
                for cuda in (False, True)
            ],
            "traffic": [
                traffic_bytes(shape, precision, train)
                for precision in ("fp32", "bf16")
                for train in (False, True)
            ],
        }
        for kind, shape in shapes().items()
    }


def memory_of_models() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, shape in shapes().items():
        for precision in ("fp32", "bf16"):
            for checkpointing in ("off", "on", "auto"):
                config = settings(
                    model={"precision": precision},
                    train={"precision": precision, "gradient_checkpointing": checkpointing},
                    infer={"precision": precision},
                    lora={"target": ["dense"], "rank": 5},
                )
                for card in (None, find_card("rtx3090")):
                    key = f"{kind} {precision} {checkpointing} {card.name if card else 'CPU'}"
                    cuda, memory = card is not None, card.memory if card else 10**15
                    budget, twice = choose_budget(shape, config, memory, cuda, lambda _: 4096)
                    found[key] = [
                        budget,
                        asdict(training_memory(shape, config, 4096, twice, cuda)),
                        asdict(infer_memory(shape, config, cuda)),
                    ]
    return found


def plans() -> dict[str, Any]:
    glm, llama = shapes()["chatglm"], shapes()["llama"]
    half: dict[str, dict[str, Any]] = {
        "train": {"precision": "fp16", "nproc": 4},
        "infer": {"precision": "fp16"},
        "model": {"precision": "fp16"},
    }
    found = {
        "no machine": forecast(settings(), llama, LENGTHS),
        "another adapter": forecast(
            settings(lora={"target": ["up_proj"], "rank": 6}), llama, LENGTHS
        ),
        "too old a card": forecast(settings(), llama, LENGTHS, card=find_card("v100")),
        "four cards": forecast(settings(**half), glm, LENGTHS, card=find_card("rtx3090")),
        "two nodes, other assumptions": forecast(
            settings(**half), glm, LENGTHS, card=find_card("h100"), nodes=2, efficiency=0.5,
            mtbf_hours=10.0,
        ),
        "too small a card without bf16": forecast(
            settings(train={"precision": "bf16"}), glm, LENGTHS, card=find_card("t4")
        ),
        "probed": forecast(settings(infer={"models": ["tuned"]}), llama, LENGTHS, probe=PROBE),
        "probed, larger micro-batches": forecast(
            settings(train={"max_tokens": 4096}), llama, LENGTHS, probe=replace(PROBE, cuda=True)
        ),
        "probed, two ranks": forecast(settings(train={"nproc": 2}), llama, LENGTHS, probe=PROBE),
    }  # fmt: skip
    return {name: asdict(plan) for name, plan in found.items()}


def times() -> dict[str, Any]:
    return {
        "checkpoint interval": [
            checkpoint_interval(s, m) for s in (0.3, 60.0) for m in (90.0, 9e5)
        ],
        "time limit": [time_limit(s) for s in (1.0, 3599.0, 86_400.0, 9e5)],
    }


def lengths(folder: Path) -> dict[str, Any]:
    """Of data that is not prepared: how many rows, and how long they are taken to be."""
    found = {}
    hub = {"source": "hub", "train": None, "path": "Yelp/yelp_review_full"}
    for name, config, mean in (
        ("a Hub data set", settings(data={**hub, "test_rows": 50}), None),
        ("with a mean", settings(data={**hub, "train_rows": 1000, "test_rows": 50}), 321.0),
    ):
        made = estimated_lengths(config, mean)
        found[name] = [
            [len(part), sum(part), max(part), min(part)]
            for part in (made.train, made.validation, made.test)
        ] + [made.prefix, made.source]
    names = ["awful", "poor", "fine", "good", "really great"]
    for file, seed in (("train.csv", 0), ("test.csv", 1)):
        with (folder / file).open("w", newline="") as opened:
            rows = csv.writer(opened)
            rows.writerow(["text", "label"])
            rows.writerows((text, names[label]) for text, label in reviews(40, seed))
    train, test = str(folder / "train.csv"), str(folder / "test.csv")
    words = {"labels": names}
    for name, own, task, mean in (
        ("a file", {"train": train, "test_rows": 10}, words, None),
        ("its own test file", {"train": train, "test": test, "test_rows": 10}, words, None),
        ("a small cutoff", {"train": train, "test_rows": 10, "cutoff": 60}, words, None),
        ("a file with a mean", {"train": train, "test_rows": 10}, words, 77.0),
        ("a file with a mean over the cutoff", {"train": train, "test_rows": 10, "cutoff": 60},
         words, 77.0),
        ("a file with a mean below the prefix", {"train": train, "test_rows": 10}, words, 3.0),
        ("labels of one token", {"train": train, "test_rows": 10},
         {"labels": ["a", "b", "c", "d", "e"], "values": names}, None),
    ):  # fmt: skip
        template = "Say how good it is.\nReview: {review}\nOutput: {label}"
        config = settings(data=own, task=task, prompt={"template": template})
        estimated = estimated_lengths(config, mean)
        found[name] = [
            list(estimated.train), list(estimated.validation), list(estimated.test),
            estimated.prefix, estimated.source,
        ]  # fmt: skip
    return found


def figures() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        estimated = lengths(Path(folder))
    made = {
        "sizes": sizes_of_models(),
        "memory": memory_of_models(),
        "plans": plans(),
        "times": times(),
        "lengths": estimated,
    }
    return dict(json.loads(json.dumps(made)))


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Leaves by their path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{at}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{at}/{i}").items()}
    return {at: value}


@pytest.mark.parametrize("part", ["sizes", "memory", "plans", "times", "lengths"])
def test_figures_are_those_of_the_file(part: str) -> None:
    stand = flat(json.loads(FIGURES.read_text(encoding="utf-8"))[part])
    made = flat(figures()[part])
    assert made.keys() == stand.keys()
    for key, value in stand.items():
        if isinstance(value, float):
            assert made[key] == pytest.approx(value, rel=1e-12), key
        else:
            assert made[key] == value, key


if __name__ == "__main__":
    FIGURES.write_text(json.dumps(figures(), indent=1) + "\n", encoding="utf-8")
