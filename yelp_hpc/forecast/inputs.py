"""What a plan is made from: the model's shape, the lengths of the sequences, a card's name.

Reads a model's config.json, a run's `prepare/` or the configured source; imports no torch.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import NormalDist

from yelp_hpc.cache import cached_folders, check_demo
from yelp_hpc.config import Config
from yelp_hpc.data.answer_tree import answer_tree, answers_of, scored_answers
from yelp_hpc.errors import RequestError
from yelp_hpc.forecast.model_shape import KNOWN, ModelShape, as_stored, model_shape
from yelp_hpc.forecast.work import Lengths
from yelp_hpc.models.checkpoint import tensor_entries, weight_files
from yelp_hpc.rundir.files import parse_json, read_json
from yelp_hpc.rundir.paths import SPLITS, RunPaths

# English prose in a tokenizer of 50,000 or more entries; a rule of thumb for what is not prepared.
CHARACTERS_PER_TOKEN = 4.2
MEAN_TOKENS = 200  # of a prompt whose reviews are not here
SPREAD = 0.75  # standard deviation of the logarithm of a review's length
HUB_ROWS = {"Yelp/yelp_review_full": (650_000, 50_000)}
"""Rows of data sets on the Hub, for a plan without a download (their cards)."""


def read_shape(config: Config) -> ModelShape:
    """The configured model's shape: its folder, the cache of `fetch`, or a model known here.

    Raises:
        RequestError: none of them has it, or its config.json describes no decoder.
    """
    path = config.model.path
    for folder in _model_folders(path, config.model.revision):
        file = folder / "config.json"
        if file.is_file():
            try:
                values = parse_json(file.read_bytes())
            except (ValueError, OSError) as error:
                raise RequestError(f"{file} is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise RequestError(f"{file} is not a JSON object")
            shape = model_shape(values, str(file))
            return as_stored(shape, values, _tensors(folder), str(file))
    if path in KNOWN:
        return model_shape(KNOWN[path], path)
    check_demo(path)
    raise RequestError(
        f"model.path {path} is no folder here and is not in the cache, so its sizes are not known: "
        "run `python -m yelp_hpc fetch --config FILE` first"
    )


def _tensors(folder: Path) -> dict[str, list[int]]:
    """Name → sizes of every weight in a folder's safetensors; {} where it has none."""
    if not any(folder.glob("*.safetensors")):
        return {}
    files = weight_files(folder, whole=False)
    return {
        name: entry["shape"]
        for path in files
        if path.suffix == ".safetensors"
        for name, entry in tensor_entries(path).items()
    }


def _model_folders(path: str, revision: str | None) -> list[Path]:
    local = Path(path).expanduser()
    return [local] if local.is_dir() else cached_folders(path, revision)


def prepared_lengths(run: RunPaths) -> Lengths | None:
    """The lengths in a run's `prepare/`, None where it is not complete.

    Raises:
        StageError: a file is torn.
    """
    if not run.tokens.is_file() or not all(run.split(name).is_file() for name in SPLITS):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokens = read_json(run.tokens)
    prefix, answers = len(tokens["prefix"]), [len(answer) for answer in answers_of(tokens)]
    behind = len(answer_tree(scored_answers(tokens)).tokens)
    own: dict[str, list[int]] = {}
    for name in SPLITS:
        try:
            table = pq.read_table(run.split(name), columns=["length", "label"])
        except (OSError, pa.ArrowException) as error:
            raise RequestError(f"{run.split(name)} cannot be read: {error}") from None
        rows = zip(table["length"].to_pylist(), table["label"].to_pylist(), strict=True)
        own[name] = [
            length - prefix + (behind if name == "test" else answers[label])
            for length, label in rows
        ]
    train, validation, test = (own[name] for name in SPLITS)
    return Lengths(train, validation, test, prefix, "counted in prepare/", behind)


def estimated_lengths(config: Config, mean_tokens: float | None = None) -> Lengths:
    """Lengths without a tokenizer: from the reviews' characters, or from a mean.

    The rows are the run's own where the source is a file or the demo; for a Hub data set, or with
    `mean_tokens` (of a whole prompt), lengths are drawn from a log-normal distribution.

    Raises:
        RequestError: the source cannot be used, or its number of rows is not known.
        StageError: the demo's reviews cannot be fetched.
    """
    head = len(config.prompt.template.split("{review}")[0])
    prefix = max(1, round(head / CHARACTERS_PER_TOKEN))
    # the line break, "Output:" and the answer; the tree of a test prompt is about as large as all
    # labels without their last tokens
    answers = [math.ceil(len(label) / CHARACTERS_PER_TOKEN) for label in config.task.labels]
    tail = 3 + round(sum(answers) / len(answers))
    behind = sum(answers) - len(answers) - tail + 4 if max(answers) > 1 else 0
    most = config.data.cutoff - prefix
    if config.data.source == "hub":
        mean = mean_tokens or MEAN_TOKENS
        counts = _hub_counts(config)
        source = f"assumed mean {mean:.0f} (--tokens changes it)"
        drawn = _log_normal(sum(counts), max(1.0, mean - prefix), most, config.seed)
        sets, start = [], 0
        for count in counts:
            sets.append(drawn[start : start + count])
            start += count
        return Lengths(sets[0], sets[1], [n + behind for n in sets[2]], prefix, source, behind)
    # what reads reviews is on the job side; the login node has neither numpy nor pyarrow
    from yelp_hpc.data.sampling import split_rows
    from yelp_hpc.data.sources import read_source

    train, test = read_source(config)
    splits = split_rows(
        train.labels.tolist(),
        None if test is None else test.labels.tolist(),
        config.data,
        config.seed,
        config.task.labels,
    )
    test = train if test is None else test

    def own(text: str) -> int:
        return min(most, math.ceil(len(text) / CHARACTERS_PER_TOKEN) + tail)

    lengths = [
        [own(text) for text in rows.texts(chosen)]
        for rows, chosen in (
            (train, splits.train),
            (train, splits.validation),
            (test, splits.test),
        )
    ]
    source = f"estimated at {CHARACTERS_PER_TOKEN} characters a token"
    if mean_tokens:
        every = [n for part in lengths for n in part]
        scale = max(1.0, mean_tokens - prefix) / (sum(every) / len(every))
        lengths = [[max(1, min(most, round(n * scale))) for n in part] for part in lengths]
        source = f"scaled to a mean of {mean_tokens:.0f}"
    tested = [n + behind for n in lengths[2]]
    return Lengths(lengths[0], lengths[1], tested, prefix, source, behind)


def _hub_counts(config: Config) -> tuple[int, int, int]:
    data = config.data
    known = HUB_ROWS.get(data.path or "", (None, None))
    train, test = data.train_rows or known[0], data.test_rows or known[1]
    missing = [key for key, n in (("data.train_rows", train), ("data.test_rows", test)) if not n]
    if train is None or test is None:
        raise RequestError(
            f"how many rows {data.path} has is not known here: set {' and '.join(missing)}, or "
            "run prepare first and name its --run"
        )
    validation = round(train * data.validation_share)
    return train - validation, validation, test


def _log_normal(count: int, mean: float, most: int, seed: int) -> list[int]:
    """`count` lengths of a log-normal distribution with this mean, cut at `most`, shuffled."""
    location = math.log(mean) - SPREAD**2 / 2
    normal = NormalDist(location, SPREAD)
    levels = [normal.inv_cdf((i + 0.5) / 1000) for i in range(1000)]
    drawn = [max(1, min(most, round(math.exp(levels[i % 1000])))) for i in range(count)]
    random.Random(seed).shuffle(drawn)
    return drawn
