"""Python that loads a published model and answers as the evaluation did; pure."""

from __future__ import annotations

import json

from yelp_hpc.config import DTYPES, Config
from yelp_hpc.task import YELP

_WITHOUT_END = "[one[: len(one) - (one[-1] == tokenizer.eos_token_id)] for one in ids]"
"""What some tokenizers append is no part of an answer."""
_RATING = (
    "",
    "",
    "@torch.no_grad()",
    "def rating(review: str) -> int:",
    '    """0 (one star) to 4 (five stars)."""',
    '    texts = [before + review + after + label for label in "01234"]',
    '    ids = [tokenizer(text)["input_ids"] for text in texts]',
    f"    ids = {_WITHOUT_END}",
    "    logits = model(input_ids=torch.tensor([ids[0][:-1]])).logits[0, -1]",
    "    return int(logits[[one[-1] for one in ids]].argmax())",
    "",
    "",
    'print(rating("Friendly staff, and the best dumplings in town."))',
)


def _answering(config: Config) -> list[str]:
    """The lines that score whole labels, one pass a label: slow, but the same answers."""
    labels = ", ".join(_literal(label) for label in config.task.labels)
    return [
        f"labels = [{labels}]",
        "",
        "",
        "@torch.no_grad()",
        "def answer(text: str) -> str:",
        '    """The label whose tokens are the most probable."""',
        '    ids = [tokenizer(before + text + after + label)["input_ids"] for label in labels]',
        f"    ids = {_WITHOUT_END}",
        "    start = len(os.path.commonprefix(ids))",
        "    if any(a is not b and b[: len(a)] == a for a in ids for b in ids):",
        "        ids = [one + [tokenizer.eos_token_id] for one in ids]",
        "    scores = []",
        "    for one in ids:",
        "        chances = model(input_ids=torch.tensor([one])).logits[0].float().log_softmax(-1)",
        "        scores.append(sum(chances[i - 1, one[i]] for i in range(start, len(one))))",
        "    return labels[int(torch.stack(scores).argmax())]",
        "",
        "",
        f'print(answer("The text of {article(config.task.noun)} {config.task.noun}."))',
    ]


def article(noun: str) -> str:
    """The article before a noun."""
    return "an" if noun[:1].lower() in "aeiou" else "a"


def snippet(config: Config, repo: str, base: str, native: bool) -> str:
    """Lines that load the model `repo` (an adapter of `base`) and answer for a text."""
    publish = config.publish
    precision = DTYPES.get(config.infer.precision, "float32")  # auto: nothing was computed yet
    revision = f', revision="{publish.branch}"' if publish.branch else ""
    base_revision = f', revision="{config.model.revision}"' if config.model.revision else ""
    imports = ["import torch"] if config.task == YELP else ["import os", "", "import torch"]
    lines = []
    if publish.merged:
        source, pinned = "repo", revision
    else:
        imports.append("from peft import PeftModel")
        source, pinned = f'"{base}"', base_revision
    if native:
        imports += [
            "from huggingface_hub import snapshot_download",
            "from yelp_hpc.models.load import load_model, load_tokenizer",
        ]
        lines += [
            f"folder = snapshot_download({source}{pinned})",
            "tokenizer = load_tokenizer(folder)",
            f"model = load_model(folder, torch.{precision})",
        ]
    else:
        imports.append("from transformers import AutoModelForCausalLM, AutoTokenizer")
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained(repo{revision})",
            f"model = AutoModelForCausalLM.from_pretrained({source}{pinned}, "
            f"dtype=torch.{precision})",
        ]
    if not publish.merged:
        lines.append(f"model = PeftModel.from_pretrained(model, repo{revision})")
    head, tail = config.prompt.template.split("{review}")
    tail = tail.removesuffix("{label}")
    return "\n".join(
        [
            *imports,
            "",
            f'repo = "{repo}"',
            *lines,
            "model = model.eval()",
            f"before = {_literal(head)}",
            f"after = {_literal(tail)}",
            *(_RATING if config.task == YELP else _answering(config)),
        ]
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
