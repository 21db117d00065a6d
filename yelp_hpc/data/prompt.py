"""Reviews → token ids: the prompt up to the answer, cut inside the review only.

A prompt is tokenised whole, together with an answer, exactly as the tokenizer would see the text.
The five answers must share every token but the last one (for most tokenizers `Output:`, a space
and then the digit): the prompt ends where they part, and five logits at its last position decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yelp_hpc.errors import RequestError

Encode = Callable[[list[str]], list[list[int]]]
"""Texts → token ids with the tokenizer's own special tokens."""


@dataclass(frozen=True)
class Prompt:
    """A template bound to a tokenizer.

    Args:
        template: text that holds `{review}` once and ends with `{label}`.
        labels: the answers, in the order of the classes.
        encode: texts → token ids.
        cutoff: longest sequence in tokens, answer and end-of-sequence token included.

    Raises:
        RequestError: the answers do not differ in exactly one last token, or the template alone
            is longer than the cutoff.
    """

    template: str
    labels: tuple[str, ...]
    encode: Encode
    cutoff: int

    def __post_init__(self) -> None:
        ids = self.encode([self.text("", label) for label in self.labels])
        shared = common_prefix(ids)
        if any(len(one) != shared + 1 for one in ids):
            raise RequestError(
                f"the answers {', '.join(self.labels)} do not differ in exactly one last token "
                f"with this tokenizer (ids after the shared part: {[i[shared:] for i in ids]}); "
                "choose another prompt.template, such as one with a space before {label}"
            )
        if shared + 2 > self.cutoff:
            raise RequestError(
                f"data.cutoff is {self.cutoff} tokens, but the prompt without a review already "
                f"needs {shared + 2}; raise data.cutoff or shorten prompt.template"
            )

    def text(self, review: str, label: str = "") -> str:
        """The prompt of a review, followed by `label`."""
        head, tail = self.template.split("{review}")
        return head + review + tail.removesuffix("{label}") + label

    @property
    def label_ids(self) -> list[int]:
        """The token that each answer ends with, one a class."""
        return [one[-1] for one in self.encode([self.text("", label) for label in self.labels])]

    def fit(self, reviews: Sequence[str]) -> tuple[list[list[int]], list[str]]:
        """Token ids of each prompt up to the answer, and the reviews as they were used.

        A prompt has at most `cutoff - 2` tokens (the answer and the end of the sequence follow
        in training). An over-long review loses its end; the rest of the prompt is never cut.
        """
        last = self.label_ids[0]
        used = list(reviews)
        ids = self.encode([self.text(review, self.labels[0]) for review in reviews])
        for i, one in enumerate(ids):
            while len(one) - 1 > self.cutoff - 2:
                used[i] = self._shorter(used[i], len(one) - 1)
                one = self.encode([self.text(used[i], self.labels[0])])[0]
            if one[-1] != last:
                raise RequestError(
                    "the tokenizer merges the answer with the text of a review; "
                    "choose another prompt.template"
                )
            ids[i] = one[:-1]
        return ids, used

    def _shorter(self, review: str, tokens: int) -> str:
        """Drop about as many characters as there are tokens too many, at least one."""
        excess = tokens - (self.cutoff - 2)
        keep = int(len(review) * (1 - excess / tokens))
        return review[: min(keep, len(review) - 1)]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all `sequences` share; 0 for no sequence."""
    if not sequences:
        return 0
    low, high = min(map(list, sequences)), max(map(list, sequences))
    shared = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        shared += 1
    return shared
