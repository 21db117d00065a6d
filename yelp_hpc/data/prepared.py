"""The prepared sets as they are written: a chunk of rows at a time, whatever their number.

Writes `prepare/{train,validation,test}.parquet` and LLaMA-Factory's alpaca records of the same
rows; what the sets have in common is kept on the way.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.config import Config
from yelp_hpc.data.prompt import Prompt, common_prefix
from yelp_hpc.rundir.files import atomic_path, write_json
from yelp_hpc.rundir.paths import SPLITS, RunPaths

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("label", pa.int16()),
        ("text", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("length", pa.int32()),
    ]
)
_GROUP_TOKENS = 4_000_000
"""Tokens of a row group: what a writer and a reader hold at once."""
_AHEAD = 2
"""Chunks that wait for the tokenizer or for being written."""
_quoted = json.JSONEncoder(ensure_ascii=False).encode
Chunk = tuple[Sequence[int], Sequence[int], list[str]]
"""Row ids, labels and texts of some rows."""


class PreparedSets:
    """Counts, the shared beginning and the fingerprint of all that was written."""

    def __init__(self, paths: RunPaths, config: Config, prompt: Prompt) -> None:
        self.paths, self.prompt, self.labels = paths, prompt, config.task.labels
        self.rows = dict.fromkeys(SPLITS, 0)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.classes = {name: [0] * len(self.labels) for name in SPLITS}
        self.truncated = 0
        self._digest = hashlib.sha256()
        self._common: list[int] | None = None
        self._shortest = self.longest = 0
        head, tail = config.prompt.template.split("{review}")
        instruction, _, self._before = head.rpartition("\n")
        self._instruction = _quoted(instruction)
        self._after = tail.removesuffix("{label}").rstrip()

    @contextmanager
    def writing(self, name: str, alpaca: bool = True) -> Iterator[_Set]:
        """Write one set, whole or not at all; without `alpaca`, its table alone."""
        with ExitStack() as stack:
            table = stack.enter_context(atomic_path(self.paths.split(name)))
            records = None
            if alpaca:
                path = stack.enter_context(atomic_path(self.paths.alpaca(name)))
                records = stack.enter_context(path.open("w", encoding="utf-8"))
                records.write("[")
            part = _Set(self, name, stack.enter_context(pq.ParquetWriter(table, SCHEMA)), records)
            yield part
            part.flush()
            if records is not None:
                records.write("\n]\n")

    def count(
        self, name: str, rows: Sequence[int], labels: Sequence[int], ids: Sequence[list[int]]
    ) -> None:
        """Take in some rows."""
        self.rows[name] += len(rows)
        for row, label, one in zip(rows, labels, ids, strict=True):
            self.tokens[name] += len(one)
            if label >= 0:  # -1: a row without one
                self.classes[name][label] += 1
            self._digest.update(f"{name} {row} {label} {one}\n".encode())
            if self._common is None:
                self._common, self._shortest = one, len(one)
            elif one[: len(self._common)] != self._common:
                self._common = one[: common_prefix([self._common, one])]
            self._shortest = min(self._shortest, len(one))
            self.longest = max(self.longest, len(one))

    def record(self, text: str, label: int) -> str:
        """An alpaca record as it stands in its file: indented as by `json.dump`."""
        lines = (
            f'"instruction": {self._instruction}',
            f'"input": {_quoted(self._before + text + self._after)}',
            f'"output": {_quoted(self.labels[label])}',
        )
        return "\n  {\n    " + ",\n    ".join(lines) + "\n  }"

    def write_info(self) -> None:
        """Write LLaMA-Factory's list of the sets."""
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        info = {
            f"yelp_{name}": {"file_name": self.paths.alpaca(name).name, "columns": columns}
            for name in SPLITS
        }
        write_json(self.paths.dataset_info, info)

    def prefix(self) -> list[int]:
        """The token ids that every prompt of the run begins with: never a token of a text."""
        return self.prompt.prefix(self._common or [], self._shortest)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over row ids, labels and token ids of all sets, in the order of writing."""
        return self._digest.hexdigest()


class _Set:
    """One set on its way to its files."""

    def __init__(self, whole: PreparedSets, name: str, writer: Any, records: TextIO | None) -> None:
        self.whole, self.name, self.writer, self.records = whole, name, writer, records
        self.held: list[pa.RecordBatch] = []
        self.held_tokens = 0

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Tokenise and write rows; while some are read and written, a thread tokenises others."""
        waiting: deque[tuple[Chunk, Future[Any]]] = deque()
        with ThreadPoolExecutor(1) as thread:  # one: a call of the tokenizer sets its state
            for chunk in chunks:
                waiting.append((chunk, thread.submit(self.whole.prompt.fit, chunk[2])))
                if len(waiting) > _AHEAD:
                    self._write(*waiting.popleft())
            while waiting:
                self._write(*waiting.popleft())

    def _write(self, chunk: Chunk, fitted: Future[tuple[list[list[int]], list[str]]]) -> None:
        rows, labels, texts = chunk
        ids, used = fitted.result()
        self.whole.truncated += sum(a != b for a, b in zip(texts, used, strict=True))
        if self.records is not None:
            records = ",".join(map(self.whole.record, used, labels))
            self.records.write("," + records if self.whole.rows[self.name] else records)
        self.whole.count(self.name, rows, labels, ids)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, ends[-1])
        columns = [list(rows), list(labels), used, pa.ListArray.from_arrays(ends, tokens), lengths]
        arrays = [
            c if isinstance(c, pa.Array) else pa.array(c, type=f.type)
            for c, f in zip(columns, SCHEMA, strict=True)
        ]
        self.held.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
        self.held_tokens += len(tokens)
        if self.held_tokens > _GROUP_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one row group."""
        if self.held or not self.whole.rows[self.name]:
            self.writer.write_table(pa.Table.from_batches(self.held, schema=SCHEMA))
        self.held, self.held_tokens = [], 0
