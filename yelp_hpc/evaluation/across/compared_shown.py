"""A comparison of runs as tables in the terminal and as one HTML page.

Both show the same rows, made here from what `compared.compare` found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yelp_hpc.evaluation import charts
from yelp_hpc.evaluation.across.compared import grouped
from yelp_hpc.evaluation.outcome import figure, interval, plus_minus, terminal

_METRICS = (("accuracy", "accuracy"), ("f1.macro", "F1 macro"), ("mae", "MAE"), ("kappa", "kappa"))
"""Which have a column; the rest stands in the JSON."""
MOST_PAIRS = 15
"""More pairs than these are shown against the best model alone; all stand in the JSON."""


def title(found: Mapping[str, Any]) -> str:
    """How many rows stand behind the figures."""
    rows, of = found["rows"]["shared"], {*found["rows"]["of"].values()}
    whole = of == {rows}
    part = "" if whole else f", of {min(of):,}" + (f" to {max(of):,}" if len(of) > 1 else "")
    return f"{rows:,} test rows that all runs share{part}; 95 % intervals"


def model_rows(found: Mapping[str, Any], wide: bool) -> tuple[list[str], list[list[str]]]:
    """Head and a line a model: letter, run, model, figures with intervals, job hours, GPU-hours."""
    spread = interval if wide else plus_minus
    shown = [(key, name) for key, name in _METRICS if key in found["models"][0]["metrics"]]
    shown = shown if wide else shown[:3]
    rows = []
    for model in found["models"]:
        cells = [model["id"], model["run"], model["model"]]
        for key, _ in shown:
            metric = model["metrics"][key]
            cells.append(f"{figure(metric['value'])} {spread(metric['ci95'])}".strip())
        rows.append(cells)
    return ["", "run", "model", *(name for _, name in shown)], rows


def setting_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key, and each of its values with the runs that have it."""
    rows = []
    for key, column in found["settings"].items():
        values = [f"{value[:40]}: {', '.join(runs)}" for value, runs in grouped(column)]
        rows.append((key, " · ".join(values)))
    return rows


def cost_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A line a run: hours of its jobs, GPU-hours, and those of them lost to interruptions."""
    keys = ("job_hours", "gpu_hours", "gpu_hours_lost")
    return [[run, *(f"{cost[key]:.2f}" for key in keys)] for run, cost in found["cost"].items()]


COST_HEAD = ["run", "job hours", "GPU-hours", "of them lost"]
PAIR_HEAD = ["", "accuracy", "F1 macro", "only 2nd : 1st right", "McNemar p", "Holm p"]


def pair_rows(found: Mapping[str, Any], wide: bool = True, every: bool = False) -> list[list[str]]:
    """A line a pair: second minus first, each with its interval; McNemar's p, also by Holm."""
    spread = interval if wide else plus_minus
    pairs = found["pairs"]
    if not every and len(pairs) > MOST_PAIRS:
        top = best(found)
        pairs = [pair for pair in pairs if top in (pair["first"], pair["second"])]
    rows = []
    for pair in pairs:
        cells = [f"{pair['second']} − {pair['first']}"]
        for key in ("accuracy", "f1.macro"):
            one = pair["difference"][key]
            cells.append(f"{figure(one['value'], signed=True)} {spread(one['ci95'])}")
        cells.append(f"{pair['only_second_right']} : {pair['only_first_right']}")
        test = pair["mcnemar"]
        rows.append([*cells, p_value(test["exact_p"]), p_value(test["holm_p"])])
    return rows


def best(found: Mapping[str, Any]) -> str:
    """The letter of the model with the highest accuracy."""
    top = max(found["models"], key=lambda model: model["metrics"]["accuracy"]["value"])
    return str(top["id"])


def p_value(p: float) -> str:
    """A p value in little room."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def note(found: Mapping[str, Any]) -> str:
    """How to read the pairs, and what Holm's correction leaves."""
    pairs = found["pairs"]
    sure = sum(pair["mcnemar"]["holm_p"] < 0.05 for pair in pairs)
    text = (
        f"{sure} of {len(pairs)} pair{'s' * (len(pairs) != 1)} differ{'s' * (sure == 1)} by "
        "McNemar's exact test at 5 % after Holm's correction. Intervals: paired bootstrap."
    )
    if len(pairs) > MOST_PAIRS:
        text += f" Shown: those with {best(found)}, the highest accuracy; all stand in --json."
    return text


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print the tables to standard output, in 80 columns where the terminal has no more."""
    console = terminal()
    wide = console.width >= 120
    head, rows = model_rows(found, wide)
    print_table(console, title(found), head, rows, words={1, 2})
    if settings := setting_rows(found):
        print_table(console, "Settings that differ", ["", ""], [[*row] for row in settings], {0, 1})
    else:
        console.print("No setting differs that a result depends on.\n", highlight=False)
    if pairs := pair_rows(found, wide):
        print_table(console, "The same rows, second minus first", PAIR_HEAD, pairs, {0})
        console.print(f"{note(found)}\n", markup=False, highlight=False)
    print_table(console, "Cost", COST_HEAD, cost_rows(found), {0})


def print_table(
    console: Any, name: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: set[int]
) -> None:
    """A table whose columns `words` stand to the left and may be folded anywhere."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=name, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(head), pad_edge=False
    )
    for place, cell in enumerate(head):
        left = place in words
        table.add_column(
            cell,
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=not left and " " not in cell,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def is_comparison(page: Path) -> bool:
    """Whether a file is a page that `comparison_page` made."""
    return "<title>Runs compared</title>" in page.read_text(encoding="utf-8")


def comparison_page(found: Mapping[str, Any]) -> str:
    """The page as HTML."""
    from markupsafe import Markup

    from yelp_hpc.evaluation.report import page, picture

    head, rows = model_rows(found, wide=True)
    drawn = []
    for key, name in (("accuracy", "Accuracy"), ("f1.macro", "F1 macro")):
        points = []
        for model in found["models"]:
            metric = model["metrics"][key]
            label = f"{model['id']} {model['run']} {model['model']}"
            points.append((label, metric["value"], metric["ci95"]))
        drawn.append(picture(name, Markup(charts.forest(name, points))))
    return page(
        "across/compared_page.html",
        title=title(found),
        models=(head, rows),
        drawn=drawn,
        settings=setting_rows(found),
        pairs=(PAIR_HEAD, pair_rows(found, every=True)),
        note=note(found),
        cost=(COST_HEAD, cost_rows(found)),
    )
