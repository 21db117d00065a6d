"""What a study's FILE asks for: its runs, their configurations, and who makes what they share.

FILE maps dotted keys to lists of values (every combination is tried); `settings`, or a list in
place of the mapping, names settings one by one. Pure but for reading FILE and the config.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from yelp_hpc.config import load_config
from yelp_hpc.errors import RequestError, all_problems, problems_in
from yelp_hpc.explain import shown
from yelp_hpc.own_files import shipped
from yelp_hpc.rundir.changes import readers
from yelp_hpc.rundir.manifest import Asked
from yelp_hpc.rundir.study import SHARED, Study, StudyRun, is_study, read_by, read_study
from yelp_hpc.settings import read_yaml

Values = dict[str, Any]
MOST = 500
"""More runs than this are taken for a mistake."""
_UNTRAINED = "infer.models: a study ranks trained models, so it must name tuned"
_READ_FOR = {"prepare": ("prepare",), "base": ("prepare", "infer")}


def plan_study(
    file: str | Path, config_file: str, overrides: Sequence[str], out: str | Path
) -> tuple[Study, dict[str, Asked]]:
    """The study and, by run, the configuration that is asked for. Writes nothing.

    A run that the folder holds already keeps its name.

    Raises:
        RequestError: with everything that is wrong.
    """
    base = load_config(config_file, overrides)
    settings, seeds = read_file(shipped(file), base.config.seed)
    fixed = list(overrides)
    if base.config.data.seed is None:
        fixed.append(f"data.seed={base.config.seed}")  # else each seed would test other rows
    before = read_study(out) if is_study(out) else Study(Path(out).resolve(), ())
    runs: list[StudyRun] = []
    asked: dict[str, Asked] = {}
    problems: list[str] = []
    for run in named(settings, seeds, before.runs):
        changes = [*fixed, *(_assignment(k, v) for k, v in run.values.items())]
        changes.append(_assignment("seed", run.seed))
        try:
            loaded = load_config(config_file, changes)
        except RequestError as error:
            said = [line.replace("--set: ", f"{file}: ", 1) for line in problems_in(error)]
            problems += [line for line in said if line not in problems]
            continue
        if "tuned" not in loaded.config.infer.models and _UNTRAINED not in problems:
            problems.append(_UNTRAINED)
        asked[run.name] = Asked(loaded, config_file, changes)
        runs.append(run)
    known = [run.name for run in before.runs]  # first: what they made is there already
    runs.sort(key=lambda run: known.index(run.name) if run.name in known else len(known))
    gone = {*known} - {run.name for run in runs}
    if gone and not problems:
        problems.append(
            f"{before.root} holds {', '.join(sorted(gone))}, which {file} does not ask for: "
            "name another --out, or move study.json and these runs away"
        )
    if problems:
        raise RequestError(all_problems(f"{file} cannot be used:", problems))
    record = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "file": str(file),
        "config": config_file,
        "overrides": list(overrides),
        **before.record,
    }
    return Study(before.root, tuple(shared(runs, asked)), record), asked


def read_file(path: Path, seed: int) -> tuple[list[Values], list[int]]:
    """The settings, in order and each once, and the seeds that FILE names.

    Raises:
        RequestError: with everything that is wrong.
    """
    content, _, problems = read_yaml(path)
    if isinstance(content, list):
        content = {"settings": content}
    if not isinstance(content, dict) or not content:
        raise RequestError(f"{path} must map keys of the config to lists of values: {_EXAMPLE}")
    problems += _wrong(content)
    if problems:
        raise RequestError(all_problems(f"{path} cannot be used:", problems))
    seeds = content.pop("seed", [seed])
    listed = content.pop("settings", [{}])
    if (count := math.prod(map(len, content.values()))) > MOST:
        raise RequestError(f"{path} asks for {count} runs; a study has {MOST} at most")
    grid = [dict(zip(content, values, strict=True)) for values in product(*content.values())]
    settings: list[Values] = []
    for one in ({**values, **setting} for setting in listed for values in grid):
        if one not in settings:
            settings.append(one)
    count = len(settings) * len(seeds)
    if count > MOST:
        raise RequestError(f"{path} asks for {count} runs; a study has {MOST} at most")
    return settings, seeds


_EXAMPLE = "`train.learning_rate: [5e-5, 1e-4]`"


def _wrong(content: Mapping[Any, Any]) -> Iterator[str]:
    listed = content.get("settings", [{}])
    if not isinstance(listed, list) or not listed or not all(isinstance(s, dict) for s in listed):
        yield "settings: a list of mappings is wanted: - {train.learning_rate: 5e-5, lora.rank: 8}"
        listed = []
    for key, values in content.items():
        if key == "settings":
            continue
        if not isinstance(values, list) or not values:
            yield f"{key}: a list of values is wanted, {shown(values)} is none: {_EXAMPLE}"
        elif any(value in values[:i] for i, value in enumerate(values)):
            yield f"{key}: a value stands there twice"
        if any(key in setting for setting in listed):
            yield f"{key}: stands in settings, too"
    if any("seed" in setting for setting in listed):
        yield "settings: give the seeds once, for all settings: `seed: [1, 2, 3]`"
    seeds = content.get("seed", [0])
    if isinstance(seeds, list) and not all(type(seed) is int and seed >= 0 for seed in seeds):
        yield "seed: whole numbers from 0 on are wanted"
    pairs = [(k, v) for k, values in content.items() if isinstance(values, list) for v in values]
    for key, value in [*pairs, *(pair for setting in listed for pair in setting.items())]:
        if key != "settings" and not _is_json(value):
            yield f"{key}: {shown(value)} is no value of a config; a text stands in quotes"
    for key in dict.fromkeys([*content, *(key for setting in listed for key in setting)]):
        if not isinstance(key, str) or not all(part.strip() for part in key.split(".")):
            yield f"{shown(key)}: a dotted key of the config is wanted"
        elif key not in ("settings", "seed") and not {"prepare", "train", "infer"} & {
            *readers(key)
        }:
            yield f"{key}: no result depends on it, so it cannot be varied"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):  # a date; a list that holds itself
        return False
    return True


def named(
    settings: Sequence[Values], seeds: Sequence[int], before: Sequence[StudyRun]
) -> Iterator[StudyRun]:
    """A run for each setting and seed: `TT-seedN`; those that are there keep their number."""
    trials = {_key(run.values): run.trial for run in before}
    following = max(trials.values(), default=0) + 1
    for values in settings:
        if _key(values) not in trials:
            trials[_key(values)] = following
            following += 1
        trial = trials[_key(values)]
        for seed in seeds:
            yield StudyRun(f"{trial:02d}-seed{seed}", trial, values, seed)


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def shared(runs: Sequence[StudyRun], asked: Mapping[str, Asked]) -> Iterator[StudyRun]:
    """The runs with what each takes: of the first run whose stages read the same values."""
    makers: dict[str, str] = {}
    for run in runs:
        config = asked[run.name].loaded.config
        takes = {}
        for part in SHARED:
            read = read_by(config, *_READ_FOR[part])
            maker = makers.setdefault(f"{part} {_key(read)}", run.name)
            if maker != run.name and (part == "prepare" or "base" in config.infer.models):
                takes[part] = maker
        yield StudyRun(run.name, run.trial, run.values, run.seed, takes)


def _assignment(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"
