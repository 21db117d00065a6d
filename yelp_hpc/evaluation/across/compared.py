"""Finished runs side by side: what differs in their settings, their figures, paired tests, cost.

Reads run.json, the prepared test sets, the shards and the starts of jobs of each run; writes
nothing. Every figure is of the rows that all runs share, whatever their own metrics.json says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from yelp_hpc.config import Config
from yelp_hpc.evaluation.across.shared import Entry, Shared, read_shared
from yelp_hpc.evaluation.measure import number
from yelp_hpc.evaluation.metrics import Counts
from yelp_hpc.evaluation.significance import (
    bootstrap_draws,
    bootstrap_p,
    discordant,
    headline,
    headline_intervals,
    holm,
    joint_table,
    mcnemar,
    paired_statistics,
    percentiles,
)
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.changes import dotted, readers
from yelp_hpc.rundir.files import read_object
from yelp_hpc.rundir.paths import RunPaths

SEED = 42
"""Of the resamples: the same runs give the same figures."""
_RESULT = {"prepare", "train", "infer"}
"""Stages that a difference of settings must reach to be shown."""
_RECORDED = (
    ("data", "fingerprint"), ("model", "fingerprint"), ("code", "git_sha"), ("image", "sha256"),
)  # fmt: skip


def compare(runs: Sequence[tuple[RunPaths, Config]]) -> dict[str, Any]:
    """The comparison as JSON holds it: `models`, `settings`, `pairs`, `cost`, `rows`, `method`.

    Raises:
        RequestError: the runs' tasks differ, or they share no row.
        StageError: a run's predictions are not complete.
    """
    shared = read_shared(runs)
    entries = distinct(shared)
    names = {str(run.root): name for (run, _), name in zip(runs, run_names(runs), strict=True)}
    resamples = max([2000, *(config.collect.bootstrap for _, config in runs)])
    # the smallest p that resamples can give must stay small when Holm multiplies it
    pairs = math.comb(len(entries), 2)
    resamples = max(resamples, 200 * pairs)
    models = []
    for place, entry in enumerate(entries):
        label = names[str(entry.run.root)]
        models.append(
            {"id": letter(place), "run": label, **model_figures(shared, entry, resamples)}
        )
    return {
        "rows": {
            "shared": len(shared.labels),
            "of": {names[str(entry.run.root)]: entry.rows for entry in entries},
        },
        "task": {
            "labels": [*shared.task.labels],
            "names": [*shared.task.shown],
            "ordinal": shared.task.ordinal,
        },
        "models": models,
        "settings": differing({names[str(run.root)]: facts(run, config) for run, config in runs}),
        "pairs": paired(shared, entries, resamples),
        "cost": {names[str(run.root)]: cost(run) for run, _ in runs},
        "method": {
            "interval": "percentile bootstrap over the shared rows, 95 %",
            "paired": "exact McNemar; paired bootstrap over the shared rows; Holm over all pairs",
            "resamples": resamples,
            "seed": SEED,
        },
    }


def letter(place: int) -> str:
    """A, B, … Z, AA, AB, … as a spreadsheet's columns."""
    text = ""
    while place >= 0:
        text = chr(ord("A") + place % 26) + text
        place = place // 26 - 1
    return text


def run_names(runs: Sequence[tuple[RunPaths, Config]]) -> list[str]:
    """As little of each path as tells the runs apart: the folder's name, else the path."""
    names = [run.root.name for run, _ in runs]
    return names if len(set(names)) == len(names) else [str(run.root) for run, _ in runs]


def distinct(shared: Shared) -> list[Entry]:
    """The entries, but a base model whose answers another run's base gave too stands there once."""
    kept: list[Entry] = []
    for entry in shared.entries:
        same = (
            entry.model == other.model == "base"
            and entry.config.model.path == other.config.model.path
            and np.array_equal(entry.codes, other.codes)
            for other in kept
        )
        if not any(same):
            kept.append(entry)
    return kept


def tally(shared: Shared, codes: Counts) -> Counts:
    """How often each label `[K]` got each answer, `[K, K + 2]`."""
    width = shared.classes + 2
    flat = np.bincount(shared.labels * width + codes, minlength=shared.classes * width)
    return flat.reshape(shared.classes, width)


def model_figures(shared: Shared, entry: Entry, resamples: int) -> dict[str, Any]:
    """One model's figures on the shared rows, with their intervals."""
    counts = tally(shared, entry.codes)
    ordinal = shared.task.ordinal
    values = {k: number(v) for k, v in headline(counts, ordinal).items()}
    ends = headline_intervals(counts, ordinal=ordinal, resamples=resamples, seed=SEED)
    return {
        "model": entry.model,
        "rows": int(counts.sum()),
        "unparsed": int(counts[:, shared.classes].sum()),
        "metrics": {name: {"value": value, "ci95": ends[name]} for name, value in values.items()},
    }


def paired(shared: Shared, entries: Sequence[Entry], resamples: int) -> list[dict[str, Any]]:
    """Each pair of models on the same rows: McNemar, differences (second minus first), Holm."""
    found: list[dict[str, Any]] = []
    ordinal = shared.task.ordinal
    for (i, first), (j, second) in combinations(enumerate(entries), 2):
        joint = joint_table(shared.labels, first.codes, second.codes, shared.classes)
        drawn = bootstrap_draws(
            joint.counts,
            partial(joint.statistics, ordinal=ordinal),
            resamples=resamples,
            seed=SEED,
        )
        rows = discordant(joint)
        found.append(
            {
                "first": letter(i),
                "second": letter(j),
                "only_first_right": rows["only_base_right"],
                "only_second_right": rows["only_tuned_right"],
                "both_right": rows["both_right"],
                "both_wrong": rows["both_wrong"],
                "mcnemar": mcnemar(rows["only_base_right"], rows["only_tuned_right"]),
                "difference": {
                    name: {
                        "value": number(value),
                        "ci95": percentiles(drawn[name]),
                        "p": bootstrap_p(drawn[name]),
                    }
                    for name, value in paired_statistics(joint, ordinal).items()
                },
            }
        )
    if found:
        tests = [pair["mcnemar"] for pair in found]
        for test, p in zip(tests, holm([test["exact_p"] for test in tests]), strict=True):
            test["holm_p"] = p
        for name in found[0]["difference"]:
            differences = [pair["difference"][name] for pair in found]
            for one, p in zip(differences, holm([one["p"] for one in differences]), strict=True):
                one["holm_p"] = p
    return found


def facts(run: RunPaths, config: Config) -> dict[str, Any]:
    """Dotted key → value of all that a run's predictions depend on, as far as run.json knows it."""
    found = {
        key: value
        for key, value in dotted(config.model_dump(mode="json"))
        if _RESULT & set(readers(key)) and key != "infer.models" and key != "infer.shards"
    }
    record = read_object(run.run_json)
    for section, key in _RECORDED:
        part = record.get(section)
        found[f"{section}.{key}"] = part.get(key) if isinstance(part, dict) else None
    return found


def differing(by_run: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Key → run → value, of the keys that are not the same in every run."""
    keys = dict.fromkeys(key for values in by_run.values() for key in values)
    columns = {key: {run: values.get(key) for run, values in by_run.items()} for key in keys}
    return {
        key: column
        for key, column in columns.items()
        if any(value != next(iter(column.values())) for value in column.values())
    }


def cost(run: RunPaths) -> dict[str, float]:
    """What the starts of a run's jobs took: hours of jobs, and of GPUs."""
    starts = attempts.of_run(run)
    seconds = sum(map(attempts.lasted, starts))
    used, lost = attempts.gpu_hours(starts)
    return {"job_hours": seconds / 3600, "gpu_hours": used, "gpu_hours_lost": lost}


def grouped(column: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each value of a key as text, with the runs that have it."""
    found: dict[str, list[str]] = {}
    for run, value in column.items():
        text = "–" if value is None else str(value)
        if Path(text).is_absolute():
            text = Path(text).name
        found.setdefault(text, []).append(run)
    yield from found.items()
