"""Data files: the faulty row is named by its line, whatever the format."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yelp_hpc.data.sources import read_file
from yelp_hpc.errors import RequestError

ROWS = [('good\nfood, "really"', 4), ("naïve café", 0), ("x" * 200_000, 2)]


def written(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"reviews.{kind}"
    if kind == "csv":
        lines = [f'{label},"{text.replace(chr(34), chr(34) * 2)}"' for text, label in ROWS]
        path.write_text("label,text\n" + "\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in ROWS))
    else:
        texts, labels = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_all_formats_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert list(read_file(written(tmp_path, kind), "text", "label")) == ROWS


@pytest.mark.parametrize("place", ["a-file/cache", "~nobody9/cache"])
def test_where_no_cache_can_be_written_rows_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """As on nodes whose home is read-only, or is not there."""
    (tmp_path / "a-file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YELP_HPC_CACHE", place)
    assert list(read_file(written(tmp_path, "jsonl"), "text", "label")) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"label,text\n1,fine\n,\n", "line 3: text is empty"),
        ("a.csv", b"label,text\n7,fine\n", "line 2: label is '7'"),
        ("a.csv", b"label,text\n1.5,fine\n", "label is '1.5'"),
        ("a.csv", b"label,text\n1,caf\xe9\n", "not UTF-8 text.*line 2"),
        ("a.csv", b"stars,review\n1,fine\n", "no column text and no column label.*stars, review"),
        ("a.csv", b"label,text\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b'label,text\n1,"open\n', "cannot be read"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": null, "label": null}\n', "line 1: text is empty"),
        ("a.jsonl", b'{"text": "a", "label": true}\n', "label is True"),
        ("a.parquet", b"PAR1 nonsense", "cannot be read"),
        ("a.txt", b"hello", "must end in"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=expected) as caught:
        read_file(path, "text", "label")
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        read_file(tmp_path / "none.csv", "text", "label")


def test_many_faults_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("label,text\n" + "9,x\n" * 50)
    with pytest.raises(RequestError, match=r"50 rows.*\n.*line 2: label is '9' in 50 rows"):
        read_file(path, "text", "label")
    path.write_text("label,text\n" + "1,\n" * 50)
    with pytest.raises(RequestError, match=r"50 rows.*\n[\s\S]*and 40 more"):
        read_file(path, "text", "label")
