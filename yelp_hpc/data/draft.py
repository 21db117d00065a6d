"""`init --data FILE`: a config for the user's own data, its task section read from the file.

`survey` reads a data file once; `draft` is pure. What is guessed is said in a comment beside it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from yelp_hpc.data.files import data_files, format_of, records
from yelp_hpc.data.formats.arrow_rows import class_names
from yelp_hpc.data.labels import NO_LABEL, number, value_text, whole_number
from yelp_hpc.errors import RequestError, in_shell
from yelp_hpc.progress import say
from yelp_hpc.rundir.files import write_bytes
from yelp_hpc.task import label_fault, label_text

MOST_LABELS = 1000
_TEXT_NAMES = re.compile(r"text|review|sentence|content|body|message|comment|question", re.I)
_LABEL_NAMES = re.compile(
    r"label|class|categor|topic|intent|sentiment|target|stars?|rating|score|group", re.I
)
_NAMED = f"{_TEXT_NAMES.pattern}|{_LABEL_NAMES.pattern}|id|index"
_MISSING = ("nan", "null", "none", "n/a", "na", "nil", "<na>", "-", "?")
_JOINERS = "\u200c\u200d"
"""What shapes letters and emoji: seen in what it joins."""
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_ORDER_NAMES = re.compile(r"stars?|rating|score|grade|level", re.I)


@dataclass
class Column:
    """What is kept of a column while its file streams by."""

    values: Counter[str] = field(default_factory=Counter)
    """Each value and its rows; given up, and empty, above `MOST_LABELS` of them."""
    open: bool = True
    unfit: str = ""
    """What it holds that makes no labels of its values."""
    lengths: list[int] = field(default_factory=list)
    """Characters of the texts, of at most 100,000 rows."""
    tokens: float = 0
    """About how many tokens these are: few letters of an alphabet that is not Latin make one."""
    texts: int = 0
    filled: int = 0
    """Rows that have a value, a text or a number."""

    def take(self, value: object) -> None:
        """Count one row's value."""
        text = value_text(value)
        self.filled += bool(text)
        if type(value) in NO_LABEL:
            self._close(NO_LABEL[type(value)])
        elif text and len(text) < 100 and label_fault(text):
            self._close("" if len(text.splitlines()) > 1 else "hidden characters")
        if isinstance(value, str):
            self.texts += 1
            if len(self.lengths) < 100_000:
                self.lengths.append(len(value))
                self.tokens += _tokens(value)
        if self.open and text:
            self.values[text] += 1
            if len(self.values) > MOST_LABELS:
                self._close(f"over {MOST_LABELS:,} values")

    def _close(self, why: str = "") -> None:
        self.values.clear()
        self.open, self.unfit = False, self.unfit or why

    @property
    def labels(self) -> dict[str, Counter[str]]:
        """The labels that prepare tells apart: the usual spelling → all of them and their rows."""
        alike: dict[str, Counter[str]] = {}
        for value, rows in self.values.items():
            text = whole_number(value)
            alike.setdefault(text.casefold(), Counter())[text] += rows
        return {max(found, key=found.__getitem__): found for found in alike.values()}

    @property
    def mean(self) -> float:
        """Characters of a text on the mean."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else 0.0


@dataclass(frozen=True)
class Survey:
    """A data file's rows and columns."""

    place: str
    rows: int
    header: bool
    columns: dict[str, Column]
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Column of class numbers → the names that the file gives them."""


def survey(place: str) -> Survey:
    """Read every record of a data file, a folder or a glob.

    Raises:
        RequestError: it cannot be read, or has no rows.
    """
    paths = data_files(place)
    table = format_of(paths[0]) in (".csv", ".tsv")
    found = _survey(place, paths, not table or _has_header(paths[0]))
    called = any(re.match(f"(?:{_NAMED})\\w*$", name, re.I) for name in found.columns)
    recurs = any(name in column.values for name, column in found.columns.items())
    if table and found.header and recurs and not called:
        return _survey(place, paths, False)  # what looked like names are values
    return found


def _survey(place: str, paths: list[Path], header: bool) -> Survey:
    columns: dict[str, Column] = {}
    rows = 0
    table = format_of(paths[0]) in (".csv", ".tsv")
    for path in paths:
        for _, record in records(path, header):
            rows += 1
            if table and columns and not record.keys() & columns.keys():
                raise RequestError(
                    f"{path} has no column of those before it ({', '.join(columns)}): "
                    f"{', '.join(map(str, record))}"
                )
            for name, value in record.items():
                if name is not None:
                    columns.setdefault(str(name), Column()).take(value)
    if not rows:
        raise RequestError(f"{place} has no rows")
    named = {name: class_names(paths, name) for name, column in columns.items() if column.values}
    return Survey(
        place, rows, header, columns, {n: c for n, c in named.items() if c and _labels(c)}
    )


def _labels(names: list[str]) -> bool:
    """Whether the names of a file's classes can be labels."""
    apart = len({*map(label_text, names)}) == len(names) > 1
    return apart and not any(map(label_fault, names))


def _has_header(path: Path) -> bool:
    """Whether a csv's first line looks like names: none is a number, none a sentence."""
    first = next(records(path, header=False), ("", {}))[1]
    names = [str(value) for value in first.values()]
    return not any(re.fullmatch(r"[-\d.]+", name) or len(name) > 60 for name in names)


def text_column(found: Survey) -> str:
    """The column of the texts: named like one, or the one of the longest. Raises RequestError.

    Not one that is named like labels and repeats them, while there is another.
    """
    texts = {name: c for name, c in found.columns.items() if c.texts and c.mean > 0}
    if not texts:
        raise RequestError(f"{found.place} has no column of texts (it has: {_names(found)})")

    def rank(name: str) -> tuple[bool, float]:
        labels = bool(_LABEL_NAMES.search(name)) and _repeats(found, name)
        return not labels, texts[name].mean * (2 if _TEXT_NAMES.search(name) else 1)

    return max(texts, key=rank)


def _repeats(found: Survey, name: str) -> bool:
    """Whether a column holds a few values, each often."""
    return 2 <= len(found.columns[name].labels) <= found.rows / 2


def label_column(found: Survey, text: str) -> str:
    """The column of the labels: few values, each often; named like one. Raises RequestError."""
    usable = {
        name: column
        for name, column in found.columns.items()
        if name != text and _repeats(found, name)
    }
    if not usable:
        raise RequestError(
            f"{found.place} has no column beside {text} with 2 to {MOST_LABELS} values that "
            f"repeat (it has: {_names(found, text)})"
        )
    return min(
        usable,
        key=lambda n: (not _LABEL_NAMES.search(n), not usable[n].texts, len(usable[n].labels)),
    )


def _names(found: Survey, text: str | None = None) -> str:
    """Every column, and what makes no labels of it."""

    def why(name: str, column: Column) -> str:
        if name == text or column.unfit or not column.filled:
            return "" if name == text else column.unfit
        same = ", letter case and such aside" if len(column.values) > len(column.labels) else ""
        count = len(column.labels)
        return f"{count:,} value{'s' if count != 1 else ''}{same}" if column.open else ""

    return ", ".join(f"{n} ({w})" if (w := why(n, c)) else n for n, c in found.columns.items())


def draft(found: Survey, config: str) -> str:
    """The config's text."""
    text = text_column(found)
    label = label_column(found, text)
    spellings, lengths = found.columns[label].labels, sorted(found.columns[text].lengths)
    counts = {value: sum(rows.values()) for value, rows in spellings.items()}
    numbers = {value: number(value) for value in counts}
    counted = None not in numbers.values()
    values = sorted(counts, key=(lambda v: (numbers[v], v)) if counted else None)
    ordinal = counted and bool(_ORDER_NAMES.search(label))
    stars = ordinal and values == ["1", "2", "3", "4", "5"] and label not in found.classes
    labels = ["0", "1", "2", "3", "4"] if stars else values
    if label in found.classes:
        labels = found.classes[label]
        values = list(map(str, range(len(labels))))
        counts = {value: counts.get(value, 0) for value in values}
    most, least = max(values, key=lambda v: counts[v]), min(values, key=lambda v: counts[v])
    high = lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)]
    noun = text.lower() if re.fullmatch(r"[A-Za-z]+", text) else "text"
    listed = ", ".join(labels)
    named = len(labels) <= 12 and not stars and not set("{}") & {*listed} and len(listed) <= 300
    choices = f": {listed}" if named else ""
    what = "its rating from 0 (worst) to 4 (best)" if stars else f"its {_word(label)}{choices}"
    template = (
        f"Instruction: Please read the following {noun} and output {what}.\n"
        f"{noun.capitalize()}: {{review}}\nOutput: {{label}}"
    )
    around = max(80, _tokens(template) + max(map(_tokens, labels)) + 20)
    rate = found.columns[text].tokens / sum(lengths)
    cutoff = next((n for n in (128, 256, 512, 1024) if high * rate + around < n), 2048)
    called = dict(zip(values, labels, strict=True)) if label in found.classes else {}
    best, rarest = called.get(most, most), called.get(least, least)
    held = f"{counts[most]:,} rows of {best}, {counts[least]:,} of {rarest}"
    if counts[most] == counts[least]:
        held = f"{counts[most]:,} rows of each"
    lines = [
        f"# {found.place}: {found.rows:,} rows, {len(values)} labels.",
        "#",
        f"#   {_next(config)}",
        f"name: {_run_name(found.place)}",
        "",
        "model:",
        "  path: demo:smollm2-135m         # a small model for a first try",
        "",
        "data:",
        "  source: file",
        f"  train: {_text(found.place)}",
        *(["  header: false                   # the first line is a row"] * (not found.header)),
        f"  text_column: {_text(text)}",
        f"  label_column: {_text(label)}",
        f"  test_rows: {max(1, min(1000, found.rows // 10))}",
        f"  cutoff: {cutoff}                     # tokens; 95 % of the texts have at most {high:,} "
        "characters",
        "",
        "task:",
        f"  # {held}: always answering {best} is right in "
        f"{counts[most] / sum(counts.values()):.1%}",
        "  labels:",
        *(
            f"    - {_text(one)}  # {counts[v]:,} rows{_odd(v, spellings.get(v, Counter()))}"
            for one, v in zip(labels, values, strict=True)
        ),
    ]
    if stars:
        lines.append("  values: [1, 2, 3, 4, 5]         # what stands in the data")
        lines.append("  names: [1 star, 2 stars, 3 stars, 4 stars, 5 stars]")
    lines += [
        f"  ordinal: {'true' if ordinal else 'false'}"
        + ("" if ordinal else "                  # true: the labels are in an order"),
        f"  noun: {_text(noun)}",
        "",
        "prompt:",
        f"  template: {_quoted(template)}",
        "",
        "train:",
        "  learning_rate: 1e-3",
        "  global_batch: 8",
        "  max_tokens: 2048",
    ]
    return "\n".join(lines) + "\n"


def _next(config: str) -> str:
    named = f"--config {in_shell(config)} --executor local --run runs/mine"
    return f"python -m yelp_hpc submit all {named}"


def _odd(label: str, spelled: Counter[str]) -> str:
    """What is strange about a label."""
    others = [f"{rows:,} of them as {text}" for text, rows in spelled.items() if text != label]
    missing = ["a missing value? then leave its rows out"] * (label.casefold() in _MISSING)
    unseen = sorted({c for c in label if not c.isprintable() and c not in _JOINERS})
    hidden = [f"with U+{ord(c):04X}, which nobody sees" for c in unseen]
    return "".join(f", {note}" for note in others + missing + hidden)


def _tokens(text: str) -> float:
    """About how many tokens a text has."""
    if text.isascii():
        return len(text) / 3.5
    other = sum(not letter.isascii() for letter in text)
    return (len(text) - other) / 3.5 + (len(text.encode(errors="replace")) - len(text) + other) / 2


def _word(column: str) -> str:
    odd = column.isdecimal() or not column.isprintable() or set("{}") & {*column}
    return "label" if odd else column.lower().replace("_", " ")


def _run_name(place: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(place).name.split(".")[0]).strip("-._")
    return (stem or "mine")[:64]


def _text(text: str) -> str:
    """A YAML value that is read as this text."""
    from yelp_hpc.settings import parse_value

    plain = re.fullmatch(r"[./-]*\w[\w./-]*", text) and parse_value(text) == text
    return text if plain else _quoted(text)


def _quoted(text: str) -> str:
    """A text in YAML's double quotes; what YAML does not allow as it is, or breaks lines at, spelt.

    Not JSON's spelling: YAML reads its `\\ud83d\\ude00`, an emoji, as two broken letters.
    """
    quoted = json.dumps(text, ensure_ascii=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)


def init_data(place: str, config: Path, force: bool = False) -> None:
    """Write a config for a data file.

    Raises:
        RequestError: the config is there already, or the data cannot be used.
    """
    if config.exists() and not force:
        raise RequestError(f"nothing was written; --force replaces: {config} exists")
    found = survey(place)
    write_bytes(config, draft(found, str(config)).encode())
    text = text_column(found)
    label = label_column(found, text)
    say(f"{config}: {found.rows:,} rows, texts in {text}, labels in {label}")
    for name in (text, label):
        if empty := found.rows - found.columns[name].filled:
            say(f"{name}: {empty:,} rows have none, which prepare refuses: take them out")
    for name, spelled in found.columns[label].labels.items():
        if odd := _odd(name, spelled):
            say(f"label {name}: {spelled.total():,} rows{odd}")
    say(f"next: {_next(str(config))}")
