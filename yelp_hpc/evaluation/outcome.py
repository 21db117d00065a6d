"""The outcome as rows of text, and as a table in the terminal: base against tuned.

Reads the content of metrics.json; the report page shows the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yelp_hpc.evaluation.metrics import AVERAGES


def figure(value: float | int | None, signed: bool = False) -> str:
    """A metric to three decimals, a count with thousands separated, a dash where undefined."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def interval(ends: list[float] | None) -> str:
    """`[0.653, 0.711]`; nothing where there is no interval."""
    return "" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _get(model: Mapping[str, Any], key: str) -> Any:
    """A value of a model's metrics by dotted name."""
    value: Any = model
    for part in key.split("."):
        value = value[part]
    return value


def outcome_rows(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]], str]]:
    """`(name, [(value, interval) for each model], tuned minus base)` for each line."""
    models = metrics["models"]
    comparison = metrics.get("comparison") or {}
    lines = [
        ("test rows", "rows"),
        ("answered", "answered"),
        ("unparsed", "unparsed"),
        ("answers outside 0-4", "outside"),
        ("accuracy", "accuracy"),
        *((f"F1 {average}", f"f1.{average}") for average in AVERAGES),
        *((f"F1 {average}, report's way", f"f1_report.{average}") for average in AVERAGES),
        ("mean absolute error (stars)", "mae"),
        ("within one star", "within_one"),
        ("calibration error (ECE)", "ece"),
    ]
    rows = []
    for title, key in lines:
        cells = []
        for model in models.values():
            cells.append((figure(_get(model, key)), interval(model["ci95"].get(key))))
        difference = (comparison.get("difference") or {}).get(key)
        shown = ""
        if difference:
            shown = f"{figure(difference['value'], signed=True)} {interval(difference['ci95'])}"
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


def print_outcome(metrics: Mapping[str, Any]) -> None:
    """Print the table to standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    models = list(metrics["models"])
    table = Table(title="Outcome on the test set, 95 % bootstrap intervals", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    both = len(models) == 2
    if both:
        table.add_column("tuned − base", justify="right")
    for title, cells, difference in outcome_rows(metrics):
        values = [f"{value} {ends}".strip() for value, ends in cells]
        table.add_row(title, *values, *([difference] if both else []))
    if not console.is_terminal:
        console.width = 120  # a log file has no width; do not fold the table at 80
    console.print(table)
    if both:
        console.print(mcnemar_sentence(metrics["comparison"]), soft_wrap=True)
    console.print(metrics["report"]["why_conventions_differ"], soft_wrap=True)
