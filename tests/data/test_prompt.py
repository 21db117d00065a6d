"""Prompts: cut inside the review only, one last token an answer."""

from __future__ import annotations

import pytest

from yelp_hpc.config import YELP, PromptConfig
from yelp_hpc.data.prompt import Prompt, common_prefix
from yelp_hpc.errors import RequestError


def characters(texts: list[str]) -> list[list[int]]:
    return [[1, *map(ord, text)] for text in texts]


def pairs(texts: list[str]) -> list[list[int]]:
    """Merges a last digit with the space before it, as some tokenizers do."""
    return [[*map(ord, text[:-2]), 1000 + ord(text[-1])] for text in texts]


TEMPLATE = PromptConfig().template


def test_the_prompt_is_the_reports() -> None:
    prompt = Prompt(TEMPLATE, YELP.labels, characters, 1024)
    assert prompt.text("Nice.", "3") == (
        "Instruction: The following is a user's review of a merchant. Please judge and output the "
        "corresponding five-star rating for this review.\nReview: Nice.\nOutput: 3"
    )


@pytest.mark.parametrize("encode", [characters, pairs])
def test_ids_end_where_the_answers_part(encode) -> None:  # type: ignore[no-untyped-def]
    prompt = Prompt(TEMPLATE, YELP.labels, encode, 1024)
    (ids,), _ = prompt.fit(["Fine."])
    for label, last in zip(YELP.labels, prompt.label_ids, strict=True):
        assert encode([prompt.text("Fine.", label)])[0] == [*ids, last]


def test_only_the_review_is_cut() -> None:
    prompt = Prompt(TEMPLATE, YELP.labels, characters, 200)
    ids, used = prompt.fit(["short", "long " * 500])
    assert used[0] == "short"
    assert ("long " * 500).startswith(used[1])
    assert 180 < len(ids[1]) <= 198
    text = "".join(map(chr, ids[1][1:]))
    assert text == prompt.text(used[1])
    assert text.endswith("\nOutput: ")


def test_a_cutoff_below_the_template_is_refused() -> None:
    with pytest.raises(RequestError, match=r"data\.cutoff"):
        Prompt(TEMPLATE, YELP.labels, characters, 60)


def test_answers_of_several_tokens_are_refused() -> None:
    with pytest.raises(RequestError, match="exactly one last token"):
        Prompt(TEMPLATE, ("bad", "poor", "fine", "good", "great"), characters, 1024)


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([]) == 0
