"""The best answer alone is the one of the highest score, without the branches that cannot win."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.models.test_packed import CONFIGS, SIZES, tiny
from tests.models.test_tree import FEW, MORE, many, model_of, one_by_one, prompts_of
from yelp_hpc.data.answer_tree import AnswerTree, answer_tree
from yelp_hpc.inference import search
from yelp_hpc.inference.predictor import Loaded, answer_predictor, score_predictor
from yelp_hpc.inference.search import search_answers
from yelp_hpc.models.packed.batch import prepare_model
from yelp_hpc.models.packed.tree import answer_scores


def best(model: Any, prompts: list[list[int]], prefix: int, tree: AnswerTree) -> list[int]:
    with torch.inference_mode():
        return answer_scores(model, prompts, prefix, tree).argmax(1).tolist()


@pytest.mark.parametrize("name", [*CONFIGS, *MORE, "chatglm3"])
@pytest.mark.parametrize("prefix", [0, 6])
def test_it_is_the_one_of_the_highest_score(
    name: str, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = prepare_model(model_of(name)), prompts_of(prefix)
    # random weights are the worst case: nothing is likely, so most of the tree is gone into
    monkeypatch.setattr(search, "STEPS_A_TOKEN", 100)
    for answers in (FEW, many(20), many(150)):
        tree = answer_tree(answers)
        assert search_answers(model, prompts, prefix, tree) == best(model, prompts, prefix, tree)


def test_branches_that_cannot_win_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are likelier than the best answer are gone into, and no other."""
    model, prompts, answers = prepare_model(tiny("llama").eval()), prompts_of(4), many(20)
    tree = answer_tree(answers)
    inner = sorted({tuple(one[:end]) for one in answers for end in range(1, len(one))})
    chances = one_by_one(model, prompts, [list(one) for one in inner])
    with torch.inference_mode():
        winners = answer_scores(model, prompts, 4, tree).amax(1, keepdim=True)
    likelier = (chances > winners).sum(1).tolist()
    assert 0 < sum(likelier) < len(inner) * len(prompts) / 2
    gone_into = [-1] * len(prompts)  # the prompt's own end is no branch
    plain = search._Search.take

    def counted(self: Any, logits: torch.Tensor, rows: list[int]) -> Any:
        for row in rows:
            gone_into[row] += 1
        return plain(self, logits, rows)

    monkeypatch.setattr(search._Search, "take", counted)
    monkeypatch.setattr(search, "STEPS_A_TOKEN", 100)
    search_answers(model, prompts, 4, tree)
    assert gone_into == likelier


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_what_the_search_leaves_is_scored_whole(
    spoilt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, answers = prepare_model(tiny("llama").eval()), prompts_of(4), many(20)
    tree = answer_tree(answers)
    scores = score_predictor(model, 4, answers, 100, torch.device("cpu"))
    loaded = Loaded(model, None, torch.device("cpu"), None)  # type: ignore[arg-type]
    predictor = answer_predictor(loaded, 4, answers, 100, scores, packed=True)
    wanted = best(model, prompts, 4, tree)
    monkeypatch.setattr(search, "STEPS_A_TOKEN", 1)  # too few for most
    assert None in search_answers(model, prompts, 4, tree)
    assert predictor.predict(prompts) == (wanted, None, None)

    plain = torch.Tensor.logsumexp

    def overflowing(self: torch.Tensor, *args: Any) -> torch.Tensor:
        return plain(self, *args).index_fill_(0, torch.tensor([1]), spoilt)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "logsumexp", overflowing)
        found = search_answers(model, prompts, 4, tree)
    assert found[1] is None


def test_a_search_that_is_worth_nothing_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    model, answers, searched = prepare_model(tiny("llama").eval()), many(20), list[int]()
    plain = search.search_answers

    def counted(*args: Any) -> list[int | None]:
        searched.append(len(args[1]))
        return plain(*args)

    monkeypatch.setattr("yelp_hpc.inference.predictor.search_answers", counted)
    monkeypatch.setattr(search, "STEPS_A_TOKEN", 0)  # in vain for all
    scores = score_predictor(model, 4, answers, 4000, torch.device("cpu"))
    loaded = Loaded(model, None, torch.device("cpu"), None)  # type: ignore[arg-type]
    alone = answer_predictor(loaded, 4, answers, 4000, scores, packed=True)
    short = [prompt[:12] for prompt in prompts_of(4)] * 3
    for _ in range(2):
        assert alone.predict(short)[0] == scores.predict(short)[0]
    assert len(searched) == 1  # of a model that is never sure it is given up
    scores = score_predictor(model, 0, answers, 4000, torch.device("cpu"))
    fresh = answer_predictor(loaded, 0, answers, 4000, scores, packed=True)
    long = [(prompt * 9)[:90] for prompt in prompts_of(0)]
    assert fresh.predict(long)[0] == scores.predict(long)[0]
    assert len(searched) == 1  # behind prompts that are long beside the tree


@pytest.mark.parametrize("short", [0, 1])
def test_a_window_counts_what_a_search_leaves_behind(
    short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows must fit it with padding and the branches that were gone into before."""
    answers = many(20)
    steps = search.STEPS_A_TOKEN * max(map(len, answers))
    prompts = [prompt[:90] for prompt in prompts_of(4)]
    window = 90 + steps - short
    model = prepare_model(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval())
    searched, plain = list[int](), search.search_answers

    def counted(*args: Any) -> list[int | None]:
        searched.append(len(args[1]))
        return plain(*args)

    monkeypatch.setattr("yelp_hpc.inference.predictor.search_answers", counted)
    scores = score_predictor(model, 4, answers, 300, torch.device("cpu"))
    loaded = Loaded(model, None, torch.device("cpu"), None)  # type: ignore[arg-type]
    alone = answer_predictor(loaded, 4, answers, 300, scores, packed=True)
    assert alone.predict(prompts) == (scores.predict(prompts)[0], None, None)
    assert searched == ([] if short else [len(prompts)])


def test_where_nothing_can_be_left_out_the_scores_answer() -> None:
    model, prompts = prepare_model(tiny("llama").eval()), prompts_of(4)
    for answers, packed in (([[7], [8], [9]], True), (FEW, False)):
        scores = score_predictor(model, 4, answers, 300, torch.device("cpu"))
        loaded = Loaded(model, None, torch.device("cpu"), None)  # type: ignore[arg-type]
        alone = answer_predictor(loaded, 4, answers, 300, scores, packed)
        assert alone.plan is scores.plan
        assert alone.predict(prompts) == (scores.predict(prompts)[0], None, None)
