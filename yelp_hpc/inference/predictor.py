"""One model in one mode as two functions: how prompts are batched, and what a batch predicts.

Reads the model's folder and, for the tuned model, the adapter; writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yelp_hpc.config import Config
from yelp_hpc.data.answer_tree import answer_tree, scored_answers
from yelp_hpc.data.packing import plan_microbatches
from yelp_hpc.errors import RequestError
from yelp_hpc.inference.answers import is_decided, parse_label
from yelp_hpc.inference.generation import GreedyDecoder, plan_batches
from yelp_hpc.inference.scoring import best_labels, label_scores
from yelp_hpc.inference.search import most_steps, search_answers
from yelp_hpc.models.load import TORCH_DTYPES, load_model, load_tokenizer
from yelp_hpc.models.local import model_folder
from yelp_hpc.models.packed.batch import Way, base_model, prepare_model, way_of
from yelp_hpc.models.packed.twin import limits
from yelp_hpc.progress import say
from yelp_hpc.ranks.device import precision_here, usable_gpus
from yelp_hpc.rundir.files import read_object
from yelp_hpc.rundir.manifest import in_precision
from yelp_hpc.rundir.paths import ADAPTER_CONFIG
from yelp_hpc.task import YELP, TaskConfig

_FEW = 16
"""Rows that are searched in vain before it is given up."""


@dataclass(frozen=True)
class Predictor:
    """One model in one mode."""

    plan: Callable[[Sequence[int]], list[list[int]]]
    """Batches (indices) from the lengths of prompts, the prefix included."""
    predict: Callable[
        [list[list[int]]],
        tuple[Sequence[int | None], list[list[float]] | None, list[str] | None],
    ]
    """Predictions, scores and texts of one batch of prompts."""


@dataclass(frozen=True)
class Loaded:
    """A model on its device, prepared to be asked."""

    model: Any
    folder: Path
    device: torch.device
    generate: Way | None
    """How it generates; None: as it scores."""


def load_predictor(
    config: Config,
    adapter: Path | None,
    tokens: Mapping[str, Any],
    take_the_way: Callable[[Any, Path], Way | None] | None = None,
) -> Predictor:
    """Load the model as `load` does, for prompts that begin with the prefix of `tokens`."""
    return predictor_of(load(config, adapter, take_the_way), config, tokens)


def load(
    config: Config,
    adapter: Path | None,
    take_the_way: Callable[[Any, Path], Way | None] | None = None,
) -> Loaded:
    """Load the model, with `adapter` unless None, onto the GPU if there is one.

    `take_the_way`: prepares it and says how it generates (None: as it scores); without it the model
    is packed.
    """
    if config.infer.precision == "auto":  # a run that has not begun
        config = in_precision(config, {"infer": precision_here()[0]})
    device = torch.device("cuda" if usable_gpus() else "cpu")
    torch.backends.cuda.matmul.allow_fp16_accumulation = config.infer.fp16_accumulation
    folder = model_folder(config.model)
    say(f"loading {folder} in {config.infer.precision} on {device}")
    loaded = load_model(folder, TORCH_DTYPES[config.infer.precision])
    if adapter is not None:
        # a bias of LoRA's own has no place in a layer without one
        own_bias = read_object(adapter / ADAPTER_CONFIG).get("lora_bias")
        merge = config.infer.precision == "fp32" and not own_bias
        loaded = with_adapter(loaded, adapter, merge=merge)
    # frozen, as peft leaves the tuned model: only frozen weights get the faster arithmetic
    loaded = loaded.to(device).eval().requires_grad_(False)
    generate = None
    if take_the_way is None:
        prepare_model(loaded)
    else:
        generate = take_the_way(loaded, folder)
    return Loaded(loaded, folder, device, generate)


def predictor_of(loaded: Loaded, config: Config, tokens: Mapping[str, Any]) -> Predictor:
    """What a loaded model answers to prompts that begin with the prefix of `tokens`.

    `tokens`: the content of tokens.json.
    """
    start, budget, lead = len(tokens["prefix"]), config.infer.max_tokens, tokens.get("lead", [])
    if config.infer.mode != "generate":
        answers = scored_answers(tokens)
        scores = score_predictor(loaded.model, start, answers, budget, loaded.device)
        if config.infer.mode == "score":
            return scores
        packed = (loaded.generate or way_of(loaded.model)) == "packed"
        return answer_predictor(loaded, start, answers, budget, scores, packed)
    ends = loaded.model.generation_config.eos_token_id
    eos_ids = {tokens["eos_id"], *(ends if isinstance(ends, list) else [ends])} - {None}
    tokenizer = load_tokenizer(loaded.folder)

    def text(answer: list[int]) -> str:
        return str(tokenizer.decode([*lead, *answer], skip_special_tokens=True))

    decoder = GreedyDecoder(
        loaded.model,
        start,
        eos_ids,
        config.infer.max_new_tokens,
        decided=lambda answer: is_decided(text(answer), config.task),
        device=loaded.device,
        way=loaded.generate,
    )
    return generate_predictor(decoder, text, budget, config.task)


def with_adapter(model: Any, adapter: Path, merge: bool) -> Any:
    """`model` with a LoRA adapter, merged into the weights if asked for.

    Merging saves the adapter's arithmetic. In half precision the sum is rounded to the weights'
    format and small updates are lost, so there the adapter stays beside them, as in training.

    Raises:
        RequestError: it cannot be merged.
    """
    from peft import PeftModel

    tuned: Any = PeftModel.from_pretrained(model, str(adapter))
    if not merge:
        return tuned
    for name, module in tuned.named_modules():
        if any(getattr(module, "lora_bias", {}).values()) and module.get_base_layer().bias is None:
            raise RequestError(
                f"the adapter has a bias of its own for {name}, which has none in the base model: "
                "it cannot be merged, use it beside the model"
            )
    _untie(model)
    merged = tuned.merge_and_unload()
    for config in (merged.config, merged.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False) and not _tied(merged):
            config.tie_word_embeddings = False  # a reader of its files would tie them again
    return merged


def _untie(model: Any) -> None:
    """Give the output embedding a weight of its own where either end is adapted.

    Merged into one weight, what is learnt of one end would change the other, too.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if _tied(model) and any(hasattr(end, "base_layer") for end in ends):
        last = getattr(ends[1], "base_layer", ends[1])
        last.weight = torch.nn.Parameter(last.weight.detach().clone(), requires_grad=False)


def _tied(model: Any) -> bool:
    """Whether the embeddings of input and output are one weight."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(end, "base_layer", end) for end in ends)
    return last is None or first.weight is last.weight


def score_predictor(
    model: Any,
    prefix_length: int,
    answers: Sequence[Sequence[int]],
    max_tokens: int,
    device: torch.device,
) -> Predictor:
    """Score mode: the label of the highest score; of equal ones the first."""
    tree = answer_tree(answers)

    def plan(lengths: Sequence[int]) -> list[list[int]]:
        own = [n - prefix_length + len(tree.tokens) for n in lengths]
        return plan_microbatches(own, max_tokens, prefix_length)

    def predict(prompts: list[list[int]]) -> tuple[list[int], list[list[float]], None]:
        scores = label_scores(model, prompts, prefix_length, tree, device)
        return best_labels(scores), scores.tolist(), None

    return Predictor(plan, predict)


def answer_predictor(
    loaded: Loaded,
    prefix_length: int,
    answers: Sequence[Sequence[int]],
    max_tokens: int,
    scores: Predictor,
    packed: bool,
) -> Predictor:
    """Answer mode: the label of the highest score, and no scores.

    `scores` answers where no branch can be left out, as every label is one token or the model does
    not go on from a packed prompt, where a batch's cache would be longer than a window of the model
    (it counts padding and branches that were left), and where a search would cost more than it
    saves: behind prompts that are long beside the tree, and once most rows were searched in vain.
    """
    tree = answer_tree(answers)
    steps = most_steps(tree)
    text = base_model(loaded.model).config.get_text_config(decoder=True)
    window = min(limits(text.to_dict()).values(), default=math.inf)
    asked = left = 0

    def plan(lengths: Sequence[int]) -> list[list[int]]:
        return plan_batches([n - prefix_length for n in lengths], max_tokens, prefix_length)

    def scored(prompts: list[list[int]]) -> tuple[Sequence[int | None], None, None]:
        return scores.predict(prompts)[0], None, None

    def predict(prompts: list[list[int]]) -> tuple[Sequence[int | None], None, None]:
        nonlocal asked, left
        own = sum(map(len, prompts)) - prefix_length * len(prompts)
        found: list[int | None] = [None] * len(prompts)
        worth = len(prompts) * len(tree.tokens) > own / 2 and left <= max(asked / 2, _FEW)
        if worth and max(map(len, prompts)) + steps <= window:
            found = search_answers(loaded.model, prompts, prefix_length, tree, loaded.device)
            asked, left = asked + len(found), left + found.count(None)
        rest = [i for i, answer in enumerate(found) if answer is None]
        for batch in scores.plan([len(prompts[i]) for i in rest]):
            whole = scores.predict([prompts[rest[i]] for i in batch])[0]
            for i, answer in zip(batch, whole, strict=True):
                found[rest[i]] = answer
        return found, None, None

    if packed and tree.tokens:
        return Predictor(plan, predict)
    return Predictor(scores.plan, scored)


def generate_predictor(
    decoder: GreedyDecoder,
    text: Callable[[list[int]], str],
    max_tokens: int,
    task: TaskConfig = YELP,
) -> Predictor:
    """Generate mode: the label that the greedy text states, or none."""
    start = decoder.prefix_length

    def plan(lengths: Sequence[int]) -> list[list[int]]:
        return plan_batches([n - start for n in lengths], max_tokens, start)

    def predict(prompts: list[list[int]]) -> tuple[list[int | None], None, list[str]]:
        texts = [text(answer) for answer in decoder.generate(prompts)]
        return [parse_label(answer, task) for answer in texts], None, texts

    return Predictor(plan, predict)
