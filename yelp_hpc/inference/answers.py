"""The label that a generated answer states, or None: documented rules, no guessing.

The prompt asks for a label, 0 to 4; a model may answer with the label, in words, or in stars (1 to
5, label = stars − 1). Pure: text in, label out.

Only the answer's line counts: the first line that is not blank (a model that runs on writes the
next review after it). In that line the first number that is *an answer* decides; digits and the
words zero to ten are numbers. A number is an answer when

1. a unit follows it: "4 stars", "five-star", "4★", "4/5", "4 out of 5": stars, so label 3, 4, 3, …;
2. it opens the line ("4", "**4**", "4.", "4 - great", "Four") or follows an answer's cue ("Output:
   4", "The rating is 4", "I would give it a 4"): a label, for the prompt asked for one; after the
   cue "stars" ("Stars: 4") stars.

Stars may also be drawn: "★★★★", "★★★★☆", "⭐⭐⭐⭐" are 4 stars. Any other number says something
else ("we waited 2 hours" is no answer) and is passed over.

The answer is None (unparsed, which the metrics count) when there is none, or when the first one is
not one label: out of range (a label of 5, 0 stars, 7/5), negative, between two ("3.5 stars", "3-4",
"3 or 4") or on another scale ("8/10", "3/4"). "4.0" is 4.
"""

from __future__ import annotations

import re

from yelp_hpc.config import YELP, TaskConfig

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# "4stars" holds a number, "4th" does not.
_NUMBER = rf"(?:\d+(?:[.,]\d+)?(?!\d|(?!stars?\b)[a-z])|(?:{'|'.join(_WORDS)})\b)"
_QUOTES = r"[\s\"'“”‘’()\[\]{}*_`]*"

# A number (not inside a word or another number), or a run of drawn stars.
_CANDIDATE = re.compile(
    rf"(?<![\w.,/])(?P<number>{_NUMBER})|(?P<drawn>[★⭐](?:\ufe0f?\s?[★⭐])*)", re.IGNORECASE
)
_OPENS_LINE = re.compile(r"[\s\"'“”‘’()\[\]{}*_`#>:=.]*[-−]?", re.IGNORECASE)
_AFTER_CUE = re.compile(
    r"\b(?:output|answer|label|class|category|rating|rated?|score|(?P<stars>stars?)"
    r"|(?:give|gives|gave|deserves|earns)(?:\s+(?:it|this|them|(?:the|this)\s+\w+))?)"
    r"(?:\s+(?:is|was|of|as|at|be|(?:would|will|should)\s+be))?"
    rf"\s*(?:[:=→]|->)?{_QUOTES}(?:an?\s+)?{_QUOTES}[-−]?$",
    re.IGNORECASE,
)
_STARS_UNIT = re.compile(rf"{_QUOTES}-?\s*(?:stars?\b|[★⭐])", re.IGNORECASE)
_SCALE_UNIT = re.compile(rf"\s*(?:/|out\s+of)\s*(?P<scale>{_NUMBER})", re.IGNORECASE)
_SECOND = re.compile(rf"\s*(?:[-–—~]|\bto\b|\bor\b)\s*{_NUMBER}", re.IGNORECASE)
_MINUS = re.compile(r"(?<!\w)[-−]$")
_HALF = re.compile(r"\s*(?:½|and\s+a\s+half\b|1/2\b)", re.IGNORECASE)


def answer_line(text: str) -> str:
    """The first line of `text` that is not blank, or "" when all are."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def parse_label(text: str, task: TaskConfig = YELP) -> int | None:
    """The label 0 to 4 that `text` states by the rules above; None when it states none."""
    return _first_answer(answer_line(text))[0]


def is_decided(text: str, task: TaskConfig = YELP) -> bool:
    """True when no continuation of `text` can change its label.

    That is so when the answer's line has ended, or when its first answer is a number whose unit is
    over ("4 stars " – but not "4", which may become "4 stars", nor "4/5", which may become "4/50").
    """
    begun = text.lstrip()
    if not begun:
        return False
    if len(begun.splitlines()) > 1 or begun.splitlines(keepends=True)[0] != begun.splitlines()[0]:
        return True
    _, end = _first_answer(begun)
    return end is not None and end < len(begun) and begun[end].isspace()


def _first_answer(line: str) -> tuple[int | None, int | None]:
    """`(label, end)` of the line's first answer; `end`: where its unit ends, if it has one."""
    for found in _CANDIDATE.finditer(line):
        before, after = line[: found.start()], line[found.end() :]
        if found["drawn"]:
            count = len(re.findall("[★⭐]", found["drawn"]))
            return (count - 1 if count <= 5 else None), None
        second = _SECOND.match(after)
        tail = after[second.end() :] if second else after
        stars, scale = _STARS_UNIT.match(tail), _SCALE_UNIT.match(tail)
        cue = _AFTER_CUE.search(before)
        if not (stars or scale or cue or _OPENS_LINE.fullmatch(before)):
            continue
        unit = stars or scale
        end = len(line) - len(tail) + unit.end() if unit else None
        negative = _MINUS.search(before)
        value = _value(found["number"])
        if second or negative or _HALF.match(after) or value is None:
            return None, end
        if scale and _value(scale["scale"]) != 5:
            return None, end
        label = value - 1 if unit or (cue and cue["stars"]) else value
        return (label if 0 <= label <= 4 else None), end
    return None, None


def _value(number: str) -> int | None:
    """The whole number that a numeral or word stands for; None for a fraction."""
    if number.lower() in _WORDS:
        return _WORDS.index(number.lower())
    value = float(number.replace(",", "."))
    return int(value) if value.is_integer() else None
