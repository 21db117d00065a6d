"""The door: whether a model folder can do what a run asks of it, before anything is queued.

`admit` looks at the folder's files, binds the prompt to its tokenizer and proves on a small twin of
the model how batches must be computed. prepare asks it where the weights are, train and infer once
more at start; plan, doctor and submit ask a child (`python -m yelp_hpc.stages.door`), because their
side has no torch. Reads the folder and the configuration, writes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config, config_from_dict
from yelp_hpc.errors import RequestError, YelpHpcError, all_problems
from yelp_hpc.forecast.model_shape import model_shape
from yelp_hpc.models.checkpoint import check_folder, tokenizer_missing
from yelp_hpc.models.packed.batch import Way

SLACK = 1000
"""How much more than its small twin a real model may round."""


@dataclass(frozen=True)
class Admission:
    """How a model is computed."""

    way: Way | None
    """In training and scoring; None: its architecture has no twin, ask the model itself."""
    generate: Way | None
    """In generate and answer mode; None: as `way`, or not asked for."""
    notes: tuple[str, ...] = ()
    """What a user should know: said once."""


def admit(
    config: Config, folder: Path, longest: int | None = None, tokenizer: bool = True
) -> Admission:
    """Judge the model in `folder`.

    Args:
        tokenizer: it must have one; without, one is judged that is there.
        longest: tokens of the longest row, answer included; None: not known yet, data.cutoff.

    Raises:
        RequestError: with everything that is wrong.
    """
    from yelp_hpc.models.load import model_config
    from yelp_hpc.models.weights import check_shapes

    written = check_folder(folder, tokenizer=tokenizer)
    kind = written["model_type"]
    values = model_config(folder)
    problems, notes = [], []
    try:
        model_shape(written, str(folder / "config.json"))
    except RequestError as error:
        problems.append(str(error))
    try:
        if tokenizer or not tokenizer_missing(folder, kind == "chatglm"):
            _bind(config, folder)
    except RequestError as error:
        problems.append(str(error))
    try:
        if unread := check_shapes(folder):
            notes.append(
                f"{values.model_type} has no use for {len(unread)} of the tensors in {folder} "
                f"({unread[0]}, …): they stay unread"
            )
    except RequestError as error:
        problems.append(str(error))
    generating = config.infer.mode != "score"
    new = config.infer.max_new_tokens if config.infer.mode == "generate" else 0
    most = (config.data.cutoff if longest is None else longest) + new
    found = None
    try:
        found = _prove(config, values, most, generating)
    except RequestError as error:
        problems.append(str(error))
    too_long = _too_long(values, most, new)
    if longest is None:
        notes += [f"{text}, unless all reviews are shorter (prepare counts)" for text in too_long]
    else:
        problems += too_long
    if len(problems) == 1:
        raise RequestError(problems[0])
    if problems:
        raise RequestError(all_problems(f"{folder} cannot be used:", problems))
    if found is None:
        notes.append(f"{values.model_type} has no small twin here: prepare asks the model itself")
        return Admission(None, None, tuple(notes))
    way, generate, why = found
    if way != "packed":
        how = "in padded batches" if way == "rows" else "one review a call"
        notes.append(f"{values.model_type} is computed {how}, not packed: {why}")
    return Admission(way, generate, tuple(notes))


def examine(config: Config, folder: Path) -> Admission:
    """`admit`, and all that only the weights themselves tell: what prepare asks of a model.

    Raises:
        RequestError: with everything that is wrong.
    """
    from yelp_hpc.models.load import load_model
    from yelp_hpc.models.weights import check_values
    from yelp_hpc.training.adapter import add_lora

    found = admit(config, folder)
    check_values(folder)
    if found.way is None:
        train = "tuned" in config.infer.models
        model = load_model(folder, config.train.precision)
        model = add_lora(model, config) if train else model
        found = take_the_way(model, config, folder, config.data.cutoff, gradients=train)
    return found


def take_the_way(
    model: Any, config: Config, folder: Path, longest: int, *, gradients: bool = False
) -> Admission:
    """Prepare a loaded model as its twin says, and prove it once more on the model itself.

    Raises:
        RequestError: as `admit`, or the model is not what its twin was.
    """
    from yelp_hpc.inference.generation import generation_way
    from yelp_hpc.models.packed.proof import WAYS, prove

    found = admit(config, folder, longest, tokenizer=False)
    if found.way is None:
        way = prove(model, WAYS, gradients=gradients).way
        generating = config.infer.mode != "score" and not gradients
        return replace(found, way=way, generate=generation_way(model) if generating else None)
    prove(model, [found.way], gradients=gradients, slack=SLACK)
    return found


def check_lengths(config: Config, folder: Path, longest: int) -> None:
    """Check that the model has an answer for a row of `longest` tokens.

    Raises:
        RequestError: it has none.
    """
    from yelp_hpc.models.load import model_config

    new = config.infer.max_new_tokens if config.infer.mode == "generate" else 0
    problems = _too_long(model_config(folder), longest + new, new)
    if problems:
        raise RequestError("; ".join(problems))


def _bind(config: Config, folder: Path) -> None:
    """Bind the prompt to the tokenizer, so that it says what it does not fit."""
    from yelp_hpc.data.encoding import check_ids
    from yelp_hpc.models.load import check_tokenizer, load_tokenizer, model_config
    from yelp_hpc.stages.prepare import bind_prompt

    tokenizer = load_tokenizer(folder)
    end = check_tokenizer(tokenizer, folder)
    prompt = bind_prompt(config, tokenizer)
    pairs = zip(prompt.labels, prompt.answers, strict=True)
    if ends := [label for label, ids in pairs if end in (*prompt.lead, *ids)]:
        raise RequestError(
            f"the answer {ends[0]!r} holds the token that ends a sequence ({end}): choose other "
            "task.labels, or another eos_token in tokenizer_config.json"
        )
    text = model_config(folder).get_text_config(decoder=True)
    rows = getattr(text, "padded_vocab_size", None) or text.vocab_size
    check_ids(prompt.encode([prompt.text("a")])[0], rows, "prompt.template")


def _prove(
    config: Config, values: Any, longest: int, generating: bool
) -> tuple[Way, Way | None, str] | None:
    from yelp_hpc.inference.generation import generation_way
    from yelp_hpc.models.packed.proof import choose, limits_passed, rotation_limit

    train = "tuned" in config.infer.models
    chosen = choose(values, longest, config.lora.target, train=train)
    if chosen is None:
        return None
    verdict, twin = chosen
    way: Way | None = None
    if generating:
        way = generation_way(twin)
        text = values.get_text_config(decoder=True)
        bound = rotation_limit(text, "longrope")
        if way == "packed" and limits_passed(text, longest):
            way = "rows"  # the cache is padded between prompt and answer: windows would count it
        if bound is not None and longest > bound:
            way = "alone"
    return verdict.way, way, verdict.why


def _too_long(values: Any, most: int, new: int) -> list[str]:
    """Why rows of `most` tokens, `new` of them generated, are too long for the model."""
    from yelp_hpc.models.packed.proof import positions_of, rotation_limit

    text = values.get_text_config(decoder=True)
    found = []
    if (limit := positions_of(text)) is not None and most > limit:
        found.append((limit, f"{values.model_type} here has {limit} learnt positions"))
    if (limit := rotation_limit(text, "dynamic")) is not None and most > limit:
        what = (
            f"{values.model_type} here turns positions beyond {limit} by the longest text that it "
            "has seen (dynamic RoPE), so that answers would depend on their order"
        )
        found.append((limit, what))
    return [
        f"{what}, and rows have up to {most} tokens: set data.cutoff to {limit - new} or less"
        for limit, what in found
    ]


def main() -> None:
    """The child of `models.door.ask`: JSON in, JSON out."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    asked = json.loads(sys.stdin.read())
    answer: dict[str, Any] = {"problem": "", "notes": []}
    try:
        found = admit(config_from_dict(asked["config"]), Path(asked["folder"]), asked["longest"])
        answer["notes"] = list(found.notes)
    except YelpHpcError as error:
        answer["problem"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
