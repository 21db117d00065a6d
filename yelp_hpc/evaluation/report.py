"""report.html: one file that shows a run's outcome, read with no network and no script.

Reads what `collect` computed, `train/log.jsonl`, `submissions.jsonl`, `logs/attempts/`,
`infer/.progress/` and `run.json`; what is not there is left out. Text from data is
escaped: `report_page.html` beside this module is a Jinja2 template with autoescape, and everything
but the charts' SVG comes to it as plain values.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from yelp_hpc.errors import StageError
from yelp_hpc.evaluation import charts
from yelp_hpc.evaluation.metrics import AVERAGES
from yelp_hpc.evaluation.outcome import (
    baseline_sentence,
    figure,
    is_number,
    mcnemar_sentence,
    outcome_rows,
    share,
    shows_study,
)
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt
from yelp_hpc.rundir.files import read_json, read_jsonl
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.record import training_log

Examples = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
_LISTED = 200
"""Starts of jobs that the timeline shows; a long array has thousands."""
_ENDS = (
    ("done", "done"),
    ("again", "interrupted, ran again"),
    ("failed", "failed or stopped"),
    ("running", "still running when this was written"),
)
"""Colour of a start of a job in the timeline, and what it means."""


def report_page(run: RunPaths, metrics: Mapping[str, Any], examples: Examples) -> str:
    """The page as HTML.

    Args:
        metrics: the content of metrics.json.
        examples: by model, `mistakes` and `unparsed`: lists of `row`, `label`,
            `prediction`, `confidence`, `review`, `answer`.
    """
    record = _read(run.run_json)
    resolved = (record.get("config") or {}).get("resolved") or {}
    return page(
        "report_page.html",
        name=str(resolved.get("name") or run.root.name),
        subject=_subject(metrics["task"]),
        head=head(record, metrics),
        outcome=outcome(metrics, shows_study(metrics, resolved.get("data") or {})),
        classes=per_class(metrics),
        pictures=pictures(metrics),
        training=training(training_log(run)),
        jobs=jobs(attempts.of_run(run), read_jsonl(run.submissions)),
        throughput=throughput(run),
        mistakes=[mistakes(model, found, metrics["task"]) for model, found in examples.items()],
        provenance=provenance(record),
    )


def page(template: str, **values: Any) -> str:
    """A page as HTML: `template`, of this folder, filled with plain values, which are escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(**values)


def _subject(task: Mapping[str, Any]) -> str:
    noun = str(task["noun"])
    return f"{noun} ratings" if task["ordinal"] else f"{len(task['labels'])} kinds of {noun}"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except StageError:
        return {}
    return value if isinstance(value, dict) else {}


def head(record: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader asks first: model, data, rows, seed, date, commit."""
    config = (record.get("config") or {}).get("resolved") or {}
    model, data = config.get("model") or {}, config.get("data") or {}
    code = record.get("code") or {}
    trained = (record.get("data") or {}).get("rows") or {}
    rows = [f"{next(iter(metrics['models'].values()))['rows']:,} test"]
    rows += [f"{trained[name]:,} {name}" for name in ("train", "validation") if name in trained]
    commit = str(code.get("git_sha") or "")[:12]
    dirty = " with uncommitted changes" if code.get("dirty") else ""
    source = data.get("path") or data.get("train") or data.get("source") or ""
    found = {
        "model": " ".join(str(v) for v in (model.get("path"), model.get("revision")) if v),
        "data": " ".join(str(v) for v in (source, data.get("revision")) if v),
        "rows": ", ".join(rows),
        "seed": str(config.get("seed", "")),
        "made": str(record.get("created") or ""),
        "code": f"{commit}{dirty}" if commit else str(code.get("version") or ""),
    }
    return [(name, value) for name, value in found.items() if value]


def outcome(metrics: Mapping[str, Any], study_shown: bool) -> dict[str, Any]:
    """The table of base against tuned, McNemar's test and the study's published figures.

    A cell is a figure and what stands small below it.
    """
    models = list(metrics["models"])
    both = len(models) == 2
    rows = []
    for title, cells, difference in outcome_rows(metrics, study_shown):
        value, _, ends = difference.partition(" ")
        rows.append((title, [*cells, (value, ends)] if both else cells))
    study = metrics["report"]
    published = [
        [average, *(figure(study[m]["f1"][average]) for m in ("base", "tuned"))]
        for average in (AVERAGES if "tuned" in study and study_shown else ())
    ]
    return {
        "head": [*models, *(["tuned − base"] if both else [])],
        "rows": rows,
        "sentences": [
            *([mcnemar_sentence(metrics["comparison"])] if both else []),
            baseline_sentence(metrics),
        ],
        "why": study["why_conventions_differ"].replace("`", "") if study_shown else "",
        "published": published,
    }


def per_class(metrics: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """By model, a row for each class: name, precision, recall, F1, rows and their share."""
    keys = ("precision", "recall", "f1", "support")
    return {
        name: [
            [
                item["name"],
                *(figure(item[key]) for key in keys),
                share(item["support"], model["rows"]),
            ]
            for item in model["per_class"]
        ]
        for name, model in metrics["models"].items()
    }


def picture(title: str, chart: str, note: str = "") -> dict[str, Any]:
    """A chart, whose own texts are escaped in it, under a title."""
    return {"title": title, "chart": Markup(chart), "note": note}


def pictures(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Confusion and, where the model gave scores, calibration."""
    drawn, names = [], metrics["task"]["names"]
    for name, model in metrics["models"].items():
        columns = [*names, *model["confusion_columns"][len(names) :]]
        chart = charts.confusion(name, model["confusion"], columns)
        drawn.append(picture(f"Confusion, {name}", chart, "Rows: truth. Shade: share of row."))
    for name, model in metrics["models"].items():
        if model.get("calibration"):
            chart = charts.calibration(name, model["calibration"])
            note = f"ECE {figure(model['ece'])}. Faint bars stand on few rows; dashes: perfect."
            drawn.append(picture(f"Calibration, {name}", chart, note))
    return drawn


def training(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss, learning rate and speed over the optimizer steps."""

    def series(key: str) -> list[tuple[float, float]]:
        found = [line for line in log if is_number(line.get("step")) and is_number(line.get(key))]
        return [(float(line["step"]), float(line[key])) for line in found]

    loss = series("loss")
    even = charts.smooth([y for _, y in loss])
    drawn = {
        ("Loss", "loss per token"): {
            "each step": loss,
            "smoothed": [(x, y) for (x, _), y in zip(loss, even, strict=True)],
            "validation": series("validation_loss"),
        },
        ("Learning rate", "learning rate"): {"learning rate": series("learning_rate")},
        ("Training speed", "tokens a second"): {"tokens a second": series("tokens_per_second")},
    }
    return [
        picture(title, chart)
        for (title, unit), lines in drawn.items()
        if (chart := charts.lines(title, lines, "optimizer step", unit, title == "Loss"))
    ]


def jobs(
    starts: Sequence[Attempt], submissions: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The timeline of jobs with their interruptions, and what was submitted."""
    if not starts and not submissions:
        return None
    return {
        "timeline": Markup(charts.timeline(starts[-_LISTED:])) if starts else "",
        "ends": _ENDS,
        "gpu_hours": attempts.gpu_hours(starts),
        "count": len(starts),
        "starts": [
            [
                f"{a.name} {attempts.task_text(a.task)}".strip(),
                a.job,
                _clock(a.started),
                f"{attempts.lasted(a):,.0f} s",
                a.verdict or "running",
                a.reason,
            ]
            for a in starts[-_LISTED:]
        ],
        "submitted": len(submissions),
        "submissions": [
            [_clock(s.get("time")), *(s.get(key, "") for key in _SUBMISSION)]
            for s in submissions[-_LISTED:]
        ],
    }


_SUBMISSION = ("name", "job", "executor", "command")


def _clock(seconds: Any) -> str:
    if not is_number(seconds):
        return "–"
    return time.strftime("%m-%d %H:%M:%S", time.gmtime(seconds))


def throughput(run: RunPaths) -> list[list[str]]:
    """Rows a second of training and of each model's inference, over whole jobs."""
    rows = []
    log = [line for line in training_log(run) if is_number(line.get("seconds"))]
    seconds = sum(line["seconds"] for line in log)
    if seconds:
        examples, tokens = (
            sum(line["seconds"] * (line.get(key) or 0.0) for line in log) / seconds
            for key in ("examples_per_second", "tokens_per_second")
        )
        rows.append(["train", f"{examples:,.2f}", f"{tokens:,.0f}"])
    progress = run.progress("").parent
    for model in sorted(progress.iterdir()) if progress.is_dir() else ():
        shards = [_read(path) for path in sorted(model.glob("*.json"))]
        rates = [s["rows_per_second"] for s in shards if is_number(s.get("rows_per_second"))]
        if rates:
            rows.append([f"infer {model.name}, a shard", f"{sum(rates) / len(rates):,.2f}", "–"])
    return rows


def mistakes(
    model: str, found: Mapping[str, Sequence[Mapping[str, Any]]], task: Mapping[str, Any]
) -> dict[str, Any]:
    """The worst mistakes of a model, with the text, and answers that could not be parsed."""
    kinds = (
        ("mistakes", f"The {len(found['mistakes'])} worst mistakes, {model}"),
        ("unparsed", f"Answers that could not be parsed, {model}"),
    )
    return {
        "model": model,
        "kinds": [
            {
                "title": title,
                "open": kind == "mistakes" and model == "tuned",
                "items": [_mistake(item, task["names"]) for item in found[kind]],
            }
            for kind, title in kinds
            if found[kind]
        ],
    }


def _mistake(item: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    said, review = item["prediction"], item["review"]
    answer = "no label" if said is None else f"label {said}"
    if said is not None and 0 <= said < len(names):
        answer = names[said]
    sure = f", confidence {item['confidence']:.2f}" if item["confidence"] is not None else ""
    return {
        "title": f"{names[item['label']]} taken for {answer}",
        "note": f"{sure} (row {item['row']})",
        "wrote": (item["answer"] or "")[:200],
        "review": review[:700] + ("…" if len(review) > 700 else ""),
    }


def provenance(record: Mapping[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """What run.json holds, a line a value, by where it is shown; the first is not folded away."""
    parts: dict[str, list[tuple[str, Any]]] = {"": [], "Configuration": [], "Packages": []}
    for key, value in _leaves(record):
        if key == "code.diff" and value:
            value = f"{len(str(value).splitlines())} lines, in run.json"
        part = {"config": "Configuration", "packages": "Packages"}.get(key.partition(".")[0], "")
        if not key.startswith("submissions"):
            parts[part].append((key, value))
    return {title: lines for title, lines in parts.items() if lines}


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}{key}.")
    elif value is not None:
        yield prefix.removesuffix("."), value
