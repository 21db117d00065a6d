"""What a generated answer means, and from when on it cannot mean anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_config
from yelp_hpc.inference.answers import answer_names, is_decided, parse_label
from yelp_hpc.task import YELP, TaskConfig

LABELS = {
    # a bare number is the label that the prompt asks for
    "0": 0,
    " 4": 4,
    "4.": 4,
    "4.0": 4,
    "**3**": 3,
    '"2"': 2,
    "(1)": 1,
    "3\n\nReview: 5 stars!": 3,
    "\n \n2\n": 2,
    "3 - the food was good": 3,
    "four": 4,
    "Zero.": 0,
    "Three, since the service was slow": 3,
    # after a cue
    "Output: 4": 4,
    "The rating is 3.": 3,
    "Label = 2": 2,
    "I would give it a 1": 1,
    "I'd give this place 4": 4,
    "Rating: **4**": 4,
    "Stars: 4": 3,
    # a unit makes it stars
    "4 stars": 3,
    "1 star": 0,
    "5-star": 4,
    "five-star review": 4,
    "Five stars": 4,
    "4★": 3,
    "4stars": 3,
    "4/5": 3,
    "4 / 5 stars": 3,
    "4 out of 5": 3,
    "three out of five stars": 2,
    "We waited 2 hours, so 3 stars": 2,
    "The review is worth 2 stars": 1,
    # drawn
    "★★★★": 3,
    "★★★☆☆": 2,
    "⭐⭐⭐⭐⭐": 4,
    "⭐️⭐️": 1,
}
NO_LABEL = [
    "",
    "   \n ",
    "I love this place",
    "We waited 2 hours",
    "someone told me",
    "great\n4",  # the answer's line is the first one
    "5",  # a label of 5 does not exist, and whether stars were meant is a guess
    "10",
    "-1",
    "0 stars",
    "6 stars",
    "7/5",
    "★★★★★★",
    "3.5",
    "3.5 stars",
    "3 and a half stars",
    "3½ stars",
    "3-4",
    "3 or 4",
    "3 to 4 stars",
    "three or four",
    "8/10",
    "3/4",
    "4 out of 10",
    "2019",
    "4th",
]


@pytest.mark.parametrize(("text", "label"), LABELS.items())
def test_answers_that_state_a_label(text: str, label: int) -> None:
    assert parse_label(text) == label


@pytest.mark.parametrize("text", NO_LABEL)
def test_answers_that_state_none(text: str) -> None:
    assert parse_label(text) is None


@pytest.mark.parametrize("text", ["4\n", "\n4\nReview", "I love it\n", "4 stars ", "so 4/5 or"])
def test_decided(text: str) -> None:
    assert is_decided(text)


@pytest.mark.parametrize("text", ["", "\n\n", "4", "4 ", "4 sta", "4 stars", "4/5", "I love it"])
def test_not_yet_decided(text: str) -> None:
    assert not is_decided(text)


@pytest.mark.parametrize("text", [*LABELS, *NO_LABEL])
@pytest.mark.parametrize("more", ["0", ".5", " stars", "/5", " out of 5", "s", "\n3", " or 2", "★"])
def test_a_decided_answer_keeps_its_label_whatever_follows(text: str, more: str) -> None:
    for end in range(len(text) + 1):
        if is_decided(text[:end]):
            assert parse_label(text[:end] + more) == parse_label(text[:end])
            assert parse_label(text) == parse_label(text[:end])


NEWS = TaskConfig(labels=("World", "Sports", "Business", "Sci/Tech"), noun="article")
INTENTS = TaskConfig(
    labels=("card_arrival", "card_about_to_expire", "card", "top_up_failed", "talk.politics.misc"),
    names=("card arrival", "expiring card", "cards", "failed top-up", "politics"),
)
LEVELS = TaskConfig(labels=("1", "2", "3"), names=("low", "middle", "high"), ordinal=True)
SPAM = TaskConfig(labels=("0", "1"), names=("ham", "spam"))
TENS = TaskConfig(labels=("10", "20", "30"), ordinal=True)
RATED = TaskConfig(labels=("bad", "good"), names=("1 star", "2 stars"), ordinal=True)
MARKS = TaskConfig(labels=("{}", "[a]", "**b**", "<i>", "#c", "`d`", "__e__", "-1", ":)"))
SCRIPTS = TaskConfig(labels=("खेल", "好", "caf\u00e9", "👍", "👍🏽", "می\u200cخواهم"))


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        (NEWS, " Sports", 1),
        (NEWS, "**sports**.\nReview: more", 1),
        (NEWS, "Sports, because of the match", 1),
        (NEWS, "Sportswear", None),
        (NEWS, "not Sports", None),
        (NEWS, "Sports or Business", None),
        (NEWS, "Sports/Business", None),
        (NEWS, "Sci/Tech", 3),
        (NEWS, "sci", 3),
        (NEWS, "S", None),
        (NEWS, "The category is Business", 2),
        (NEWS, "Answer: World", 0),
        (NEWS, "3", None),
        (NEWS, "three", None),
        (NEWS, "", None),
        (INTENTS, "card_arrival", 0),
        (INTENTS, "card", 2),
        (INTENTS, "card_a", None),
        (INTENTS, "card_ab", 1),
        (INTENTS, "expiring card", 1),
        (INTENTS, "talk.politics.misc", 4),
        (INTENTS, "talk.politics", 4),
        (INTENTS, "Politics", 4),
        (LEVELS, "2", 1),
        (LEVELS, "two", 1),
        (LEVELS, "3/3", 2),
        (LEVELS, "0", None),
        (LEVELS, "2 stars", 1),
        (LEVELS, "★★", None),
        (LEVELS, "2 - 3", None),
        (LEVELS, "2 to 3", None),
        (LEVELS, "2 and a half", None),
        (LEVELS, "2 out of 10", None),
        (LEVELS, "we waited 2 hours", None),
        (LEVELS, "middle", 1),
        (TENS, "1", None),
        (TENS, "20", 1),
        (TaskConfig(labels=("10", "2")), "1", None),
        (TaskConfig(labels=("1.5", "2.5"), ordinal=True), "1", None),
        (TaskConfig(labels=("1.5", "2.5"), ordinal=True), "1.", None),
        (TaskConfig(labels=("1. hot", "2. cold")), "1.", 0),
        (TaskConfig(labels=("room 10", "hall")), "room", 0),
        (RATED, "good", 1),
        (RATED, "2 stars", 1),
        (SPAM, "1", 1),
        (SPAM, "1.5", None),
        (SPAM, "one", None),
        (SPAM, "spam", 1),
        (SPAM, "1 star", 1),
        (TaskConfig(labels=("01", "1", "2"), ordinal=True), "1", 1),
        (TaskConfig(labels=("3", "2", "1"), ordinal=True), "three", 0),
        (TaskConfig(labels=("-1", "0", "1"), ordinal=True), "-1", 0),
        *((MARKS, label, i) for i, label in enumerate(MARKS.labels)),
        *((MARKS, f" {label}\nmore", i) for i, label in enumerate(MARKS.labels)),
        (MARKS, ": **b**", 2),
        (MARKS, "Answer: <i>", 3),
        (MARKS, "'-1'", 7),
        (MARKS, "b", None),
        *((SCRIPTS, label, i) for i, label in enumerate(SCRIPTS.labels)),
        (SCRIPTS, "खेलों", None),
        (SCRIPTS, "cafe\u0301", 2),
        (SCRIPTS, "CAFÉ.", 2),
        (SCRIPTS, "👍🏿", None),
        (SCRIPTS, "👍 because", 3),
    ],
)
def test_other_tasks_are_parsed_by_their_own_labels(
    task: TaskConfig, text: str, label: int | None
) -> None:
    assert parse_label(text, task) == label


def test_a_word_is_decided_with_its_line() -> None:
    assert not is_decided("card", INTENTS)
    assert is_decided("card\n", INTENTS)


def test_letter_case_counts_where_labels_differ_in_nothing_else() -> None:
    task = TaskConfig(labels=("a", "A", "b"))
    assert [parse_label(text, task) for text in ("a", "A", "B")] == [0, 1, 2]


def test_columns_say_what_a_mode_answers() -> None:
    scored = ["answer", "name", *(f"p_{label}" for label in YELP.labels), "expected"]
    columns = {"score": scored, "generate": [*scored, "generated"], "answer": scored[:2]}
    for mode, names in columns.items():
        config = tiny_config(Path("m"), infer={"mode": mode})
        assert answer_names(config, "tuned_") == [f"tuned_{name}" for name in names]
