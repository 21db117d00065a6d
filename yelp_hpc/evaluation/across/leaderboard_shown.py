"""A study's leaderboard as a table in the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yelp_hpc.evaluation import charts
from yelp_hpc.evaluation.across.compared_shown import print_table
from yelp_hpc.evaluation.outcome import figure, interval, terminal

_HEAD = ["", "trial", "seeds", "validation", "accuracy", "F1 macro"]


def rows(found: Mapping[str, Any], wide: bool) -> list[list[str]]:
    """A line a trial, the chosen one first: figures as mean ± standard deviation over seeds."""
    lines = []
    for line in found["trials"]:
        seeds = len(line["runs"])
        cells = [
            "→" if line["chosen"] else "",
            described(line),
            str(seeds) if line["complete"] else f"{seeds}, not all",
            spread_text(line["validation"].get(found["criterion"])),
        ]
        for key in ("accuracy", "f1.macro"):
            test = line["test"][key]
            text = spread_text(test)
            cells.append(f"{text} {interval(test['ci95'])}" if wide else text)
        lines.append([*cells, _cost(line["cost"])])
    if base := found["base"]:
        figures = [figure(base[key]) for key in ("accuracy", "f1.macro")]
        lines.append(["", "base model", "", "", *figures, ""])
    return lines


def head(found: Mapping[str, Any]) -> list[str]:
    """The titles of the columns of `rows`."""
    criterion = found["criterion"].replace("validation_", "valid. ")
    return [*_HEAD[:3], criterion, *_HEAD[4:], "GPU-h" if _on_gpus(found) else "job h"]


def _on_gpus(found: Mapping[str, Any]) -> bool:
    return bool(found["cost"]["gpu_hours"])


def _cost(cost: Mapping[str, float]) -> str:
    return f"{cost['gpu_hours'] or cost['job_hours']:.2f}"


def described(line: Mapping[str, Any]) -> str:
    """What a trial's settings are: `learning_rate 0.001, rank 8`; its number where none varies."""
    pairs = [f"{key.rpartition('.')[2]} {value}" for key, value in line["values"].items()]
    return f"{line['trial']:02d} {', '.join(pairs)}".rstrip()


def spread_text(found: Mapping[str, Any] | None) -> str:
    """`0.539 ±0.006`; no spread of one seed."""
    if found is None:
        return "–"
    return figure(found["mean"]) + ("" if found["sd"] is None else f" ±{figure(found['sd'])}")


def notes(found: Mapping[str, Any]) -> list[str]:
    """How the trial was chosen, what the others are less, and what is not finished."""
    chosen = next((line for line in found["trials"] if line["chosen"]), None)
    how = (
        f"Chosen by {found['method']['chosen']}"
        if chosen
        else "Nothing was chosen: no trial has all its seeds and validation rows"
    )
    said = [
        f"{how}; reported on {found['rows']:,} test rows. ± is the standard deviation over seeds, "
        "intervals are a bootstrap over seeds and rows."
    ]
    worse = sure = 0
    for line in found["trials"]:
        if difference := line["minus_chosen"]:
            worse += 1
            low, high = difference["accuracy"]["ci95"]
            sure += low > 0 or high < 0
    if worse:
        said.append(
            f"The accuracy of {sure} of the {worse} others differs from it beyond their intervals."
        )
    said += [f"Not finished: {name}: {why}" for name, why in found["unfinished"].items()]
    return said


def print_leaderboard(found: Mapping[str, Any]) -> None:
    """Print the table to standard output."""
    console = terminal()
    wide = console.width >= 130
    print_table(console, f"Study {found['study']}", head(found), rows(found, wide), {0, 1})
    for note in notes(found):
        console.print(note, markup=False, highlight=False)


def leaderboard_page(found: Mapping[str, Any]) -> str:
    """The page as HTML."""
    from markupsafe import Markup

    from yelp_hpc.evaluation.report import page, picture

    drawn = []
    for key, name in (("accuracy", "Accuracy"), ("f1.macro", "F1 macro")):
        points = [
            (described(line), line["test"][key]["mean"], line["test"][key]["ci95"])
            for line in found["trials"]
        ]
        note = "Mean over seeds; 95 % over seeds and rows."
        drawn.append(picture(name, Markup(charts.forest(name, points)), note))
    runs = [
        (run, described(line), seed, *(figure(value) for value in values))
        for line in found["trials"]
        for (run, seed), *values in zip(
            line["runs"].items(),
            line["test"]["accuracy"]["values"],
            line["test"]["f1.macro"]["values"],
            strict=True,
        )
    ]
    differences = [
        [described(line), *(_difference(line["minus_chosen"][k]) for k in ("accuracy", "f1.macro"))]
        for line in found["trials"]
        if line["minus_chosen"]
    ]
    return page(
        "across/leaderboard_page.html",
        name=found["study"],
        table_of_trials=(head(found), rows(found, wide=True)),
        notes=notes(found),
        drawn=drawn,
        differences=differences,
        runs=runs,
        cost=found["cost"],
    )


def _difference(one: Mapping[str, Any]) -> str:
    return f"{figure(one['value'], signed=True)} {interval(one['ci95'])}"
