"""Data files as people have them: read right, or one message that says what to set."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yelp_hpc.config import Config
from yelp_hpc.data.sources import read_source
from yelp_hpc.errors import RequestError
from yelp_hpc.task import YELP, TaskConfig

TEXTS = ["awful place", 'so-so, "fine"', "it was\nokay", "naïve café", "love ★ it"]
ROWS = [(text, i) for i, text in enumerate(TEXTS)]
INTENTS = TaskConfig(labels=("card_arrival", "top_up_failed", "lost_card"), noun="message")
KINDS = {"id": "int64", "text": "string"}
STARS = TaskConfig(**{**YELP.model_dump(), "values": ["1", "2", "3", "4", "5"]})
Write = Callable[[Path], Path]


def table(labels: list[Any], text: str = "text", label: str = "label") -> list[dict[str, Any]]:
    return [{label: value, text: one} for value, one in zip(labels, TEXTS, strict=False)]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",", header: bool = True) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def file(name: str, content: str | bytes) -> Write:
    def write(folder: Path) -> Path:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return folder / name

    return write


def zipped(name: str, members: dict[str, str]) -> Write:
    def write(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return folder / name

    return write


def zst(folder: Path) -> Path:
    with pa.output_stream(str(folder / "r.jsonl.zst"), compression="zstd") as out:
        out.write(lines(table(list(range(5)))).encode())
    return folder / "r.jsonl.zst"


def parquet(labels: list[Any], names: list[str] | None = None) -> Write:
    def write(folder: Path) -> Path:
        found = pa.table({"text": TEXTS[: len(labels)], "label": labels})
        if names:
            feature = {"names": names, "_type": "ClassLabel"}
            about = {"info": {"features": {"label": feature}}}
            found = found.replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(found, folder / "r.parquet")
        return folder / "r.parquet"

    return write


def arrow(folder: Path) -> Path:
    found = pa.table({"text": TEXTS, "label": list(range(5))})
    with pa.OSFile(str(folder / "r.arrow"), "wb") as out, pa.ipc.new_file(out, found.schema) as w:
        w.write_table(found)
    return folder / "r.arrow"


def saved(splits: bool = False) -> Write:
    def write(folder: Path) -> Path:
        from datasets import Dataset, DatasetDict

        plain = Dataset.from_dict({"text": TEXTS, "label": list(range(5))})
        found = DatasetDict(train=plain, test=plain) if splits else plain
        found.save_to_disk(folder / "saved")
        return folder / "saved"

    return write


def parts(pattern: str) -> Write:
    def write(folder: Path) -> Path:
        rows = table(list(range(5)))
        file("parts/a-0.csv", as_csv(rows[:2]))(folder)
        file("parts/a-1.csv", as_csv(rows[2:]))(folder)
        return folder / pattern

    return write


KAGGLE = lines([{"review_id": "x", "stars": float(i + 1), "text": t} for t, i in ROWS])
YELP_ARCHIVE = "".join(
    f'"{i + 1}","' + text.replace("\n", "\\n").replace('"', '""') + '"\n' for text, i in ROWS
)
GOOD: dict[str, tuple[Write, dict[str, Any], TaskConfig]] = {
    "csv": (file("r.csv", as_csv(table(list(range(5))))), {}, YELP),
    "csv with a byte order mark": (
        file("r.csv", "\ufeff" + as_csv(table(list(range(5))))), {}, YELP),
    "tsv": (file("r.tsv", as_csv(table(list(range(5))), "\t")), {}, YELP),
    "upper-case ending": (file("R.CSV", as_csv(table(list(range(5))))), {}, YELP),
    "csv.gz": (file("r.csv.gz", gzip.compress(as_csv(table(list(range(5)))).encode())), {}, YELP),
    "jsonl.zst": (zst, {}, YELP),
    "csv in a zip": (zipped("r.csv.zip", {"r.csv": as_csv(table(list(range(5))))}), {}, YELP),
    "jsonl with a byte order mark": (
        file("r.jsonl", "\ufeff" + lines(table(list(range(5))))), {}, YELP),
    "json array": (file("r.json", json.dumps(table(list(range(5))), indent=1)), {}, YELP),
    "Kaggle's json, a record a line, floats": (
        file("yelp_academic_dataset_review.json", KAGGLE), {"label_column": "stars"}, STARS),
    "the archive of yelp_review_full": (
        file("train.csv", YELP_ARCHIVE),
        {"header": False, "label_column": 0, "text_column": 1, "escaped": True}, STARS),
    "parquet": (parquet(list(range(5))), {}, YELP),
    "parquet with floats": (parquet([0.0, 1.0, 2.0, 3.0, 4.0]), {}, YELP),
    "parquet with a ClassLabel in another order": (
        parquet([2, 0, 1], ["top_up_failed", "lost_card", "card_arrival"]), {}, INTENTS),
    "arrow": (arrow, {}, YELP),
    "save_to_disk": (saved(), {}, YELP),
    "a folder": (parts("parts"), {}, YELP),
    "a glob": (parts("parts/a-*.csv"), {}, YELP),
    "floats as text": (
        file("r.csv", as_csv(table(["0.0", "1.0", "2.0", "3.0", "4.0"]))), {}, YELP),
    "stars in words": (
        file("r.csv", as_csv(table(["1 star", "2 stars", "3 Stars", "4 stars", "★★★★★"]))),
        {}, YELP),
    "class names": (
        file("r.csv", as_csv(table(["Card_Arrival", "top_up_failed", "lost_card"]))), {}, INTENTS),
    "class numbers": (file("r.csv", as_csv(table([0, 1, 2]))), {}, INTENTS),
    "values": (
        file("r.csv", as_csv(table(["a", "b", "c"]))), {},
        TaskConfig(labels=("x", "y", "z"), values=("a", "b", "c"))),
    "a column that the first record lacks": (
        file("r.jsonl", lines([{"text": "awful place", "label": 0},
                               *({"id": i, **row} for i, row in enumerate(table(list(range(5)))[1:])
                                 )])), {}, YELP),
}  # fmt: skip
BAD: dict[str, tuple[Write, dict[str, Any], TaskConfig, str]] = {
    "stars 1 to 5": (
        file("r.csv", as_csv(table([1, 2, 3, 4, 5]))), {}, YELP,
        r"holds 1 to 5: stars\? set task.values=\[1, 2, 3, 4, 5\]"),
    "classes 1 to 3": (
        file("r.csv", as_csv(table([1, 2, 3]))), {}, INTENTS, r"set task.values=\[1, 2, 3\]"),
    "no header": (file("r.csv", YELP_ARCHIVE), {}, STARS, "data.header=false"),
    "two splits": (saved(True), {}, YELP, "saved/train and .*saved/test"),
    "an array called jsonl": (
        file("r.jsonl", json.dumps(table([0, 1]))), {}, YELP, "array belongs into a file named"),
    "a torn array": (file("r.json", '[{"text": "a", "label": 1}, {"te'), {}, YELP, "entry 2"),
    "several files in a zip": (
        zipped("r.csv.zip", {"a.csv": "", "b.csv": ""}), {}, YELP, "holds 2 files"),
    "an empty folder": (lambda folder: folder, {}, YELP, "holds no data file"),
    "a glob of nothing": (lambda folder: folder / "*.csv", {}, YELP, "no file matches"),
    "torn gzip": (
        file("r.csv.gz", gzip.compress(b"label,text\n" * 99)[:-9]), {}, YELP, "cannot be read"),
    "texts for labels": (
        file("r.csv", "label,text\n" + "".join(f"word {i},x\n" for i in range(6000))), {}, YELP,
        "over 5,000 different"),
    "other classes of a ClassLabel": (
        parquet([0, 1], ["ham", "spam"]), {}, INTENTS, "2 classes .ham, spam."),
    "two wrong names": (
        file("r.csv", as_csv(table(["card_arrival", "los_card", "refund"]))), {}, INTENTS,
        "'los_card', not one of card_arrival"),
}  # fmt: skip


def config_of(path: Path, data: dict[str, Any], task: TaskConfig) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {"source": "file", "train": str(path), "test_rows": 1, **data},
            "task": task.model_dump(),
        }
    )


@pytest.mark.parametrize("name", GOOD)
def test_it_is_read_right(name: str, tmp_path: Path) -> None:
    write, data, task = GOOD[name]
    found, test = read_source(config_of(write(tmp_path), data, task))
    assert list(found) == ROWS[: len(task.labels)]
    assert test is None


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_what_to_set(name: str, tmp_path: Path) -> None:
    write, data, task, expected = BAD[name]
    with pytest.raises(RequestError, match=expected):
        read_source(config_of(write(tmp_path), data, task))


def test_a_data_set_by_its_name_is_read_as_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes a folder for the name of one, too."""
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    names = ["top_up_failed", "lost_card", "card_arrival"]
    rows = [(f"{TEXTS[i % 5]} {i}", i % 3) for i in range(5_000)]
    found = pa.table(
        {"label": [y for _, y in rows], "id": range(5_000), "text": [t for t, _ in rows]}
    )
    feature = {"names": names, "_type": "ClassLabel"}
    kinds = {key: {"dtype": kind, "_type": "Value"} for key, kind in KINDS.items()}
    about = json.dumps({"info": {"features": {"label": feature, **kinds}}})
    (tmp_path / "named").mkdir()
    pq.write_table(
        found.replace_schema_metadata({"huggingface": about}), tmp_path / "named/r.parquet"
    )
    config = Config.model_validate(
        {
            "model": {"path": "m"},
            "data": {
                "source": "hub",
                "path": str(tmp_path / "named"),
                "test_split": None,
                "test_rows": 1,
            },
            "task": INTENTS.model_dump(),
        }
    )
    train, _ = read_source(config)
    order = [INTENTS.labels.index(name) for name in names]
    assert list(train) == [(text, order[i]) for text, i in rows]


def test_train_and_test_are_judged_together(tmp_path: Path) -> None:
    """A test set without 5 stars does not pass for one with labels 1 to 4."""
    train = file("a.csv", as_csv(table([1, 2, 3, 4, 5])))(tmp_path)
    test = file("b.csv", as_csv(table([1, 2, 3, 4])))(tmp_path)
    with pytest.raises(RequestError, match="stars"):
        read_source(config_of(train, {"test": str(test)}, YELP))
    _, found = read_source(config_of(train, {"test": str(test)}, STARS))
    assert found is not None
    assert [label for _, label in found] == [0, 1, 2, 3]


def test_texts_are_read_from_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))
    rows = [(f"{TEXTS[i % 5]} {i}", i % 5) for i in range(10_000)]
    path = file("r.csv", as_csv([{"label": y, "text": t} for t, y in rows]))(tmp_path)
    found, _ = read_source(config_of(path, {}, YELP))
    assert not [*(tmp_path / "cache/rows").iterdir()]
    assert list(found) == rows
    assert found[9_000] == rows[9_000] and found[-1] == rows[-1]
    assert found[4_094:4_099] == rows[4_094:4_099]
    asked = [8_191, 3, 9_999, 8_192, 0, 3]
    assert list(found.texts(asked)) == [rows[i][0] for i in asked]
    with pytest.raises(IndexError):
        found[10_000]
