"""The answers of a task as token ids, and the tree that they form where they begin alike.

Reads the content of `prepare/tokens.json`; pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def answers_of(tokens: Mapping[str, Any]) -> list[list[int]]:
    """The tokens of each answer behind the prompt, in the order of the classes.

    `tokens`: the content of tokens.json, whose `label_ids` are numbers where every answer is one
    token.
    """
    return [[ids] if isinstance(ids, int) else list(ids) for ids in tokens["label_ids"]]


def scored_answers(tokens: Mapping[str, Any]) -> list[list[int]]:
    """The tokens of each answer that its score counts.

    The end of the answer counts too (`end_scored`) where one answer is the beginning of another:
    without it the shorter one could never lose.
    """
    end = [int(tokens["eos_id"])] if tokens.get("end_scored") else []
    return [answer + end for answer in answers_of(tokens)]


@dataclass(frozen=True)
class AnswerTree:
    """Answers of one task, merged where they begin alike; nodes in depth-first order."""

    tokens: tuple[int, ...]
    """Of each inner node; none where every answer is one token."""
    parents: tuple[int, ...]
    """The node before each inner node, always an earlier one; -1 is the prompt's last token."""
    steps: tuple[tuple[tuple[int, int], ...], ...]
    """Of each answer: `(node that predicts it, token)` for every token."""

    @property
    def rows_per_prompt(self) -> int:
        """Positions whose logits a prompt needs: its last one and every inner node."""
        return 1 + len(self.tokens)


def answer_tree(answers: Sequence[Sequence[int]]) -> AnswerTree:
    """The tree of the answers' tokens; the last token of an answer needs no node.

    Raises:
        ValueError: an answer has no token, or is the beginning of another (or the same).
    """
    texts = [tuple(answer) for answer in answers]
    inner = {text[:end] for text in texts for end in range(1, len(text))}
    if not all(texts) or len({*texts}) < len(texts) or inner & {*texts}:
        raise ValueError("an answer is empty, twice there or the beginning of another")
    order = sorted(inner)  # depth first: a beginning stands before what it begins
    place = {(): -1} | {text: i for i, text in enumerate(order)}
    return AnswerTree(
        tokens=tuple(text[-1] for text in order),
        parents=tuple(place[text[:-1]] for text in order),
        steps=tuple(
            tuple((place[text[:end]], text[end]) for end in range(len(text))) for text in texts
        ),
    )
