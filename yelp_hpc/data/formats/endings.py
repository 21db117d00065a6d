"""How the names of data files end, in lower case."""

from __future__ import annotations

TEXT_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
BINARY_FORMATS = (".parquet", ".arrow", ".feather")
FORMATS = (*TEXT_FORMATS, *BINARY_FORMATS)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zip": "zip"}
"""Of text; ending → its name in pyarrow."""
ENDINGS = (*FORMATS, *COMPRESSIONS)
