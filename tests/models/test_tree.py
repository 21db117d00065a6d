"""Whole answers scored in one pass equal one full forward an answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MistralConfig

from tests.models.test_packed import CONFIGS, SIZES, VOCAB, tiny
from yelp_hpc.data.answer_tree import answer_tree
from yelp_hpc.models.load import load_model
from yelp_hpc.models.packed.batch import forward_selected, pack, prepare_model
from yelp_hpc.models.packed.tree import answer_scores

FEW = [[7], [8, 9], [8, 10, 4], [11, 12, 13, 14], [11, 12, 20]]
LENGTHS = (5, 90, 1, 34, 34, 33)
MORE: dict[str, Any] = {
    "mistral": MistralConfig(**SIZES),
    "neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=128, pad_token_id=0
    ),
}
GOLDEN = Path(__file__).parent / "golden" / "model"


def many(count: int) -> list[list[int]]:
    """Answers of 2 to 5 tokens that share their beginnings, none the beginning of another."""
    draw = random.Random(count)
    found: list[list[int]] = []
    while len(found) < count:
        answer = [draw.randrange(60, 60 + 7 * (i + 1)) % VOCAB for i in range(draw.randint(2, 5))]
        if not any(a[: len(answer)] == answer or answer[: len(a)] == a for a in found):
            found.append(answer)
    return found


def model_of(name: str) -> Any:
    if name == "chatglm3":
        return load_model(GOLDEN, "fp32")
    if name in CONFIGS:
        return tiny(name).eval()
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(MORE[name]).eval()


def prompts_of(prefix_length: int) -> list[list[int]]:
    draw = random.Random(1)
    prefix = [draw.randrange(2, VOCAB) for _ in range(prefix_length)]
    return [[*prefix, *(draw.randrange(2, VOCAB) for _ in range(n))] for n in LENGTHS]


def one_by_one(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """lm-eval's way: the log-likelihood of each answer from a forward pass of its own."""
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            row = []
            for answer in answers:
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
                chances = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                row.append(sum(chances[i, token].item() for i, token in enumerate(answer)))
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("name", [*CONFIGS, *MORE, "chatglm3"])
@pytest.mark.parametrize("prefix_length", [0, 6])
def test_one_pass_equals_one_forward_an_answer(name: str, prefix_length: int) -> None:
    model, prompts = model_of(name), prompts_of(prefix_length)
    expected = one_by_one(model, prompts, FEW)
    with torch.inference_mode():
        found = answer_scores(prepare_model(model), prompts, prefix_length, answer_tree(FEW))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("count", [20, 150])
def test_many_answers_whose_tree_spans_blocks_of_rows(count: int) -> None:
    model, answers = tiny("llama").eval(), many(count)
    prompts = prompts_of(4)[:3]
    expected = one_by_one(model, prompts, answers)
    with torch.inference_mode():
        tree = answer_tree(answers)
        found = answer_scores(prepare_model(model), prompts, 4, tree)
        plain = answer_scores(prepare_model(model, fused=False), prompts, 4, tree)
    assert len(tree.tokens) > 2 * 7
    for scores in (found, plain):
        assert (scores - expected).abs().max() < 1e-5
    assert ((expected.logsumexp(1)) < 0).all()


def test_an_inner_node_is_computed_once_and_a_last_token_never() -> None:
    tree = answer_tree([[1, 2, 3], [1, 2, 4], [1, 5], [6]])
    assert tree.tokens == (1, 2)
    assert tree.parents == (-1, 0)
    assert tree.steps[0] == ((-1, 1), (0, 2), (1, 3))
    assert answer_tree([[5], [6], [7]]).tokens == ()


@pytest.mark.parametrize("answers", [[[1], [1, 2]], [[1, 2], [1, 2]], [[], [3]]])
def test_answers_that_cannot_be_told_apart_are_refused(answers: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="beginning of another"):
        answer_tree(answers)


@pytest.mark.parametrize("fused", [True, False])
def test_no_branch_and_no_neighbour_is_seen(fused: bool) -> None:
    """Another branch's token, or another prompt, moves no bit of the rest."""
    model = prepare_model(tiny("llama").eval(), fused=fused)
    prompts = prompts_of(4)
    tree = answer_tree(FEW)

    def rows(tokens: tuple[int, ...], texts: list[list[int]]) -> torch.Tensor:
        batch = pack(texts, 4, tree=tree.parents, tree_tokens=tokens)
        with torch.inference_mode():
            return forward_selected(model, batch).view(len(texts), tree.rows_per_prompt, -1)

    before = rows(tree.tokens, prompts)
    after = rows((*tree.tokens[:-1], 50), prompts)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    changed = [*prompts[:-1], [*prompts[-1][:-1], 3]]
    assert torch.equal(rows(tree.tokens, changed)[:-1], before[:-1])


def test_a_tree_cannot_be_trained_through() -> None:
    model = prepare_model(tiny("llama"))
    batch = pack(prompts_of(4), 4, tree=(-1,), tree_tokens=(8,))
    with pytest.raises(NotImplementedError, match="never trained"):
        forward_selected(model, batch)
