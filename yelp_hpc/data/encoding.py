"""Texts → token ids by a tokenizer, with what its special tokens are settled once.

A special token that the template spells is that token. One that a review spells stays the letters
it is made of: no text of a data set may end a sequence or open a role. What the tokenizer puts
behind a text (an end of sequence, a separator) is left off, because the answer follows there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from yelp_hpc.errors import RequestError


class Encoder:
    """`encode` of a `Prompt`: whole texts of one template → token ids."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.head, self.tail = template.removesuffix("{label}").split("{review}")
        self.special = special_tokens(tokenizer)
        self._before, self._behind = added_tokens(tokenizer)
        own = [token for token in self.special if token in self.head or token in self.tail]
        longest_first = sorted(own, key=len, reverse=True)
        self._own = re.compile("|".join(map(re.escape, longest_first))) if own else None
        self._plainly = encodes_plainly(tokenizer)
        self._marks = set(map(tokenizer.convert_tokens_to_ids, filter(self._is_mark, self.special)))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without what the tokenizer puts behind.

        Raises:
            RequestError: a review's special tokens cannot be told from the template's.
        """
        found = []
        for text, ids in zip(texts, self._ids(texts), strict=True):
            inner = text[len(self.head) :].rpartition(self.tail)[0] if self.tail else ""
            spelled = self.spelled(inner if self.tail else text[len(self.head) :])
            found.append(self._spelled_out(text) if spelled else self._without_end(ids))
        return found

    def check_answers(self, labels: Sequence[str], whole: Sequence[Sequence[int]]) -> None:
        """Check that no answer holds a special token: no letter of it could be read back.

        One that ends a sequence is the door's to refuse. `whole`: the tokens of a prompt with each
        of `labels`.

        Raises:
            RequestError: some do.
        """
        ids = set(map(self.tokenizer.convert_tokens_to_ids, self.special))
        ids -= {self.tokenizer.unk_token_id, self.tokenizer.eos_token_id}
        plain = sum(i in ids for i in self([f"{self.head}a{self.tail}A"])[0])
        pairs = zip(labels, whole, strict=True)
        if odd := [label for label, one in pairs if sum(i in ids for i in one) != plain]:
            raise RequestError(
                f"this tokenizer reads special tokens in task.labels ({', '.join(odd[:10])}): "
                "choose others, and name in task.values what stands in the data"
            )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """What the tokenizer makes of whole texts."""
        if self._plainly:
            self.tokenizer("a")  # sets its backend to what a plain call asks of it
            # the same without each token's place in the text, which nobody reads here
            return [one.ids for one in self.tokenizer.backend_tokenizer.encode_batch_fast(texts)]
        return [list(ids) for ids in self.tokenizer(texts)["input_ids"]]

    def _is_mark(self, token: str) -> bool:
        """Whether a special token would end a text or open a role in it.

        Any text may be unknown, and `!`, say, is often named for padding: in a text it is itself.
        """
        if token == self.tokenizer.eos_token:
            return True
        return token != self.tokenizer.unk_token and bool(set(token) & set("<[{|"))

    def spelled(self, review: str) -> list[str]:
        """The special tokens whose letters stand in a review."""
        return [token for token in self.special if token in review]

    def _without_end(self, ids: list[int]) -> list[int]:
        count = len(self._behind)
        return ids[:-count] if count and ids[-count:] == self._behind else ids

    def _spelled_out(self, text: str) -> list[int]:
        plain = f"{self.head}a b{self.tail}"
        known = self._without_end(list(self.tokenizer(plain)["input_ids"]))
        if self._own is None:
            ids = self.tokenizer(text, split_special_tokens=True)["input_ids"]
            ids = self._without_end(list(ids))
        else:
            ids = self._pieces(text)
        apart = self._own is None or self._pieces(plain) == known
        # a vocabulary of whole words or pieces may hold a special token as one of them
        kept = sum(i in self._marks for i in ids) == sum(i in self._marks for i in known)
        if not apart or not kept:
            beside = " beside those of prompt.template" if self._own else ""
            raise RequestError(
                f"a review spells the special token {self.spelled(text)[0]}, which this tokenizer "
                f"cannot take as text{beside}; leave the review out "
                f"({text[len(self.head) :][:40]!r}…)"
                + (", or the special tokens out of the template" if self._own else "")
            )
        return ids

    def _pieces(self, text: str) -> list[int]:
        """Ids of `text`, where only the template's own special tokens are tokens."""
        assert self._own is not None
        rest = text[len(self.head) :]
        cut = rest.rfind(self.tail) if self.tail else len(rest)
        ids = list(self._before)
        pending = ""
        for part, inside in ((self.head, False), (rest[:cut], True), (rest[cut:], False)):
            place = 0
            for match in [] if inside else self._own.finditer(part):
                ids += self._plain(pending + part[place : match.start()])
                ids.append(int(self.tokenizer.convert_tokens_to_ids(match[0])))
                pending, place = "", match.end()
            pending += part[place:]
        return ids + self._plain(pending)

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        options = {"split_special_tokens": True, "add_special_tokens": False}
        return list(self.tokenizer(text, **options)["input_ids"])


def special_tokens(tokenizer: Any) -> list[str]:
    """What a tokenizer takes for special wherever it stands in a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    known = [token.content for token in added if getattr(token, "special", False)]
    return [token for token in dict.fromkeys([*known, *tokenizer.all_special_tokens]) if token]


def encodes_plainly(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer is one of its Rust backend and nothing else."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name)
        for name in ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
    )


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind every text."""
    whole = list(tokenizer("a b")["input_ids"])
    bare = list(tokenizer("a b", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def check_ids(ids: Sequence[int], rows: int, what: str) -> None:
    """Check that every token of `what` has a row in the embedding.

    Raises:
        RequestError: one has none.
    """
    if ids and max(ids) >= rows:
        raise RequestError(
            f"{what} has token {max(ids)}, but the model's embedding has {rows} rows: tokenizer "
            "and model do not belong together"
        )
