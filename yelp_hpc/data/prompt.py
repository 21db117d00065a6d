"""Texts → token ids: the prompt up to the answer, cut inside the text only.

A prompt is tokenised whole, together with an answer, exactly as the tokenizer would see the text.
It ends where the answers' tokens part; what follows is each answer's own: for most tokenizers one
token of a digit, or a few of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from yelp_hpc.errors import RequestError

Encode = Callable[[list[str]], list[list[int]]]
"""Texts → token ids with the tokenizer's own special tokens."""
CHARACTERS_PER_TOKEN = 32
"""More than prose has in any tokenizer; only runs of spaces and the like have longer tokens."""


@dataclass(frozen=True)
class Prompt:
    """A template bound to a tokenizer.

    Args:
        template: text that holds `{review}` once and ends with `{label}`.
        labels: the answers, in the order of the classes.
        encode: texts → token ids.
        cutoff: longest sequence in tokens, answer and end-of-sequence token included.

    Raises:
        RequestError: answers are the same tokens, or the template alone is longer than the cutoff.
    """

    template: str
    labels: tuple[str, ...]
    encode: Encode
    cutoff: int

    def __post_init__(self) -> None:
        owners: dict[tuple[int, ...], str] = {}
        same = []
        for label, answer in zip(self.labels, self.answers, strict=True):
            if (other := owners.setdefault(tuple(answer), label)) != label:
                same.append(f"{other!r} and {label!r}")
        if same:
            raise RequestError(
                f"the labels {', '.join(same[:10])} are the same tokens with this tokenizer; "
                "choose other task.labels"
            )
        alone = self.encode([self.text("", self.labels[0])])[0]
        needed = len(alone) - len(self.answers[0]) + 1 + self._room
        if needed > self.cutoff:
            raise RequestError(
                f"data.cutoff is {self.cutoff} tokens, but the prompt without a review already "
                f"needs {needed - 1}; raise data.cutoff or shorten prompt.template"
            )

    @cached_property
    def whole(self) -> list[list[int]]:
        """The tokens of a short text's prompt with each answer."""
        return self.encode([self.text("a", label) for label in self.labels])

    @cached_property
    def _shared(self) -> int:
        return common_prefix(self.whole)

    @cached_property
    def _room(self) -> int:
        """Tokens behind a prompt: the longest answer and the end of the sequence."""
        return self.longest_answer + 1

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.answers))

    @cached_property
    def answers(self) -> list[list[int]]:
        """The tokens of each answer behind the prompt, in the order of the classes."""
        return [one[self._shared :] for one in self.whole]

    @property
    def label_ids(self) -> list[int] | list[list[int]]:
        """The answers as tokens.json holds them: numbers where every answer is one token."""
        if all(len(answer) == 1 for answer in self.answers):
            return [answer[0] for answer in self.answers]
        return self.answers

    @property
    def end_scored(self) -> bool:
        """Whether one answer's tokens are the beginning of another's."""
        begun = [tuple(a[:n]) for a in self.answers for n in range(len(a))]
        return not {*begun}.isdisjoint(map(tuple, self.answers))

    @cached_property
    def lead(self) -> list[int]:
        """The prompt's last tokens that are the beginning of every answer's text; mostly none.

        Not always of whole letters: two of one script may begin with the same byte.
        """
        if len({label.encode()[:1] for label in self.labels}) > 1:
            return []
        alone, *others = self.encode([self.text("a", text) for text in ("", "A", "z", "0", "é")])
        one = self.whole[0]
        begins = max(common_prefix([one, alone]), common_prefix([*self.whole, *others]))
        return one[begins : self._shared]

    def prefix(self, common: Sequence[int], shortest: int) -> list[int]:
        """The tokens that prompts begin with before any token of a text.

        `common`: what all of them begin with; `shortest`: tokens of the shortest one.
        """
        probes = self.encode([self.text(text) for text in ("a", "Z", "0", "é")])
        return list(common[: max(0, min(common_prefix(probes), shortest - 1))])

    def text(self, review: str, label: str = "") -> str:
        """The prompt of a review, followed by `label`."""
        head, tail = self.template.split("{review}")
        return head + review + tail.removesuffix("{label}") + label

    def fit(self, reviews: Sequence[str]) -> tuple[list[list[int]], list[str]]:
        """Token ids of each prompt up to the answer, and the texts as they were used.

        A prompt leaves room for the longest answer and the end of the sequence, which follow in
        training. An over-long text loses its end; the rest of the prompt is never cut. A text of
        over `CHARACTERS_PER_TOKEN` characters for each token of the cutoff is cut there first.
        """
        answer, most = self.answers[0], self.cutoff - self._room
        used = [review[: self.cutoff * CHARACTERS_PER_TOKEN] for review in reviews]
        ids = self.encode([self.text(review, self.labels[0]) for review in used])
        over = list(range(len(ids)))
        while over := [i for i in over if len(ids[i]) - len(answer) > most]:
            for i in over:
                used[i] = self._shorter(used[i], len(ids[i]) - len(answer))
            again = self.encode([self.text(used[i], self.labels[0]) for i in over])
            for i, one in zip(over, again, strict=True):
                ids[i] = one
        for i, one in enumerate(ids):
            ids[i] = self._before_answer(one, 0)
        for end in {f"a{text[-1:]}" for text in used} - self._ends if self._openers else ():
            found = self.encode([self.text(end, self.labels[place]) for place in self._openers])
            pairs = zip(found, self._openers, strict=True)
            if len({tuple(self._before_answer(one, place)) for one, place in pairs}) > 1:
                raise self._merged()
            self._ends.add(end)
        return ids, used

    def _before_answer(self, ids: list[int], place: int) -> list[int]:
        whole = [*self.lead, *self.answers[place]]
        if ids[len(ids) - len(whole) :] != whole:
            raise self._merged()
        return ids[: len(ids) - len(self.answers[place])]

    def _merged(self) -> RequestError:
        return RequestError(
            "the tokenizer merges the answer with the text of a review; "
            "choose another prompt.template"
        )

    @cached_property
    def _ends(self) -> set[str]:
        """Ends of texts behind which every answer was found to be the same tokens."""
        return set()

    @cached_property
    def _openers(self) -> list[int]:
        """Answers of other first tokens, 50 at most, where no word keeps them from the text."""
        if any(map(str.isalnum, self.template.split("{review}")[1].removesuffix("{label}"))):
            return []
        firsts = {tuple(answer[:1]): i for i, answer in enumerate(self.answers)}
        return list(firsts.values())[:50]

    def _shorter(self, review: str, tokens: int) -> str:
        """Drop about as many characters as there are tokens too many, at least one."""
        excess = tokens - (self.cutoff - self._room)
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
