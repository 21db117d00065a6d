"""report.html: one file that shows a run's outcome, read with no network and no script.

Reads what `collect` computed, `train/log.jsonl`, `submissions.jsonl`, `logs/attempts/`,
`infer/*/progress/` and `run.json`; what is not there is left out. Text from data is
escaped. The page's frame and style are `report_page.html` beside this module.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from yelp_hpc.errors import StageError
from yelp_hpc.evaluation import charts as charts
from yelp_hpc.evaluation.metrics import AVERAGES
from yelp_hpc.evaluation.outcome import (
    baseline_sentence,
    figure,
    mcnemar_sentence,
    outcome_rows,
)
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt
from yelp_hpc.rundir.files import read_json, read_jsonl
from yelp_hpc.rundir.paths import RunPaths

Examples = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
_LISTED = 200
"""Starts of jobs that the timeline shows; a long array has thousands."""


def report_page(run: RunPaths, metrics: Mapping[str, Any], examples: Examples) -> str:
    """The page as HTML.

    Args:
        metrics: the content of metrics.json.
        examples: by model, `mistakes` and `unparsed`: lists of `row`, `label`,
            `prediction`, `confidence`, `review`, `answer`.
    """
    record = _read(run.run_json)
    resolved = (record.get("config") or {}).get("resolved") or {}
    name = str(resolved.get("name") or run.root.name)
    model = str((resolved.get("model") or {}).get("path") or "")
    sections = [
        f"<h1>{escape(name)}: {_subject(metrics['task'])}, measured</h1>",
        f'<p class="soft">{escape(model)}</p>' if model else "",
        outcome(metrics),
        per_class(metrics),
        pictures(metrics),
        training(read_jsonl(run.train_log)),
        jobs(attempts.of_run(run), read_jsonl(run.submissions)),
        throughput(run),
        *(mistakes(model, found, metrics["task"]) for model, found in examples.items()),
        provenance(record),
    ]
    frame = Template(Path(__file__).with_name("report_page.html").read_text(encoding="utf-8"))
    return frame.substitute(title=escape(f"{name}: report"), body="\n".join(filter(None, sections)))


def _subject(task: Mapping[str, Any]) -> str:
    noun = escape(str(task["noun"]))
    return f"{noun} ratings" if task["ordinal"] else f"{len(task['labels'])} kinds of {noun}"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except StageError:
        return {}
    return value if isinstance(value, dict) else {}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of ready HTML cells; it scrolls inside its card when it is wider than the page."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _figure(title: str, chart: str, note: str = "") -> str:
    caption = f'<p class="soft">{note}</p>' if note else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{chart}{caption}</figure>'


def outcome(metrics: Mapping[str, Any]) -> str:
    """The table of base against tuned, McNemar's test and the study's published figures."""
    models = list(metrics["models"])
    both = len(models) == 2
    rows = []
    for title, cells, difference in outcome_rows(metrics):
        row = [escape(title), *(f"{value}<small>{ends}</small>" for value, ends in cells)]
        value, _, ends = difference.partition(" ")
        rows.append([*row, f"{value}<small>{ends}</small>"] if both else row)
    table = _table(["", *models, *(["tuned − base"] if both else [])], rows)
    test = f"<p>{escape(mcnemar_sentence(metrics['comparison']))}</p>" if both else ""
    study = metrics["report"]
    test += f"<p>{escape(baseline_sentence(metrics))}</p>"
    published = (
        ""
        if "tuned" not in study
        else _table(
            ["F1 of the published study", "base", "tuned"],
            (
                [average, *(figure(study[m]["f1"][average]) for m in ("base", "tuned"))]
                for average in AVERAGES
            ),
        )
    )
    return (
        f'<h2>Outcome</h2><div class="card">{table}{test}'
        '<p class="soft">Small figures: 95 % bootstrap intervals over the test rows.</p></div>'
        f'<h2>The two F1 conventions</h2><div class="card"><p>'
        f"{escape(study['why_conventions_differ'].replace('`', ''))}</p>{published}</div>"
    )


def per_class(metrics: Mapping[str, Any]) -> str:
    """A table of precision, recall and F1 for each model."""
    cards = []
    for name, model in metrics["models"].items():
        rows = (
            [
                escape(str(item["name"])),
                *(figure(item[key]) for key in ("precision", "recall", "f1")),
                figure(item["support"]),
            ]
            for item in model["per_class"]
        )
        table = _table(["", "precision", "recall", "F1", "rows"], rows)
        cards.append(f'<div class="card"><h3>{escape(name)}</h3>{table}</div>')
    return f'<h2>Each class</h2><div class="grid2">{"".join(cards)}</div>'


def pictures(metrics: Mapping[str, Any]) -> str:
    """Confusion and, where the model gave scores, calibration."""
    cards, names = [], metrics["task"]["names"]
    for name, model in metrics["models"].items():
        chart = charts.confusion(
            name, model["confusion"], [*names, *model["confusion_columns"][len(names) :]]
        )
        cards.append(_figure(f"Confusion, {name}", chart, "Rows: truth. Shade: share of row."))
    for name, model in metrics["models"].items():
        if model.get("calibration"):
            chart = charts.calibration(name, model["calibration"])
            note = f"ECE {model['ece']:.3f}. Faint bars stand on few rows; dashes: perfect."
            cards.append(_figure(f"Calibration, {name}", chart, note))
    return f'<h2>Confusion and calibration</h2><div class="grid2">{"".join(cards)}</div>'


def training(log: Sequence[Mapping[str, Any]]) -> str:
    """Loss, learning rate and speed over the optimizer steps."""

    def series(key: str) -> list[tuple[float, float]]:
        found = [line for line in log if _is_number(line.get("step")) and _is_number(line.get(key))]
        return [(float(line["step"]), float(line[key])) for line in found]

    drawn = {
        "Loss": {"training": series("loss"), "validation": series("validation_loss")},
        "Learning rate": {"learning rate": series("learning_rate")},
        "Training speed": {"tokens a second": series("tokens_per_second")},
    }
    cards = [
        _figure(title, chart)
        for title, lines in drawn.items()
        if (chart := charts.lines(title, lines, "optimizer step"))
    ]
    return f'<h2>Training</h2><div class="grid2">{"".join(cards)}</div>' if cards else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def jobs(starts: Sequence[Attempt], submissions: Sequence[Mapping[str, Any]]) -> str:
    """The timeline of jobs with their interruptions, and what was submitted."""
    if not starts and not submissions:
        return ""
    parts = []
    if starts:
        key = "".join(
            f'<li><i style="background:var(--{colour})"></i>{text}</li>'
            for colour, text in (
                ("done", "done"),
                ("again", "interrupted, ran again"),
                ("failed", "failed or stopped"),
                ("running", "still running when this was written"),
            )
        )
        chart = charts.timeline(starts[-_LISTED:])
        rows = (
            [
                escape(f"{a.name} {attempts.task_text(a.task)}".strip()),
                escape(a.job),
                _clock(a.started),
                f"{attempts.last_seen(a) - a.started:,.0f} s",
                escape(a.verdict or "running"),
                escape(a.reason),
            ]
            for a in starts[-_LISTED:]
        )
        table = _table(["job", "id", "start", "time", "end", "why"], rows, "left")
        parts.append(
            f'<figure class="card">{chart}<ul class="key">{key}</ul>'
            f"<p>{attempts.gpu_hours(starts)}.</p></figure>"
            f'<details class="card"><summary>Starts of jobs ({len(starts)})</summary>'
            f"{table}</details>"
        )
    if submissions:
        rows = (
            [
                _clock(s.get("time")),
                *(escape(str(s.get(key, ""))) for key in ("name", "job", "executor")),
                f"<code>{escape(str(s.get('command', '')))}</code>",
            ]
            for s in submissions[-_LISTED:]
        )
        table = _table(["time", "job", "id", "executor", "command"], rows, "left")
        title = f"Submissions ({len(submissions)})"
        parts.append(f'<details class="card"><summary>{title}</summary>{table}</details>')
    return f"<h2>Jobs</h2>{''.join(parts)}"


def _clock(seconds: Any) -> str:
    if not _is_number(seconds):
        return "–"
    return time.strftime("%m-%d %H:%M:%S", time.gmtime(seconds))


def throughput(run: RunPaths) -> str:
    """Rows a second of training and of each model's inference, over whole jobs."""
    rows = []
    log = [line for line in read_jsonl(run.train_log) if _is_number(line.get("seconds"))]
    seconds = sum(line["seconds"] for line in log)
    if seconds:
        weighted = {
            key: sum(line["seconds"] * (line.get(key) or 0.0) for line in log) / seconds
            for key in ("examples_per_second", "tokens_per_second")
        }
        rows.append(
            [
                "train",
                f"{weighted['examples_per_second']:,.2f}",
                f"{weighted['tokens_per_second']:,.0f}",
            ]
        )
    infer = run.root / "infer"
    for model in sorted(infer.iterdir()) if infer.is_dir() else ():
        shards = [_read(path) for path in sorted(model.glob("progress/*.json"))]
        rates = [s["rows_per_second"] for s in shards if _is_number(s.get("rows_per_second"))]
        if rates:
            mean = sum(rates) / len(rates)
            rows.append([escape(f"infer {model.name}, a shard"), f"{mean:,.2f}", "–"])
    if not rows:
        return ""
    table = _table(["", "rows a second", "tokens a second"], rows)
    return f'<h2>Throughput</h2><div class="card">{table}</div>'


def mistakes(
    model: str, found: Mapping[str, Sequence[Mapping[str, Any]]], task: Mapping[str, Any]
) -> str:
    """The worst mistakes of a model, with the text, and answers that could not be parsed."""
    parts = []
    for kind, title in (
        ("mistakes", f"The {len(found['mistakes'])} worst mistakes, {model}"),
        ("unparsed", f"Answers that could not be parsed, {model}"),
    ):
        items = "".join(_mistake(item, task["names"]) for item in found[kind])
        if items:
            opened = " open" if kind == "mistakes" and model == "tuned" else ""
            parts.append(
                f"<details{opened}><summary>{escape(title)}</summary>"
                f'<ul class="mistakes">{items}</ul></details>'
            )
    return f"<h2>Mistakes, {escape(model)}</h2>{''.join(parts)}" if parts else ""


def _mistake(item: Mapping[str, Any], names: Sequence[str]) -> str:
    said = item["prediction"]
    answer = "no label" if said is None else f"label {said}"
    if said is not None and 0 <= said < len(names):
        answer = escape(names[said])
    sure = f", confidence {item['confidence']:.2f}" if item["confidence"] is not None else ""
    wrote = (
        f'<p class="soft">It wrote: {escape(item["answer"][:200])!s}</p>' if item["answer"] else ""
    )
    review = item["review"]
    text = escape(review[:700]) + ("…" if len(review) > 700 else "")
    return (
        f'<li class="card"><strong>{escape(names[item["label"]])} taken for {answer}</strong>'
        f'<span class="soft">{sure} (row {item["row"]})</span>{wrote}'
        f"<blockquote>{text}</blockquote></li>"
    )


def provenance(record: Mapping[str, Any]) -> str:
    """What run.json holds, a line a value; long values are folded away."""
    if not record:
        return ""
    main, packages, config = [], [], []
    for key, value in _leaves(record):
        if key == "code.diff" and value:
            value = f"{len(str(value).splitlines())} lines, in run.json"
        line = [escape(key), f'<span class="soft">{escape(str(value))}</span>']
        if key.startswith("config."):
            config.append(line)
        elif key.startswith("packages."):
            packages.append(line)
        elif not key.startswith("submissions"):
            main.append(line)
    parts = [f'<div class="card long">{_table(["", ""], main, "left")}</div>']
    for title, rows in (("Configuration", config), ("Packages", packages)):
        if rows:
            table = _table(["", ""], rows, "left")
            parts.append(f'<details class="card long"><summary>{title}</summary>{table}</details>')
    return f"<h2>Provenance</h2>{''.join(parts)}"


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}{key}.")
    elif value is not None:
        yield prefix.removesuffix("."), value
