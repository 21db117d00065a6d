"""A study's table: each trial's mean and spread over its seeds, chosen on validation rows.

Reads the training logs, the shards and the starts of jobs of each finished run; writes nothing. The
intervals are of a bootstrap over seeds and over test rows at once; all trials see the same rows in
a resample, so that their differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from yelp_hpc.config import Config
from yelp_hpc.errors import StageError, YelpHpcError, first_line
from yelp_hpc.evaluation.across.compared import SEED, cost, tally
from yelp_hpc.evaluation.across.shared import Entry, Shared, read_shared
from yelp_hpc.evaluation.measure import number
from yelp_hpc.evaluation.metrics import Counts, Floats, cell_sums
from yelp_hpc.evaluation.significance import headline, percentiles
from yelp_hpc.rundir.collected import collected
from yelp_hpc.rundir.files import read_marker, sha256_file
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.record import training_log
from yelp_hpc.rundir.study import Study, StudyRun

VALIDATION = ("validation_loss", "validation_accuracy", "validation_f1_macro")
_AT_ONCE = 4_000_000
"""Bound on the cells of one batch of resamples."""
Drawn = dict[str, Floats]


def leaderboard(study: Study) -> dict[str, Any]:
    """The content of leaderboard.json, from what is finished.

    Raises:
        StageError: no run is finished, or one holds predictions that are not its own.
        RequestError: the runs' test rows have nothing in common.
    """
    finished: dict[str, tuple[RunPaths, Config]] = {}
    unfinished: dict[str, str] = {}
    for run in study.runs:
        try:
            finished[run.name] = _finished(study.run(run))
        except YelpHpcError as error:
            unfinished[run.name] = first_line(error)
    if not finished:
        lines = [f"{name}: {why}" for name, why in unfinished.items()]
        raise StageError("no run of the study is finished:\n" + "\n".join(lines[:5]))
    shared = read_shared([*finished.values()])
    tuned = {entry.run.root.name: entry for entry in shared.entries if entry.model == "tuned"}
    done = [run for run in study.runs if run.name in finished]
    trials = {trial: [run for run in done if run.trial == trial] for trial in _trials(done)}
    resamples = max(config.collect.bootstrap for _, config in finished.values())
    drawn = resample(
        shared, {t: [tuned[run.name] for run in runs] for t, runs in trials.items()}, resamples
    )
    alike = len({_prepared(paths) for paths, _ in finished.values()}) == 1
    criterion = VALIDATION[0] if alike else VALIDATION[1]
    asked = {t: sum(run.trial == t for run in study.runs) for t in trials}
    board = [
        _trial(study, runs, shared, tuned, drawn[trial], asked[trial])
        for trial, runs in trials.items()
    ]
    chosen = _choose(board, criterion)
    for line in board:
        line["chosen"] = line is chosen
        other = chosen is not None and line is not chosen
        line["minus_chosen"] = _difference(line, chosen, drawn) if chosen and other else None
    return {
        "study": study.root.name,
        "rows": len(shared.labels),
        "task": {"names": [*shared.task.shown], "ordinal": shared.task.ordinal},
        "criterion": criterion,
        "trials": sorted(board, key=lambda line: _rank(line, criterion)),
        "base": _base(shared),
        "unfinished": unfinished,
        "cost": _sum([cost(study.run(run)) for run in study.runs]),
        "method": {
            "chosen": _WHY[alike],
            "interval": "percentile bootstrap over seeds and test rows, 95 %",
            "resamples": resamples,
            "seed": SEED,
        },
        "made_of": {run.name: sha256_file(study.run(run).metrics) for run in done},
    }


_WHY = {
    True: "the lowest validation loss, mean over seeds",
    False: "the highest validation accuracy, mean over seeds (the trials were prepared "
    "differently, so that their losses do not compare)",
}


def _finished(run: RunPaths) -> tuple[RunPaths, Config]:
    paths, config = load_run(run.root)
    for what, there in (
        ("prepared", read_marker(paths.prepare) is not None),
        ("trained", read_marker(paths.adapter) is not None),
        ("collected", collected(paths)),
    ):
        if not there:
            raise StageError(f"it is not {what}")
    return paths, config


def _trials(runs: Sequence[StudyRun]) -> list[int]:
    return sorted({run.trial for run in runs})


def _prepared(paths: RunPaths) -> str:
    return sha256_file(paths.split("validation")) + sha256_file(paths.tokens)


def validation(run: RunPaths) -> dict[str, float]:
    """The figures on all validation rows at the end of a training; {} where there are none.

    Those of an earlier step are of another adapter, and of a sample of the rows.
    """
    last = [{}, *training_log(run)][-1]
    return {key: float(last[key]) for key in VALIDATION if last.get(key) is not None}


def _trial(
    study: Study,
    runs: Sequence[StudyRun],
    shared: Shared,
    tuned: Mapping[str, Entry],
    drawn: Drawn,
    asked: int,
) -> dict[str, Any]:
    ordinal = shared.task.ordinal
    test = [headline(tally(shared, tuned[run.name].codes), ordinal) for run in runs]
    checks = [validation(study.run(run)) for run in runs]
    return {
        "trial": runs[0].trial,
        "values": dict(runs[0].values),
        "runs": {run.name: run.seed for run in runs},
        "complete": len(runs) == asked,
        "validation": {
            key: spread([check[key] for check in checks])
            for key in VALIDATION
            if all(key in check for check in checks)
        },
        "test": {
            name: {
                **spread([float(values[name]) for values in test]),
                "ci95": percentiles(drawn[name]),
            }
            for name in test[0]
        },
        "cost": _sum([cost(study.run(run)) for run in runs]),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves.

    Null where one is undefined (no answer was parsed), and the deviation of one value, too.
    """
    deviation = number(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": number(np.mean(values)), "sd": deviation, "values": [*map(number, values)]}


def _rank(line: Mapping[str, Any], criterion: str) -> tuple[bool, float, int]:
    found = line["validation"].get(criterion)
    if found is None:
        return True, 0.0, line["trial"]
    sign = 1 if criterion == VALIDATION[0] else -1
    return not line["complete"], sign * found["mean"], line["trial"]


def _choose(lines: Sequence[dict[str, Any]], criterion: str) -> dict[str, Any] | None:
    """The best of the trials of which every seed is done; None where nothing was validated."""
    able = [line for line in lines if line["complete"] and criterion in line["validation"]]
    return min(able, key=lambda line: _rank(line, criterion), default=None)


def _difference(
    line: Mapping[str, Any], chosen: Mapping[str, Any], drawn: Mapping[int, Drawn]
) -> dict[str, Any]:
    mine, best = drawn[line["trial"]], drawn[chosen["trial"]]
    found = {}
    for name, test in line["test"].items():
        means = test["mean"], chosen["test"][name]["mean"]
        value = None if None in means else means[0] - means[1]
        found[name] = {"value": value, "ci95": percentiles(mine[name] - best[name])}
    return found


def resample(
    shared: Shared, trials: Mapping[int, Sequence[Entry]], resamples: int
) -> dict[int, Drawn]:
    """By trial, its statistics in each resample `[resamples]`: a mean over seeds drawn again.

    Rows are drawn with replacement, once for all trials; then the seeds of each trial.
    """
    entries = [entry for group in trials.values() for entry in group]
    patterns, counts = np.unique(
        np.stack([shared.labels, *(entry.codes for entry in entries)]), axis=1, return_counts=True
    )
    generator = np.random.default_rng(SEED)
    parts: dict[int, dict[str, list[Floats]]] = {trial: {} for trial in trials}
    at_once = max(1, _AT_ONCE // len(counts))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size=size)
        column = iter(patterns[1:])
        for trial, group in trials.items():
            each = [_statistics(shared, drawn, patterns[0], next(column)) for _ in group]
            which = generator.integers(0, len(group), (len(group), size))
            for name in each[0]:
                values = np.stack([one[name] for one in each])
                mean = np.take_along_axis(values, which, axis=0).mean(axis=0)
                parts[trial].setdefault(name, []).append(mean)
    return {
        trial: {name: np.concatenate(found) for name, found in names.items()}
        for trial, names in parts.items()
    }


def _statistics(shared: Shared, drawn: Counts, truth: Counts, column: Counts) -> Drawn:
    sums = cell_sums(drawn, truth, column, shared.classes)
    return headline(sums, shared.task.ordinal)


def _base(shared: Shared) -> dict[str, float | None] | None:
    """The base model's figures, where all runs have the same one."""
    bases = [entry for entry in shared.entries if entry.model == "base"]
    if not bases or any(not np.array_equal(base.codes, bases[0].codes) for base in bases):
        return None
    values = headline(tally(shared, bases[0].codes), shared.task.ordinal)
    return {name: number(value) for name, value in values.items()}


def _sum(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in costs) for key in costs[0]}
