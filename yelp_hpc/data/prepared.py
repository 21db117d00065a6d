"""The prepared sets as they are written: a chunk of rows at a time, whatever their number.

Writes `prepare/{train,validation,test}.parquet` and LLaMA-Factory's alpaca records of the same
rows; what the sets have in common is kept on the way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

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
        self._instruction, _, self._before = head.rpartition("\n")
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

    def count(self, name: str, row: int, label: int, ids: list[int]) -> None:
        """Take in one row."""
        self.rows[name] += 1
        self.tokens[name] += len(ids)
        if label >= 0:  # -1: a row without one
            self.classes[name][label] += 1
        self._digest.update(f"{name} {row} {label} {ids}\n".encode())
        if self._common is None:
            self._common, self._shortest = ids, len(ids)
        elif ids[: len(self._common)] != self._common:
            self._common = ids[: common_prefix([self._common, ids])]
        self._shortest = min(self._shortest, len(ids))
        self.longest = max(self.longest, len(ids))

    def record(self, text: str, label: int) -> dict[str, str]:
        """An alpaca record."""
        return {
            "instruction": self._instruction,
            "input": self._before + text + self._after,
            "output": self.labels[label],
        }

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

    def add(self, rows: Sequence[int], labels: Sequence[int], texts: Sequence[str]) -> None:
        """Tokenise and write some rows."""
        ids, used = self.whole.prompt.fit(texts)
        self.whole.truncated += sum(a != b for a, b in zip(texts, used, strict=True))
        for row, label, text, one in zip(rows, labels, used, ids, strict=True):
            first = not self.whole.rows[self.name]
            self.whole.count(self.name, row, label, one)
            if self.records is None:
                continue
            record = json.dumps(self.whole.record(text, label), indent=2, ensure_ascii=False)
            lines = record.replace("\n", "\n  ")  # a line break inside of a text is escaped
            self.records.write(f"{'' if first else ','}\n  {lines}")
        lengths = [len(one) for one in ids]
        columns = [list(rows), list(labels), used, ids, lengths]
        arrays = [pa.array(c, type=f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        self.held.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
        self.held_tokens += sum(lengths)
        if self.held_tokens > _GROUP_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one row group."""
        if self.held or not self.whole.rows[self.name]:
            self.writer.write_table(pa.Table.from_batches(self.held, schema=SCHEMA))
        self.held, self.held_tokens = [], 0
