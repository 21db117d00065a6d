"""The predictions beside what they are of: review, truth, each model's answer and probabilities.

Reads `prepare/test.parquet` and `infer/*/shard-*.parquet` a batch at a time; writes what `export
--predictions` names. In every table here `text` is the review; what a model wrote is `generated`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.config import Config
from yelp_hpc.data.files import records
from yelp_hpc.data.labels import number
from yelp_hpc.data.output import table_writer
from yelp_hpc.errors import StageError
from yelp_hpc.evaluation.coverage import (
    coverages_of,
    integers,
    read_scores,
    refuse_unless_complete,
)
from yelp_hpc.evaluation.metrics import softmax
from yelp_hpc.inference.answers import answer_names
from yelp_hpc.rundir.modes import refuse_foreign
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.task import TaskConfig

BATCH = 8192


def export_predictions(paths: RunPaths, config: Config, out: Path) -> int:
    """Write the joined table of a run's test set to `out`; returns its rows.

    Raises:
        RequestError: `out` is no csv, jsonl or parquet file, its folder is not there, or it is a
            file with other columns.
        StageError: as `joined`, or the file cannot be written.
    """
    rows, schema = 0, joined_schema(config)
    refuse_foreign(out, lambda there: list(next(records(there), ("", {}))[1]) == schema.names)
    with table_writer(out, schema) as write:
        for table in joined(paths, config):
            write(table)
            rows += table.num_rows
    return rows


def joined_schema(config: Config) -> pa.Schema:
    """The columns of `joined`.

    `row`, `text` (as the model read it), `truth` (a label; null where a row of `predict` has none),
    `truth_name`, and each model's `MODEL_answer` and so on, as `answer_schema` has them.
    """
    fields = [
        pa.field("row", pa.int64()),
        *(pa.field(name, pa.string()) for name in ("text", "truth", "truth_name")),
    ]
    for model in config.infer.models:
        fields += answer_schema(config, f"{model}_")
    return pa.schema(fields)


def joined(paths: RunPaths, config: Config) -> Iterator[pa.Table]:
    """Every test row with every model's answer, in the order of the test set.

    Raises:
        StageError: a row has no answer or two, a shard is torn or of another model, adapter or
            setting; the message names them and the commands that mend it. Nothing was yielded then.
    """
    task, schema = config.task, joined_schema(config)
    require_complete(paths, config, labelled=not paths.request.is_file())
    streams = {model: Answers(paths, config, model) for model in config.infer.models}
    labels, names = pa.array(task.labels), pa.array(task.shown)
    file = pq.ParquetFile(paths.split("test"))
    has_text = "text" in file.schema_arrow.names
    wanted_columns = ["row", "label", *(["text"] if has_text else [])]
    for batch in file.iter_batches(BATCH, columns=wanted_columns):
        codes = integers(batch.column("label"))
        truth = pa.array(np.maximum(codes, 0), mask=codes < 0)
        none = pa.nulls(batch.num_rows, pa.string())
        columns = [
            batch.column("row"),
            batch.column("text") if has_text else none,
            labels.take(truth),
            names.take(truth),
        ]
        for stream in streams.values():
            columns += answer_columns(stream.of(batch.column("row")), config)
        arrays = [c.cast(f.type) for c, f in zip(columns, schema, strict=True)]
        yield pa.Table.from_arrays(arrays, schema=schema)


def require_complete(paths: RunPaths, config: Config, labelled: bool = True) -> None:
    """Check that every test row has exactly one answer of each model of this run.

    Args:
        labelled: the test rows have labels.

    Raises:
        StageError: as `joined` does.
    """
    found = coverages_of(paths, config, labelled)
    for coverage in found:
        coverage.check()
    refuse_unless_complete(found)


class Answers:
    """A model's shards as one stream, in the order of the test set."""

    def __init__(self, paths: RunPaths, config: Config, model: str) -> None:
        shards = range(config.infer.shards)
        self._files = [paths.shard(model, shard, len(shards)) for shard in shards]
        self._batches = self._read()
        self._held = pa.table({})

    def _read(self) -> Iterator[pa.RecordBatch]:
        for path in self._files:
            yield from pq.ParquetFile(path).iter_batches(BATCH)

    def of(self, rows: pa.Array) -> pa.Table:
        """The answers of the next rows, which must be these.

        Raises:
            StageError: they are others: a shard was replaced while it was read.
        """
        parts = [self._held] if self._held.num_rows else []
        count = self._held.num_rows
        while count < len(rows) and (batch := next(self._batches, None)) is not None:
            parts.append(pa.Table.from_batches([batch]).replace_schema_metadata(None))
            count += batch.num_rows
        table = pa.concat_tables(parts) if parts else self._held
        self._held = table.slice(len(rows))
        taken = table.slice(0, len(rows)).combine_chunks()
        if not taken.num_rows or taken["row"].to_pylist() != rows.to_pylist():
            raise StageError(
                f"{self._files[0].parent}: its rows are not in the order of the test set; make the "
                "shards again: remove the folder, then run infer"
            )
        return taken


def answer_schema(config: Config, prefix: str = "") -> list[pa.Field]:
    """The columns of `answer_names` with their types; see `expected_values` for `expected`."""
    words = {f"{prefix}{name}" for name in ("answer", "name", "generated")}
    return [
        pa.field(name, pa.string() if name in words else pa.float32())
        for name in answer_names(config, prefix)
    ]


def answer_columns(shard: pa.Table, config: Config) -> list[pa.Array]:
    """The columns of `answer_schema` from rows of a shard."""
    task, count = config.task, len(shard)
    given = shard["prediction"].combine_chunks()
    codes = integers(given)
    usable = ~integers(given.is_null()).astype(bool) & (codes >= 0) & (codes < len(task.labels))
    places = pa.array(np.where(usable, codes, 0), mask=~usable)
    columns = [pa.array(texts).take(places) for texts in (task.labels, task.shown)]
    if config.infer.mode == "answer":
        return columns
    scores = read_scores(
        shard["scores"].combine_chunks(), np.where(usable, codes, 0), ~usable, len(task.labels)
    )
    if scores is None:
        numbers = [pa.nulls(count, pa.float32())] * (len(task.labels) + task.ordinal)
    else:
        chances = softmax(scores)
        numbers = [pa.array(column, pa.float32()) for column in chances.T]
        if task.ordinal:
            numbers.append(pa.array(chances @ np.array(expected_values(task)), pa.float32()))
    columns += numbers
    if config.infer.mode == "generate":
        columns.append(shard["text"].combine_chunks())
    return columns


def expected_values(task: TaskConfig) -> list[float]:
    """What each label counts in the expected value: itself where all are numbers, else its place.

    >>> from yelp_hpc.task import YELP
    >>> expected_values(YELP)
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    numbers = [found for label in task.labels if (found := number(label)) is not None]
    whole = len(numbers) == len(task.labels)
    return list(map(float, numbers if whole else range(len(task.labels))))
