"""The label that a generated answer states, or None: documented rules, no guessing.

Pure: text in, class out. Only the answer's line counts: the first line that is not blank (a model
that runs on writes the next text after it).

**Labels that are words.** The line, or what follows an answer's cue in its beginning ("Answer:
sports", "The category is sports"), without quotes and Markdown around it, must

1. be a label, or a name of `task.names`; letter case counts only where labels differ in nothing
   else; or
2. open with one, of several the longest, before something that no word goes on with ("sports,
   because …"); not where a second one follows as a choice ("sports or business"); or
3. be the beginning of exactly one label ("card arri", cut by `infer.max_new_tokens`), which cuts no
   number in two ("1" of a label 10 or 1.5).

**Labels that are whole numbers, of an ordinal task** (the prompt asks for a label, 0 to 4; a model
may answer with the label, in words, or, where the task's names are stars, in stars). In the line
the first number that is *an answer* decides; digits and the words zero to ten are numbers. A
number is an answer when

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
import unicodedata
from functools import lru_cache

from yelp_hpc.config import Config
from yelp_hpc.task import YELP, TaskConfig, label_text

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
# What may stand around a label that is a word, and what makes a longer word or a choice of it.
_AROUND = " \t\"'“”‘’`*_()[]{}<>#"
_CUE_ENDS = " \t:=>→"
_WORD_CUE = re.compile(
    r"[\s\"'“”‘’*_`#>]*(?:(?:the|this|its?)\s+)?(?:\w+\s+)?"
    r"(?:output|answer|label|class|category|topic|intent|sentiment)"
    r"(?:\s+(?:is|was|of|as|would\s+be|should\s+be)\b|\s*[:=→]|\s*->)+",
    re.IGNORECASE,
)
_NUMBER_ENDS, _NUMBER_GOES_ON = re.compile(r"\d[.,]?$"), re.compile(r"[.,]?\d")
_WORD_GOES_ON = re.compile(r"\w|[.,:/'’&_-]\w")
_JOINED = "\u200c\u200d\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_CHOICE = re.compile(r"[\"'”’`*_]*\s*(?:,?\s*\b(?:or|and)\b|[/|,&+])\s*[\"'“‘`*_]*", re.IGNORECASE)
_HALF = re.compile(r"\s*(?:½|and\s+a\s+half\b|1/2\b)", re.IGNORECASE)


def answer_names(config: Config, prefix: str = "") -> list[str]:
    """The names of the columns that say what a model answered.

    `answer` (a label; null when unparsed), `name` (for people), `p_LABEL` for each label (null in
    generate mode), `expected` where the task is ordinal, `generated` (what the model wrote) in
    generate mode. In answer mode the first two are all.
    """
    task = config.task
    if config.infer.mode == "answer":
        return [f"{prefix}answer", f"{prefix}name"]
    names = ["answer", "name", *(f"p_{label}" for label in task.labels)]
    names += ["expected"] * task.ordinal + ["generated"] * (config.infer.mode == "generate")
    return [f"{prefix}{name}" for name in names]


def answer_line(text: str) -> str:
    """The first line of `text` that is not blank, or "" when all are."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def parse_label(text: str, task: TaskConfig = YELP) -> int | None:
    """The class that `text` states by the rules above; None when it states none."""
    line = answer_line(text)
    if not _numeric(task):
        return _stated(line, task)
    if (found := _first_answer(line, task)) is not None:
        return found[0]
    return _stated(line, task) if task.stars is None else None


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
    if not _numeric(task):
        return False
    _, end = _first_answer(begun, task) or (None, None)
    return end is not None and end < len(begun) and begun[end].isspace()


def _numeric(task: TaskConfig) -> bool:
    """Whether numbers may stand for the labels: they are whole numbers, and in an order."""
    whole = task.ordinal and all(label.isascii() and label.isdecimal() for label in task.labels)
    return whole and len(set(map(int, task.labels))) == len(task.labels)


@lru_cache(maxsize=4)
def _spoken(task: TaskConfig) -> tuple[dict[str, int], dict[str, int]]:
    """What states each class: as it stands, and in lower case where that is unambiguous."""
    stated = [*enumerate(task.labels), *enumerate(task.shown)]
    exact = {label_text(text): i for i, text in reversed(stated)}
    folded: dict[str, set[int]] = {}
    for text, i in exact.items():
        folded.setdefault(_folded(text), set()).add(i)
    return exact, {text: found.pop() for text, found in folded.items() if len(found) == 1}


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _stated(line: str, task: TaskConfig) -> int | None:
    """The class that a line states where labels are words."""
    line = label_text(line)
    cue = _WORD_CUE.match(line)
    exact, folded = _spoken(task)
    for text in (line, line[cue.end() :]) if cue else (line,):
        # as it stands first: a label may open with what else stands around one
        behind = text.lstrip(_CUE_ENDS).rstrip()
        for bare in dict.fromkeys((text.strip(), behind, behind.strip(_AROUND))):
            if not bare:
                continue
            for said, texts in ((bare, exact), (_folded(bare), folded)):
                if (found := _opens(said, texts)) is not None:
                    return found if found >= 0 else None
            begun = {i for text, i in folded.items() if _begins(_folded(bare), text)}
            if len(begun) == 1:
                return begun.pop()
    return None


def _begins(said: str, text: str) -> bool:
    """Whether what was said is the beginning of a text, no number of which is cut in two."""
    if not text.startswith(said):
        return False
    return not (_NUMBER_ENDS.search(said) and _NUMBER_GOES_ON.match(text, len(said)))


def _goes_on(said: str, at: int) -> bool:
    """Whether a word does not end here: marks and joiners belong to the letter before them."""
    mark = at < len(said) and (unicodedata.category(said[at])[0] == "M" or said[at] in _JOINED)
    return mark or bool(_WORD_GOES_ON.match(said, at))


def _opens(said: str, texts: dict[str, int]) -> int | None:
    """The class whose text a line opens with; -1 where it names a second one beside it."""
    opening = [t for t in texts if said.startswith(t) and not _goes_on(said, len(t))]
    if not opening:
        return None
    longest = max(opening, key=len)
    choice = _CHOICE.match(said, len(longest))
    if choice and any(said.startswith(text, choice.end()) for text in texts):
        return -1
    return texts[longest]


def _first_answer(line: str, task: TaskConfig) -> tuple[int | None, int | None] | None:
    """`(label, end)` of the line's first answer, None without one.

    `label`: None where it is not one label; `end`: where its unit ends, if it has one.
    """
    stars_of = {count: i for i, count in enumerate(task.stars or ())}
    label_of = {int(label): i for i, label in reversed([*enumerate(task.labels)])}
    for found in _CANDIDATE.finditer(line):
        before, after = line[: found.start()], line[found.end() :]
        if found["drawn"]:
            if not stars_of:
                continue
            return stars_of.get(len(re.findall("[★⭐]", found["drawn"]))), None
        second = _SECOND.match(after)
        tail = after[second.end() :] if second else after
        stars, scale = _STARS_UNIT.match(tail), _SCALE_UNIT.match(tail)
        cue = _AFTER_CUE.search(before)
        if not stars_of:
            stars = None
        if not (stars or scale or cue or _OPENS_LINE.fullmatch(before)):
            continue
        unit = stars or scale
        end = len(line) - len(tail) + unit.end() if unit else None
        negative = _MINUS.search(before)
        value = _value(found["number"])
        if second or negative or _HALF.match(after) or value is None:
            return None, end
        if scale and _value(scale["scale"]) != max(stars_of or label_of):
            return None, end
        in_stars = stars_of and (unit or (cue and cue["stars"]))
        return (stars_of if in_stars else label_of).get(value), end
    return None


def _value(number: str) -> int | None:
    """The whole number that a numeral or word stands for; None for a fraction."""
    if number.lower() in _WORDS:
        return _WORDS.index(number.lower())
    value = float(number.replace(",", "."))
    return int(value) if value.is_integer() else None
