"""predict: prepare and collect of a request for predictions; what lies between them is infer.

Reads the request, its input and the model's tokenizer. `prepare` writes `prepare/test.parquet` (a
row a row of the input, label -1 where there is none) and `tokens.json`; `collect` checks that every
row has its answer, writes the file that was asked for, the metrics beside it where the rows have
labels, and answered.json last.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.config import Config
from yelp_hpc.data.files import format_of
from yelp_hpc.data.formats.arrow_rows import arrow_batches, arrow_schema
from yelp_hpc.data.formats.endings import BINARY_FORMATS
from yelp_hpc.data.labels import value_text
from yelp_hpc.data.output import table_writer
from yelp_hpc.data.prepared import Chunk, PreparedSets
from yelp_hpc.errors import StageError
from yelp_hpc.evaluation.joined import (
    BATCH,
    Answers,
    answer_columns,
    answer_schema,
    require_complete,
)
from yelp_hpc.evaluation.measure import measure
from yelp_hpc.evaluation.outcome import print_outcome
from yelp_hpc.inference.answers import answer_names
from yelp_hpc.inference.provenance import wanted
from yelp_hpc.progress import say, track
from yelp_hpc.rundir.files import (
    TEMPORARY,
    abandoned,
    damaged_files,
    json_bytes,
    read_marker,
    remove,
    sha256_file,
    sweep,
    write_bytes,
    write_json,
    write_marker,
)
from yelp_hpc.rundir.manifest import update_run
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.request import Request, read_request
from yelp_hpc.stages.rows import input_files, named_inputs, read_input, scan, text_of

Record = dict[Any, Any]
CHUNK = 500  # texts a call of the tokenizer


def prepare(paths: RunPaths, config: Config) -> None:
    """Tokenise the input's rows, unless that is done.

    Raises:
        RequestError: the input cannot be used; every faulty row is named.
        StageError: the input or the base model is not what it was when the request was made.
    """
    sweep(paths.prepare, paths.root)
    if not damaged_files(paths.prepare):
        say("prepare: done already, nothing to do")
        return
    request = read_request(paths)
    require_input(request)
    found = scan(request, config.task, answer_names(config, request.prefix))
    if found.why_unlabelled:
        say(f"prepare: no metrics: {found.why_unlabelled}")

    # Imported here: a faulty input is reported before the slow imports.
    from yelp_hpc.models.load import check_tokenizer, load_tokenizer
    from yelp_hpc.models.local import folder_fingerprint, model_folder
    from yelp_hpc.stages.door import admit, check_lengths
    from yelp_hpc.stages.prepare import bind_prompt, tokens_of

    folder = model_folder(config.model)
    fingerprint = folder_fingerprint(folder)
    if request.base_fingerprint and fingerprint != request.base_fingerprint:
        raise StageError(
            f"{folder} is not the base model of {request.run}: its fingerprint is "
            f"{fingerprint[:12]}…, the run was made with {request.base_fingerprint[:12]}…"
        )
    for note in admit(config, folder).notes:
        say(f"prepare: {note}")
    tokenizer = load_tokenizer(folder)
    end = check_tokenizer(tokenizer, folder)
    prompt = bind_prompt(config, tokenizer)
    sets = PreparedSets(paths, config, prompt)
    rows = read_input(request)

    def chunks() -> Iterator[Chunk]:
        starts = range(0, found.rows, CHUNK)
        for start in track(starts, len(starts), "tokenise"):
            chunk = [record for _, record in islice(rows, CHUNK)]
            labels = [_label(record, request, found.classes) for record in chunk]
            ids = range(start, start + len(chunk))
            yield ids, labels, [text_of(record, request) for record in chunk]

    with sets.writing("test", alpaca=False) as part:
        part.add(chunks())
    check_lengths(config, folder, sets.longest + prompt.longest_answer)
    write_json(paths.tokens, tokens_of(config, prompt, tokenizer, end, sets.prefix()))
    update_run(
        paths,
        data={
            "rows": {"test": sets.rows["test"]},
            "tokens": {"test": sets.tokens["test"]},
            "truncated": sets.truncated,
            "fingerprint": sets.fingerprint,
        },
        model={
            "path": config.model.path,
            "revision": config.model.revision,
            "folder": str(folder),
            "fingerprint": fingerprint,
        },
    )
    covered = [paths.split("test").name, paths.tokens.name]
    write_marker(paths.prepare, covered, labelled=found.classes is not None)
    say(f"prepare: {sets.rows['test']:,} rows, {sets.tokens['test']:,} tokens")
    if sets.truncated:
        say(f"prepare: {sets.truncated:,} texts over {config.data.cutoff} tokens lost their end")


def _label(record: Mapping[Any, Any], request: Request, classes: Mapping[str, int] | None) -> int:
    return -1 if classes is None else classes[value_text(record.get(request.label_column))]


def require_input(request: Request) -> None:
    """Check that the input is what it was when the request was made.

    Raises:
        RequestError: a file is gone.
        StageError: a file has other bytes.
    """
    for name, path in named_inputs(request.input).items():
        if request.sha256.get(name) != sha256_file(path):
            raise StageError(
                f"{path} has changed since it was asked for: give the same `predict` command again"
            )


def collect(paths: RunPaths, config: Config) -> None:
    """Write the file that was asked for.

    Raises:
        StageError: a row has no answer, a shard cannot be used, the input has changed, or a file
            cannot be written; the message says which, and nothing is written then.
    """
    request = read_request(paths)
    sweep(paths.root)
    marker = read_marker(paths.prepare) or {}
    labelled = bool(marker.get("labelled"))
    require_input(request)
    require_complete(paths, config, labelled)
    out = Path(request.out)
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):  # the folder is the user's own
        if (writer := TEMPORARY.fullmatch(path.name)) and abandoned(path, writer):
            remove(path)
    rows = 0
    made = {**wanted(paths, config, request.model).metadata(), "yelp_hpc.run": request.run}
    made |= {f"yelp_hpc.input.{name}": digest for name, digest in request.sha256.items()}
    added = pa.schema(answer_schema(config, request.prefix))
    stream = Answers(paths, config, request.model)
    total = pq.read_metadata(paths.split("test")).num_rows
    schema, chunks = _input_chunks(request)
    with table_writer(out, pa.schema([*schema, *added], metadata=made)) as write:
        for chunk in track(chunks, -(-total // BATCH), "join"):
            ids = pa.array(range(rows, rows + len(chunk)), pa.int64())
            columns = answer_columns(stream.of(ids), config)
            arrays = [column.cast(f.type) for f, column in zip(added, columns, strict=True)]
            rows += len(chunk)
            if isinstance(chunk, list):
                answers = pa.Table.from_arrays(arrays, schema=added).to_pylist()
                write([{**row, **answer} for row, answer in zip(chunk, answers, strict=True)])
                continue
            for field, column in zip(added, arrays, strict=True):
                chunk = chunk.append_column(field, column)
            write(chunk)
    if rows != total:
        out.unlink()
        raise StageError(f"{request.input} has changed since its rows were prepared")
    metrics = None
    if labelled:
        metrics, _ = measure(paths, config)
        content = json_bytes(metrics)
        write_bytes(paths.metrics, content)
        write_bytes(request.metrics, content)
    write_json(
        paths.answered,
        {
            "request": asdict(request),
            "out": str(out),
            "rows": rows,
            "bytes": out.stat().st_size,
            "sha256": sha256_file(out),
            "model": vars(wanted(paths, config, request.model)),
        },
    )
    if metrics is not None:
        print_outcome(metrics)
        say(f"wrote {request.metrics}")
    say(f"wrote {rows:,} rows to {out}")


def _input_chunks(request: Request) -> tuple[pa.Schema, Iterator[pa.Table | list[Record]]]:
    """The input's columns as they are, and its rows in order: tables, or records of plain text."""
    paths = input_files(request.input)
    if all(format_of(path) in BINARY_FORMATS for path in paths):
        return _tables_of(paths)
    schema = _schema_of(request)
    chunks = _record_chunks(request)
    if Path(request.out).suffix.lower() != ".parquet":
        return schema, chunks
    return schema, (
        pa.Table.from_arrays([_column(chunk, field) for field in schema], schema=schema)
        for chunk in chunks
    )


def _tables_of(paths: list[Path]) -> tuple[pa.Schema, Iterator[pa.Table]]:
    schemas = [arrow_schema(path).remove_metadata() for path in paths]
    schema = pa.unify_schemas(schemas, promote_options="permissive")

    def tables() -> Iterator[pa.Table]:
        for path in paths:
            for batch in arrow_batches(path, BATCH):
                table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
                columns = [
                    table[field.name].cast(field.type)
                    if field.name in table.column_names
                    else pa.nulls(len(table), field.type)
                    for field in schema
                ]
                yield pa.Table.from_arrays(columns, schema=schema)

    return schema, tables()


def _record_chunks(request: Request) -> Iterator[list[Record]]:
    rows = read_input(request)
    while chunk := [record for _, record in islice(rows, BATCH)]:
        yield chunk


def _schema_of(request: Request) -> pa.Schema:
    """Each column's type by the values that it holds: truth values, numbers, else text."""
    kinds: dict[str, set[str]] = {}
    for chunk in _record_chunks(request):
        for record in chunk:
            for name, value in record.items():
                kinds.setdefault(name, set()).add(_kind(value))
    return pa.schema({name: _type(found - {"none"}) for name, found in kinds.items()})


def _kind(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53:
        return "text"  # as a float it would be another number
    return type(value).__name__


def _type(kinds: set[str]) -> pa.DataType:
    if kinds and kinds <= {"int", "float"}:
        return pa.float64() if "float" in kinds else pa.int64()
    return pa.bool_() if kinds == {"bool"} else pa.string()


def _column(chunk: list[Record], field: pa.Field) -> pa.Array:
    """A column's values; in one of texts, what is none as JSON."""
    values = [record.get(field.name) for record in chunk]
    if pa.types.is_string(field.type):
        values = [
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for v in values
        ]
    return pa.array(values, field.type)
