"""What many labels of several tokens cost: one pass over the tree, against a pass a label.

    python -m benchmarks.label_tree [--rows 50] [--one-by-one 50] [--rounds 3] [--wide]
        [--scores-only]

The demo's model and reviews. 5 one-token labels are the Yelp task's; 5, 20, 77 and 150 labels are
random words of 2 to 5 tokens. All ways see the same prompts, in turn; the least time of the rounds
counts. `bound` is (prompt + inner tree tokens) / prompt tokens: what the computed tokens ask for.
Answers alone are `infer.mode: answer`; `sure`: each text ends with a label, three times over, so
that one is likely.
An inner token needs the vocabulary's product, too, which is a fifth of a token's work in so small a
model: `--wide` takes random weights of TinyLlama-1.1B's shape, where it is a tenth.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from yelp_hpc.config import PromptConfig
from yelp_hpc.data.answer_tree import answer_tree
from yelp_hpc.data.demo import model_folder, rated_snippets
from yelp_hpc.data.packing import plan_microbatches
from yelp_hpc.data.prompt import Prompt, common_prefix
from yelp_hpc.inference.predictor import Loaded, answer_predictor, score_predictor
from yelp_hpc.inference.scoring import label_scores
from yelp_hpc.inference.search import search_answers
from yelp_hpc.models.load import attention_of, load_model, load_tokenizer
from yelp_hpc.models.packed.batch import prepare_model
from yelp_hpc.task import YELP

BUDGET = 4096
WORDS = """card payment transfer top up failed pending fee charged cash account balance limit pin
refund exchange rate identity passcode country virtual contactless order lost stolen""".split()  # noqa: SIM905


def labels_of(count: int, answers: Callable[[str], int]) -> tuple[str, ...]:
    """Names like those of intents, `card_payment_fee`, of 2 to 5 tokens."""
    draw, found = random.Random(count), dict[str, None]()
    while len(found) < count:
        name = " ".join(draw.sample(WORDS, draw.randint(2, 4)))
        if 2 <= answers(name) <= 5:
            found[name] = None
    return tuple(found)


def wide(vocabulary: int) -> torch.nn.Module:
    """Random weights of TinyLlama-1.1B's shape."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM._from_config(
        config, attn_implementation=attention_of(config), dtype=torch.float32
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--one-by-one", type=int, default=50, help="rows of the pass a label")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wide", action="store_true", help="1.1B random weights; 12 GB of memory")
    parser.add_argument("--scores-only", action="store_true", help="leave out the answers alone")
    arguments = parser.parse_args()
    folder = model_folder()
    tokenizer = load_tokenizer(folder)
    loaded = wide(len(tokenizer)) if arguments.wide else load_model(folder, "fp32")
    # frozen first, as the infer stage does: only then the fused decoder takes it
    model = prepare_model(loaded.eval().requires_grad_(False))
    # reviews of Yelp's lengths: several snippets each
    snippets = [text for text, _ in rated_snippets()]
    draw = random.Random(0)
    texts = [" ".join(draw.sample(snippets, 7)) for _ in range(arguments.rows)]

    def encode(many: list[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(many)["input_ids"]]

    def tokens_of(name: str) -> int:
        return len(encode([f"Output: {name}"])[0]) - len(encode(["Output:"])[0])

    tasks = {"Yelp's 5": YELP.labels}
    tasks |= {str(count): labels_of(count, tokens_of) for count in (5, 20, 77, 150)}
    prompts: dict[str, list[list[int]]] = {}
    sure: dict[str, list[list[int]]] = {}
    answers: dict[str, list[list[int]]] = {}
    for name, labels in tasks.items():
        # a label that begins another would need its end scored: leave the longer one out
        kept = tuple(x for x in labels if not any(x != y and x.startswith(y) for y in labels))
        prompt = Prompt(PromptConfig().template, kept, encode, 1024)
        prompts[name], _ = prompt.fit(texts)
        hints = [f"\nOutput: {draw.choice(kept)}\n" * 3 for _ in texts]
        sure[name], _ = prompt.fit([a + b for a, b in zip(texts, hints, strict=True)])
        answers[name] = prompt.answers

    def scored(name: str) -> torch.Tensor:
        tree, own = answer_tree(answers[name]), prompts[name]
        prefix = common_prefix(own)
        lengths = [len(ids) - prefix + len(tree.tokens) for ids in own]
        found = torch.zeros(len(own), len(answers[name]))
        for batch in plan_microbatches(lengths, BUDGET, prefix):
            found[batch] = label_scores(model, [own[i] for i in batch], prefix, tree)
        return found

    def alone(name: str, own: list[list[int]]) -> tuple[float, float, int]:
        """Seconds of the answers alone and of their scores, and the rows scored after all."""
        prefix, tree = common_prefix(own), answer_tree(answers[name])
        device = torch.device("cpu")
        whole = score_predictor(model, prefix, answers[name], BUDGET, device)
        loaded = Loaded(model, folder, device, "packed")
        search = answer_predictor(loaded, prefix, answers[name], BUDGET, whole, True)
        found: list[dict[int, int | None]] = []
        taken = []
        for way in (search, whole):
            started = time.perf_counter()
            found.append({})
            for batch in way.plan([len(ids) for ids in own]):
                found[-1] |= zip(batch, way.predict([own[i] for i in batch])[0], strict=True)
            taken.append(time.perf_counter() - started)
        if found[0] != found[1]:
            raise SystemExit(f"{name}: the answers alone are not those of the highest scores")
        left = sum(
            answer is None
            for batch in search.plan([len(ids) for ids in own])
            for answer in search_answers(model, [own[i] for i in batch], prefix, tree)
        )
        return taken[0], taken[1], left

    @torch.inference_mode()
    def one_by_one(name: str, rows: int) -> torch.Tensor:
        """lm-eval's way: each answer behind each prompt, in batches of one text's answers."""
        found = torch.zeros(rows, len(answers[name]))
        for row, ids in enumerate(prompts[name][:rows]):
            for start in range(0, len(answers[name]), 16):
                part = answers[name][start : start + 16]
                width = max(map(len, part))
                padded = [ids + answer + [0] * (width - len(answer)) for answer in part]
                logits = model(
                    input_ids=torch.tensor(padded), logits_to_keep=width + 1, use_cache=False
                ).logits.log_softmax(-1)
                for i, answer in enumerate(part):
                    total = sum(logits[i, at, token].item() for at, token in enumerate(answer))
                    found[row, start + i] = total
        return found

    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(arguments.rounds):
        for name in tasks:
            started = time.perf_counter()
            scored(name)
            seconds[name].append(time.perf_counter() - started)
    base = min(seconds["Yelp's 5"])
    mean = sum(map(len, prompts["Yelp's 5"])) / arguments.rows
    print(f"{arguments.rows} prompts of {mean:.0f} tokens on the mean, {arguments.rounds} rounds")
    print("labels     tokens  inner   s      cost   bound  cost/bound")
    for name in tasks:
        tree = answer_tree(answers[name])
        own = sum(map(len, prompts[name]))
        bound = 1 + len(tree.tokens) * arguments.rows / own
        cost = min(seconds[name]) / base
        longest = max(map(len, answers[name]))
        print(
            f"{name:10} 1-{longest:<5} {len(tree.tokens):5} {min(seconds[name]):7.2f} "
            f"{cost:6.2f} {bound:6.2f} {cost / bound:8.2f}"
        )
    searched = [] if arguments.scores_only else [x for x in tasks if answer_tree(answers[x]).tokens]
    if searched:
        print("answers alone, in times of their scores; rows scored after all")
    for name in searched:
        for what, texts_of in (("", prompts), ("sure", sure)):
            found = [alone(name, texts_of[name]) for _ in range(arguments.rounds)]
            ratio = min(one[0] for one in found) / min(one[1] for one in found)
            print(f"{name:10} {what:5} {ratio:6.2f} {found[0][2]:4}")
    rows = min(arguments.one_by_one, arguments.rows)
    if rows:
        started = time.perf_counter()
        expected = one_by_one("77", rows)
        taken = time.perf_counter() - started
        tree_seconds = min(seconds["77"]) * rows / arguments.rows
        off = float((scored("77")[:rows] - expected).abs().max())
        print(
            f"a pass a label, {len(answers['77'])} labels, {rows} rows: {taken:.1f} s, "
            f"{taken / tree_seconds:.1f} times the tree's; largest difference {off:.1e}"
        )


if __name__ == "__main__":
    main()
