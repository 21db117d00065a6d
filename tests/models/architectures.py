"""Every decoder that the installed transformers knows, tiny and random: what is done with it.

`python -m tests.models.architectures` writes docs/models/architectures.md anew.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from yelp_hpc.data.answer_tree import answer_tree
from yelp_hpc.errors import RequestError
from yelp_hpc.inference.generation import GreedyDecoder, generation_way
from yelp_hpc.inference.search import search_answers
from yelp_hpc.models.checkpoint import config_problems
from yelp_hpc.models.packed.batch import forward_selected, pack, prepare_model
from yelp_hpc.models.packed.proof import choose, limits_passed
from yelp_hpc.models.packed.tree import answer_scores
from yelp_hpc.models.packed.unpacked import generate_rows

PAGE = Path(__file__).parents[2] / "docs" / "models" / "architectures.md"
LONGEST = 1024
"""Tokens of the longest row that the models are asked for: data.cutoff's default."""

# Sparse attention and n-grams of Qwen4-Exp, as its checkpoints have them.
QWEN4: dict[str, Any] = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 32,
    "ple_layer_ids": [2],
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
ROTATED = {"rope_type": "default", "rope_theta": 1e4}
# What an architecture's own defaults lack.
GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTATED}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 30},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
}


@dataclass(frozen=True)
class Found:
    """What is done with an architecture."""

    kind: str
    way: str
    """packed, rows, alone, refused, or itself: its defaults give no twin."""
    why: str = ""
    generate: str = ""


def kinds() -> list[str]:
    """Every model_type that is loaded as a causal LM."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(kind: str) -> Any:
    """transformers' object of an architecture's defaults."""
    return CONFIG_MAPPING[kind](**GIVEN.get(kind, {}))


def judge(kind: str) -> tuple[Found, Any]:
    """What is done with the architecture's defaults, and its twin, prepared."""
    config, known = None, {"model_type": kind}
    with suppress(Exception):  # defaults that describe no model
        config = default_config(kind)
        known = {**config.to_dict(), **known}
    problems = list(config_problems(known))
    if problems:
        return Found(kind, "refused", problems[0].partition(":")[0]), None
    if config is None:
        return Found(kind, "itself"), None
    text = config.get_text_config(decoder=True)
    try:
        chosen = choose(config, LONGEST, train=True)
    except RequestError as error:
        if "lora.target" not in str(error):
            return Found(kind, "refused", str(error)), None
        try:
            chosen = choose(config, LONGEST, train=False)
        except RequestError as other:
            return Found(kind, "refused", str(other)), None
    if chosen is None:
        return Found(kind, "itself"), None
    verdict, twin = chosen
    try:
        generate: str = generation_way(twin)
    except RequestError:
        return Found(kind, verdict.way, verdict.why, "refused"), twin
    if generate == "packed" and limits_passed(text, LONGEST):
        generate = "rows"
    return Found(kind, verdict.way, verdict.why, generate), twin


ROWS = (3, 22, 9, 1, 14)


def assert_right(found: Found, twin: Any) -> None:
    """Other rows than the proof's: equal to the plain model alone, scored and generated."""
    draw = torch.Generator().manual_seed(7)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 96, (count,), generator=draw).tolist()

    head = tokens(5)
    texts = [head + tokens(count) for count in ROWS]
    prepare_model(twin, way="alone")
    plain = torch.cat(
        [twin(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1:] for text in texts]
    )
    wanted = _gradients(twin, plain)
    written: list[list[int]] = []
    with suppress(Exception):  # with some, transformers itself writes nothing
        written = generate_rows(
            twin, texts, (), 5, lambda _: False, torch.device("cpu"), alone=True
        )
    prepare_model(twin, way=found.way)  # type: ignore[arg-type]
    logits = forward_selected(twin, pack(texts, 5))
    off = (logits - plain).norm(dim=1) / plain.norm(dim=1)
    assert off.max() < 1e-5, f"{found.kind}: logits are off by {off.tolist()}"
    got = _gradients(twin, logits)
    largest = max((float(g.norm()) for g in wanted.values()), default=0.0)
    for name, gradient in wanted.items():
        apart = float((got[name] - gradient).norm())
        assert apart <= 1e-4 * max(float(gradient.norm()), 1e-3 * largest), (found.kind, name)
    if not written:
        return
    decoder = GreedyDecoder(twin, 5, (), 5, lambda _: False, way=found.generate)  # type: ignore[arg-type]
    assert decoder.generate(texts) == written, found.kind
    if found.generate == found.way == "packed":
        tree = answer_tree([[7], [8, 9], [8, 10, 4], [11, 12, 13, 14], [11, 12, 20]])
        with torch.inference_mode():
            best = answer_scores(twin, texts, 5, tree).argmax(1).tolist()
        assert search_answers(twin, texts, 5, tree) == best, found.kind


def _gradients(twin: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    twin.zero_grad()
    if not logits.requires_grad:
        return {}
    logits.logsumexp(1).sum().backward()
    return {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}


WORDS = {
    "packed": "packed",
    "rows": "padded batches",
    "alone": "one row a call",
    "refused": "refused",
    "itself": "asked with its own weights",
}


def page(table: list[Found]) -> str:
    """The page of the manual."""
    counts = {way: sum(found.way == way for found in table) for way in WORDS}
    said = ", ".join(f"{count} {WORDS[way]}" for way, count in counts.items() if count)
    lines = [
        "# Architectures",
        "",
        "Every `model_type` that transformers "
        f"{transformers.__version__} loads as a causal LM, and what is done with it at "
        f"`data.cutoff` {LONGEST}: {said}.",
        "",
        "Before anything is queued, a small random twin of the configured model is asked whether "
        "three short rows in a batch get the logits, and an adapter the gradients, that each row "
        "gets alone (fp32, 1e-5 of their size; gradients 1e-4), and whether one row's text moves "
        "another's logits. The first way that passes is taken: **packed** (no padding, the shared "
        "prompt computed once), "
        "**padded batches** (for models that mix tokens outside of attention: slower, as right), "
        "**one row a call**. A model whose tokens depend on those after them is refused. If "
        "a config.json gives no twin, prepare asks the model itself, and `plan` says so. "
        "Windows and chunks that rows of the run pass are passed by the twin's rows, too.",
        "",
        "Made by `python -m tests.models.architectures`; a test compares.",
        "",
        "| model_type | score and train | generate | why |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, table)]) + "\n"


def line(found: Found) -> str:
    """A row of the page's table."""
    generate = WORDS.get(found.generate, "")
    return f"| `{found.kind}` | {WORDS[found.way]} | {generate} | {_words(found.why)} |"


def _words(why: str) -> str:
    """Why, without the figures that differ from one machine to the next."""
    for part, words in (
        ("moves another's", "packed, one text would move another's logits"),
        ("logits are off", "packed, logits would be wrong"),
        ("gradient of", "packed, gradients would be wrong"),
        ("gets no gradient", "packed, gradients would be missing"),
        ("it fails", "its code does not take packed tokens"),
        ("tokens after it", "reads a text from both ends"),
        ("another shape", "its code does not take packed tokens"),
    ):
        if part in why:
            return words
    return why.replace("|", "/")


def table() -> list[Found]:
    """Every architecture, verified."""
    found = []
    for kind in kinds():
        one, twin = judge(kind)
        if twin is not None:
            assert_right(one, twin)
        found.append(one)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page(table()), encoding="utf-8")


if __name__ == "__main__":
    main()
