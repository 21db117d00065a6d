"""The reviews and the generated texts of the answers that a report shows.

Reads only the row groups of `prepare/test.parquet` and the batches of the shards that hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from yelp_hpc.evaluation.counting import Counting
from yelp_hpc.evaluation.coverage import integers
from yelp_hpc.rundir.paths import RunPaths


def examples_of(paths: RunPaths, counting: Counting) -> dict[str, list[dict[str, Any]]]:
    """The worst mistakes and the first unparsed answers, with the review and what was generated."""
    chosen = {"mistakes": counting.mistakes, "unparsed": counting.unparsed}
    test = counting.coverage.test
    places = np.array([m.position for kind in chosen.values() for m in kind], dtype=np.int64)
    reviews = _texts_at(paths.split("test"), sorted(set(places.tolist())))
    ids = dict(zip(places.tolist(), test.row_ids(places), strict=True))
    return {
        kind: [
            {
                "row": ids[m.position],
                "label": m.label,
                "prediction": m.prediction,
                "confidence": m.confidence,
                "review": reviews.get(m.position, ""),
                "answer": _generated(m.path, ids[m.position]),
            }
            for m in found
        ]
        for kind, found in chosen.items()
    }


def _texts_at(test: Path, positions: list[int]) -> dict[int, str]:
    """The reviews at some positions of the test set; only their row groups are read."""
    file = pq.ParquetFile(test)
    if "text" not in file.schema_arrow.names:
        return {}
    texts: dict[int, str] = {}
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        inside = [place for place in positions if start <= place < stop]
        if inside:
            column = file.read_row_group(group, columns=["text"])["text"]
            texts |= {place: str(column[place - start].as_py()) for place in inside}
        start = stop
    return texts


def _generated(path: Path, row: int) -> str | None:
    """What the model wrote for a row; None in score mode."""
    file = pq.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        return None
    for batch in file.iter_batches(columns=["row", "text"]):
        places = np.flatnonzero(integers(batch.column("row")) == row)
        if len(places):
            text: str | None = batch.column("text")[int(places[0])].as_py()
            return text
    return None
