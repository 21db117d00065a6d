"""Prompts: cut inside the text only, ended where the answers part."""

from __future__ import annotations

import re

import pytest

from yelp_hpc.config import PromptConfig
from yelp_hpc.data.answer_tree import answer_tree, scored_answers
from yelp_hpc.data.prompt import Prompt, common_prefix
from yelp_hpc.errors import RequestError
from yelp_hpc.task import YELP


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


def test_what_prompts_share_ends_before_the_first_text_and_within_the_shortest() -> None:
    prompt = Prompt(TEMPLATE, YELP.labels, characters, 1024)
    (ids,), _ = prompt.fit(["aaa"])
    shared = prompt.prefix(ids, len(ids))
    assert prompt.encode([prompt.text("")])[0][: len(shared)] == shared == ids[: len(shared)]
    assert prompt.text("")[len(shared) - 1 :].split() == ["Output:"]
    assert prompt.prefix(ids, 5) == ids[:4]


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


@pytest.mark.parametrize("encode", [characters, pairs])
def test_answers_of_several_tokens_follow_the_prompt(encode) -> None:  # type: ignore[no-untyped-def]
    labels = ("bad", "poor", "fine", "good", "great")
    prompt = Prompt(TEMPLATE, labels, encode, 200)
    ids, used = prompt.fit(["Fine.", "long " * 500])
    assert used[0] == "Fine."
    for text, one in zip(used, ids, strict=True):
        assert len(one) + max(map(len, prompt.answers)) + 1 <= 200
        for label, answer in zip(labels, prompt.answers, strict=True):
            assert encode([prompt.text(text, label)])[0] == [*one, *answer]
    assert prompt.label_ids == prompt.answers
    assert not prompt.end_scored


def test_the_end_counts_where_one_label_begins_another() -> None:
    prompt = Prompt(TEMPLATE, ("card", "card payment", "loan"), characters, 1024)
    assert prompt.end_scored
    tokens = {"label_ids": prompt.label_ids, "eos_id": 2, "end_scored": True}
    assert answer_tree(scored_answers(tokens)).tokens
    with pytest.raises(ValueError, match="beginning"):
        answer_tree(prompt.answers)


def test_what_all_labels_begin_with_is_part_of_the_prompt_and_of_the_answer() -> None:
    prompt = Prompt(TEMPLATE, ("comp.os", "comp.graphics"), characters, 1024)
    assert "".join(map(chr, prompt.lead)) == "comp."
    (ids,), _ = prompt.fit(["Fine."])
    assert ids[-5:] == prompt.lead
    assert Prompt(TEMPLATE, ("a", "b"), characters, 1024).lead == []


def of_bytes(texts: list[str]) -> list[list[int]]:
    return [[1000, *text.encode()] for text in texts]


@pytest.mark.parametrize("labels", [("好", "差"), ("שלום", "עולם"), ("😀", "😁"), ("нет", "да")])
def test_a_byte_that_labels_of_one_script_share_is_part_of_the_answer(
    labels: tuple[str, ...],
) -> None:
    prompt = Prompt(TEMPLATE, labels, of_bytes, 1024)
    assert prompt.lead
    for label, answer in zip(labels, prompt.answers, strict=True):
        assert bytes([*prompt.lead, *answer]).decode() == label


def test_labels_that_are_the_same_tokens_are_refused() -> None:
    def folded(texts: list[str]) -> list[list[int]]:
        return characters([text.lower() for text in texts])

    with pytest.raises(RequestError) as error:
        Prompt(TEMPLATE, ("other", "Sport", "sport"), folded, 1024)
    assert str(error.value) == (
        "the labels 'Sport' and 'sport' are the same tokens with this tokenizer; choose other "
        "task.labels"
    )


def test_an_answer_that_melts_into_the_text_is_refused() -> None:
    def melting(texts: list[str]) -> list[list[int]]:
        return [[*one[:-2], 9999] if "x" in text else one
                for text, one in zip(texts, characters(texts), strict=True)]  # fmt: skip

    with pytest.raises(RequestError) as error:
        Prompt("{review} {label}", ("1", "2"), melting, 64).fit(["a", "x"])
    assert str(error.value) == (
        "the tokenizer merges the answer with the text of a review; choose another prompt.template"
    )


@pytest.mark.parametrize("labels", [("1", "no"), ("no", "1"), ("no", "yes")])
def test_any_answer_that_melts_into_the_text_is_refused(labels: tuple[str, ...]) -> None:
    """Not the first alone: a space that a text ends in becomes one token with a letter."""

    def melting(texts: list[str]) -> list[list[int]]:
        return characters([re.sub(" ([a-z])", lambda m: chr(1000 + ord(m[1])), t) for t in texts])

    Prompt("{review}{label}", labels, melting, 64).fit(["a", "b."])
    with pytest.raises(RequestError, match="merges the answer with the text"):
        Prompt("{review}{label}", labels, melting, 64).fit(["a", "b "])
    Prompt("{review} is{label}", labels, melting, 64).fit(["a", "b "])


def test_a_huge_text_is_cut_before_it_is_tokenised() -> None:
    seen: list[int] = []

    def counted(texts: list[str]) -> list[list[int]]:
        seen.append(max(map(len, texts)))
        return characters(texts)

    Prompt(TEMPLATE, YELP.labels, counted, 256).fit(["x" * 8_000_000])
    assert max(seen) < 10_000


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[1], [2]]) == 0
    assert common_prefix([]) == 0
    assert common_prefix([[1, 2]]) == common_prefix([[1, 2], [1, 2]]) == 2
    assert common_prefix([(1, 9), [1, 2], [1, 9, 3]]) == 1


def test_the_cutoff_counts_the_answer_and_the_end() -> None:
    """The least that is accepted, and the longest prompt that stays whole, to the token."""
    template = "ab {review} {label}"
    alone = len("ab  ") + 1  # and the first special token
    assert Prompt(template, ("1", "2"), characters, alone + 3).fit([""])[1] == [""]
    with pytest.raises(RequestError) as error:
        Prompt(template, ("1", "2"), characters, alone + 2)
    assert str(error.value) == (
        f"data.cutoff is {alone + 2} tokens, but the prompt without a review already needs "
        f"{alone + 2}; raise data.cutoff or shorten prompt.template"
    )
    prompt = Prompt(template, ("1", "2"), characters, alone + 10 + 2)
    ids, used = prompt.fit(["x" * 10, "y" * 11])
    assert used == ["x" * 10, "y" * 10]
    assert [len(one) for one in ids] == [alone + 10, alone + 10]


def test_a_text_is_cut_to_what_a_cutoff_of_tokens_can_hold_at_most() -> None:
    def runs(texts: list[str]) -> list[list[int]]:
        """Sixteen characters x are one token."""
        return characters([text.replace("x" * 16, "\u2588") for text in texts])

    (ids,), (used,) = Prompt("{review} {label}", ("1", "2"), runs, 64).fit(["x" * 100_000])
    assert len(ids) <= 64 - 2
    assert 50 * 16 < len(used) <= 64 * 32


def test_a_text_loses_about_its_share_of_the_tokens_too_many() -> None:
    prompt = Prompt("{review} {label}", ("1", "2"), characters, 102)
    assert len(prompt._shorter("x" * 1000, 200)) == 500
    assert len(prompt._shorter("x" * 1000, 101)) == 990
    assert len(prompt._shorter("xyz", 100)) == 2  # at least one, or it would never end
    assert len(prompt._shorter("x" * 60_000, 100_000)) == 60
