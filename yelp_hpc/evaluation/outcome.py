"""The outcome as rows of text, and as a table in the terminal: base against tuned.

Reads the content of metrics.json; the report page shows the same rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from yelp_hpc.evaluation.metrics import AVERAGES, TOP

if TYPE_CHECKING:
    from rich.console import Console

STUDY_DATA = ("Yelp/yelp_review_full", "yelp_review_full")
"""The data set of the study whose figures metrics.json carries along."""
WIDE = 100
"""Columns from which the ends of an interval are shown, not half its width."""


def is_number(value: Any) -> bool:
    """Whether a value of a file that anybody may have changed is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def figure(value: Any, signed: bool = False) -> str:
    """A metric to three decimals, a count with thousands separated, a dash where undefined.

    To as many as six where it would look like 0 or 1 and is neither: two wrong rows of 50,000 are
    an accuracy of 0.99996.
    """
    if not is_number(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    digits = next((n for n in range(3, 7) if abs(round(value, n)) not in (0, 1)), 3)
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def share(part: float, whole: float) -> str:
    """`12.3%`; to as many as four decimals where it would look like none or all and is neither."""
    ratio = part / whole
    digits = next((n for n in range(1, 5) if round(ratio, n + 2) not in (0, 1)), 1)
    return f"{ratio:.{digits}%}"


def interval(ends: list[float] | None) -> str:
    """`[0.653, 0.711]`; nothing where there is no interval."""
    return "" if ends is None else f"[{figure(ends[0])}, {figure(ends[1])}]"


def plus_minus(ends: list[float] | None) -> str:
    """`±0.029`: half the width of an interval, for where there is little room."""
    return "" if ends is None else f"±{figure((ends[1] - ends[0]) / 2)}"


def _get(model: Mapping[str, Any], key: str) -> Any:
    """A value of a model's metrics by dotted name."""
    value: Any = model
    for part in key.split("."):
        value = value.get(part) if value is not None else None
    return value


def outcome_rows(
    metrics: Mapping[str, Any],
    study_shown: bool,
    spread: Callable[[list[float] | None], str] = interval,
) -> list[tuple[str, list[tuple[str, str]], str]]:
    """`(name, [(value, interval) for each model], tuned minus base)` for each line.

    Args:
        study_shown: what `shows_study` says; then F1 stands there in the report's way, too.
        spread: how an interval is written.
    """
    models = metrics["models"]
    comparison = metrics.get("comparison") or {}
    task = metrics["task"]
    last = len(task["labels"]) - 1
    unit = "stars" if "stars" in next(iter(models.values()))["per_class"][0] else "classes"
    lines = [
        ("test rows", "rows"),
        ("answered", "answered"),
        ("unparsed", "unparsed"),
        (f"answers outside 0-{last}", "outside"),
        ("accuracy", "accuracy"),
        *((f"F1 {average}", f"f1.{average}") for average in AVERAGES),
        *(
            (f"F1 {average}, report's way", f"f1_report.{average}")
            for average in (AVERAGES if study_shown else ())
        ),
        *((f"true label among the {k} best", f"top_k.{k}") for k in TOP if k <= last),
        (f"mean absolute error ({unit})", "mae"),
        ("within one star" if unit == "stars" else "within one class", "within_one"),
        ("quadratic kappa", "kappa"),
        ("calibration error (ECE)", "ece"),
    ]
    rows = []
    for title, key in lines:
        if all(_get(model, key) is None for model in models.values()):
            continue  # of scores or of an order that this task has not
        cells = []
        for model in models.values():
            cells.append((figure(_get(model, key)), spread(model["ci95"].get(key))))
        difference = (comparison.get("difference") or {}).get(key)
        shown = ""
        if difference:
            shown = f"{figure(difference['value'], signed=True)} {spread(difference['ci95'])}"
        rows.append((title, cells, shown))
    return rows


def mcnemar_sentence(comparison: Mapping[str, Any]) -> str:
    """What McNemar's test says, in one sentence."""
    test = comparison["mcnemar"]
    exponent = test["log10_exact_p"]
    p = f"p = {test['exact_p']:.2g}" if exponent > -300 else f"p = 1e{exponent:.0f}"
    return (
        f"McNemar: {comparison['only_tuned_right']:,} rows only tuned got right, "
        f"{comparison['only_base_right']:,} only base; exact {p}, chi-square with continuity "
        f"{test['chi2']:,.1f}."
    )


def baseline_sentence(metrics: Mapping[str, Any]) -> str:
    """What the most frequent label alone would get, and which labels no test row has."""
    task, test = metrics["task"], metrics["test"]
    best = test["majority"]
    names, support = task["names"], test["support"]
    name, rows = names[best["label"]], sum(support)
    gets = f"gets accuracy {figure(best['accuracy'])} and macro F1 {figure(best['f1_macro'])}."
    if max(support) == min(filter(None, support), default=0):
        those = " that occurs" if test["absent"] else ""
        text = (
            f"Every label{those} has {share(max(support), rows)} of the rows: always answering one "
        )
        text += gets
    else:
        rarest = min(range(len(support)), key=lambda label: (support[label] == 0, support[label]))
        text = (
            f"Always answering {name!r}, the most frequent label ({share(max(support), rows)} of "
            f"the rows; the rarest, {names[rarest]!r}, {share(support[rarest], rows)}), {gets}"
        )
    if test["absent"]:
        shown = ", ".join(test["absent"][:10])
        more = f" and {len(test['absent']) - 10} more" if len(test["absent"]) > 10 else ""
        text += f" No test row has the label {shown}{more}: F1 macro counts each of these as 0."
    return text


def shows_study(metrics: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    """Whether the published study and its F1 have a place beside the outcome.

    That is on its own data, or where an answer was unparsed or stray, so that its F1 is another.

    Args:
        data: that section of the configuration.
    """
    models = metrics["models"].values()
    stray = any(model.get("unparsed") or model.get("outside") for model in models)
    return stray or data.get("path") in STUDY_DATA


def terminal() -> Console:
    """Standard output, as wide as it is; a log file, which has no width, as `WIDE`."""
    from rich.console import Console

    console = Console()
    if not console.width or (not console.is_terminal and "COLUMNS" not in os.environ):
        console.width = WIDE
    return console


def print_outcome(
    metrics: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> None:
    """Print the table to standard output; `data` is that section of the configuration."""
    from rich import box
    from rich.table import Table

    console = console or terminal()
    wide = console.width >= WIDE
    models = list(metrics["models"])
    table = Table(title="Outcome on the test set, 95 % bootstrap intervals", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    both = len(models) == 2
    if both:
        table.add_column("tuned − base", justify="right")
    study_shown = shows_study(metrics, data or {})
    spread = interval if wide else plus_minus
    for title, cells, difference in outcome_rows(metrics, study_shown, spread):
        values = [f"{value} {ends}".strip() for value, ends in cells]
        table.add_row(title, *values, *([difference] if both else []))
    console.print(table)
    notes = [mcnemar_sentence(metrics["comparison"])] if both else []
    notes.append(baseline_sentence(metrics))
    if study_shown:
        notes.append(metrics["report"]["why_conventions_differ"])
    for note in notes:  # wrapped at words
        console.print(note, markup=False, highlight=False)
