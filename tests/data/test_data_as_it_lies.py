"""Data files as people have them: read right, or one message that says what to set."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from yelp_hpc.config import Config
from yelp_hpc.data.sources import read_source
from yelp_hpc.errors import RequestError
from yelp_hpc.task import YELP, TaskConfig

TEXTS = ["awful place", 'so-so, "fine"', "it was\nokay", "naïve café", "love ★ it"]
ROWS = [(text, i) for i, text in enumerate(TEXTS)]
INTENTS = TaskConfig(labels=("card_arrival", "top_up_failed", "lost_card"), noun="message")
KINDS = {"id": "int64", "text": "string"}
QUOTE = '"'
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


def orders(folder: Path) -> Path:
    (folder / "d").mkdir()
    for name, at in (("a", 0), ("b", 1)):
        names = [*INTENTS.labels[at:], *INTENTS.labels[:at]]
        parquet([0, 1, 2], names)(folder).rename(folder / f"d/{name}.parquet")
    return folder / "d"


def arrow(folder: Path) -> Path:
    found = pa.table({"text": TEXTS, "label": list(range(5))})
    with pa.OSFile(str(folder / "r.arrow"), "wb") as out, pa.ipc.new_file(out, found.schema) as w:
        w.write_table(found)
    return folder / "r.arrow"


def as_binary(name: str, found: Any, **options: Any) -> Write:
    def write(folder: Path) -> Path:
        if name.endswith(".parquet"):
            pq.write_table(found, folder / name)
        elif name.endswith(".feather"):
            feather.write_feather(found, folder / name, **options)
        else:
            with pa.ipc.new_stream(str(folder / name), found.schema) as out:
                out.write_table(found)
        return folder / name

    return write


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


def locked(folder: Path) -> Path:
    path = zipped("r.zip", {"r.csv": as_csv(table([0, 1]))})(folder)
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):
        content[at] |= 1  # the flag of an encrypted member
    path.write_bytes(content)
    return path


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
    "semicolons": (file("r.csv", as_csv(table(list(range(5))), ";")), {}, YELP),
    "bars": (file("r.csv", as_csv(table(list(range(5))), "|")), {}, YELP),
    "tabs in a csv": (file("r.csv", as_csv(table(list(range(5))), "\t")), {}, YELP),
    "commas in a tsv": (file("r.tsv", as_csv(table(list(range(5))))), {}, YELP),
    "Excel's first line": (
        file("r.csv", "sep=;\r\n" + as_csv(table(list(range(5))), ";")), {}, YELP),
    "a space behind each comma": (
        file("r.csv", 'label, text\n' + "".join(
            f'{i}, "{text.replace(QUOTE, QUOTE * 2)}"\n' for text, i in ROWS)), {}, YELP),
    "empty lines first": (file("r.csv", "\n\n" + as_csv(table(list(range(5))))), {}, YELP),
    "names with spaces and two marks": (
        file("r.csv", "\ufeff\ufeff" + as_csv(table(list(range(5)), " text ", "label\t"))),
        {}, YELP),
    "a comma at each line's end": (
        file("r.csv", as_csv([{"label": i, "text": text, "": ""} for text, i in ROWS])
             .replace("text,\r", "text\r")), {}, YELP),
    "two columns without a name": (
        file("r.csv", as_csv([{"label": i, "text": text, "": 1} for text, i in ROWS])
             .replace("text,\r", "text,,\r").replace(",1\r", ",1,2\r")), {}, YELP),
    "line ends of old Macs": (
        file("r.csv", as_csv(table(list(range(5)))).replace("\r\n", "\r")), {}, YELP),
    "a zip named so alone, a folder in it": (
        zipped("r.zip", {"d/": "", "d/r.csv": as_csv(table(list(range(5)))), "d/.DS_Store": "x",
                         "__MACOSX/d/._r.csv": "x", "d/README": "x"}), {}, YELP),
    "hidden files in a folder": (
        lambda folder: (file("d/._r.csv", b"\0\5")(folder),
                        file("d/r.csv", as_csv(table(list(range(5)))))(folder).parent)[1],
        {}, YELP),
    "labels with spaces and in other letters": (
        file("r.csv", as_csv(table([" Card_Arrival", "top_up_failed\u00a0", "LOST_card\t"]))),
        {}, INTENTS),
    "an accent of its own": (
        file("r.csv", as_csv(table(["cafe\u0301", "bar"]))), {},
        TaskConfig(labels=("caf\u00e9", "bar"))),
    "truth values": (
        file("r.jsonl", lines(table([False, True]))), {}, TaskConfig(labels=("False", "True"))),
    "truth values by any spelling": (
        file("r.csv", as_csv(table(["FALSE", "true"]))), {}, TaskConfig(labels=("False", "True"))),
    "huge whole numbers": (
        file("r.jsonl", lines(table([10**18, 10**18 + 1]))), {},
        TaskConfig(labels=("a", "b"), values=(str(10**18), str(10**18 + 1)))),
    "labels that differ in letter case": (
        file("r.csv", as_csv(table(["US", "us"]))), {}, TaskConfig(labels=("US", "us"))),
    "names that differ in letter case": (
        file("r.csv", as_csv(table(["X", "x"]))), {},
        TaskConfig(labels=("a", "b"), names=("X", "x"))),
    "a ClassLabel whose names differ in letter case": (
        parquet([0, 1], ["US", "us"]), {}, TaskConfig(labels=("US", "us"))),
    "values that are floats, of a column of floats": (
        parquet([1.0, 2.0]), {}, TaskConfig(labels=("a", "b"), values=("1.0", "2.0"))),
    "labels with an exponent, of a column of numbers": (
        parquet([1000, 2000]), {}, TaskConfig(labels=("1e3", "2e3"))),
    "labels with zeros before and without": (
        file("r.csv", as_csv(table(["01", "1"]))), {}, TaskConfig(labels=("01", "1"))),
    "a label of composed letters, one of its parts in the data": (
        file("r.csv", as_csv(table(["caf\u00e9", "bar"]))), {},
        TaskConfig(labels=("cafe\u0301", "bar"))),
    "parquet with dictionaries": (
        as_binary("r.parquet", pa.table({
            "text": pa.array(TEXTS).dictionary_encode(),
            "label": pa.array([str(i) for i in range(5)]).dictionary_encode()})), {}, YELP),
    "parquet with decimals": (
        as_binary("r.parquet", pa.table({
            "text": TEXTS, "label": [Decimal(f"{i}.00") for i in range(5)]})), {}, YELP),
    "an Arrow stream": (
        as_binary("r.arrow", pa.table({"text": TEXTS, "label": list(range(5))})), {}, YELP),
    "feather": (
        as_binary("r.feather", pa.table({"text": TEXTS, "label": list(range(5))}),
                  compression="zstd"), {}, YELP),
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
    "a spelling between two labels": (
        file("r.csv", as_csv(table(["US", "us", "Us"]))), {}, TaskConfig(labels=("US", "us")),
        "label is 'Us', not one of US, us"),
    "other classes of a ClassLabel": (
        parquet([0, 1], ["ham", "spam"]), {}, INTENTS, "2 classes .ham, spam."),
    "numbers that are other labels, too": (
        file("r.csv", as_csv(table([0, 1, 2]))), {}, TaskConfig(labels=("1", "2", "3")),
        r"holds 1: by itself '1', with the others '2'; .*: \[0, 1, 2\] if it is the second"),
    "names that are other labels, too": (
        file("r.csv", as_csv(table([1, 2]))), {}, TaskConfig(labels=("0", "1"), names=("1", "2")),
        "holds 1: by itself '2', with the others '1'"),
    "a ClassLabel half in another order": (
        parquet([0, 1, 2], ["lost_card", "refund", "card_arrival"]), {}, INTENTS,
        "only some are among task.labels, and in another order"),
    "files that count other classes": (
        orders, {}, INTENTS, "b.parquet counts the classes top_up_failed, lost_card"),
    "two wrong names": (
        file("r.csv", as_csv(table(["card_arrival", "los_card", "refund"]))), {}, INTENTS,
        "'los_card', not one of card_arrival"),
    "UTF-16": (
        file("r.csv", as_csv(table(list(range(5)))).encode("utf-16")), {}, YELP,
        "UTF-16, not UTF-8 text: `iconv"),
    "UTF-16 without a mark": (
        file("r.csv", "label,text\n1,fine\n".encode("utf-16-le")), {}, YELP, "iconv -f UTF-16LE"),
    "Latin-1": (
        file("r.csv", as_csv(table([0, 1, 2, 3], "text")).encode("latin-1")), {}, YELP,
        "iconv -f WINDOWS-1252"),
    "a workbook called csv": (
        lambda folder: zipped("r.zip", {"xl/workbook.xml": ""})(folder).rename(folder / "r.csv"),
        {}, YELP, "Excel workbook: save its table as csv"),
    "a workbook": (
        zipped("r.xlsx", {"xl/workbook.xml": ""}), {}, YELP, "Excel workbook: save its table"),
    "gzip called csv": (file("r.csv", gzip.compress(b"label,text\n")), {}, YELP, "in .gz"),
    "parquet called csv": (
        lambda folder: parquet([0, 1])(folder).rename(folder / "r.csv"), {}, YELP, "in .parquet"),
    "a pointer of Git LFS": (
        file("r.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        {}, YELP, "git lfs pull"),
    "a web page": (file("r.csv", "<!DOCTYPE html>\n<p>Sign in, please"), {}, YELP, "a web page"),
    "Feather 1": (file("r.feather", b"FEA1" + bytes(99)), {}, YELP, "Feather of version 1"),
    "two csv in one": (
        file("r.csv", as_csv(table([0, 1])) * 2), {}, YELP, "repeats the header"),
    "two arrays in one": (
        file("r.json", json.dumps(table([0, 1])) * 2), {}, YELP, "behind the end of the array"),
    "two columns of one name in parquet": (
        as_binary("r.parquet", pa.Table.from_arrays([pa.array(TEXTS)] * 2, ["text", "text"])),
        {}, YELP, "names text twice"),
    "records over several lines": (
        file("r.json", "\n".join(json.dumps(row, indent=1) for row in table([0, 1]))), {}, YELP,
        "a record stands on one line"),
    "records with commas behind them": (
        file("r.jsonl", lines(table([0, 1])).replace("}\n", "},\n")), {}, YELP,
        "with nothing behind it"),
    "quotes that are letters in a tsv": (
        file("r.tsv", 'label\ttext\n0\t"bad\n1\tso so\n4\tgood"\n3\tfine\n'), {}, YELP,
        "hold whole rows"),
    "quotes that are letters in a csv": (
        file("r.csv", "text,label\n" + '"bad,0\nso so,1\ngood",4\nfine,3\n' * 4), {}, YELP,
        "hold whole rows"),
    "quotes by a backslash": (
        file("r.csv", 'label,text\n0,"a \\"bad\\" place"\n'), {}, YELP,
        "line 2: .*quoted text is written twice"),
    "an open quote": (
        file("r.csv", 'label,text\n0,fine\n1,"open\n'), {}, YELP, "opens in line 3 and never"),
    "a list of labels": (file("r.jsonl", lines(table([["0"], ["1"]]))), {}, YELP, "no label"),
    "bytes for labels": (parquet([b"0", b"1"]), {}, YELP, "no label"),
    "numbers beyond all": (
        file("r.jsonl", '{"text": "a", "label": 1e999}\n'), {}, YELP, "label is empty"),
    "train and test in a folder": (
        lambda folder: (file("d/train.csv", as_csv(table([0, 1])))(folder),
                        file("d/test.csv", as_csv(table([0, 1])))(folder).parent)[1], {}, YELP,
        "several sets .test.csv, train.csv.: set data.train and data.test"),
    "a zip with a password": (locked, {}, YELP, "encrypted"),
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


@pytest.mark.parametrize(
    ("labels", "held"),
    [
        (("1.0", "2.0", "3.0"), [1.0, 2.0]),
        (("1.0", "2.0", "3.0"), [1, 2]),
        (("01", "02", "03"), [1, 2]),
        (("0.50", "1.50", "2.50"), [0.5, 1.5]),
        (("-1", "+1", "2"), [-1.0, 1.0]),
    ],
)
def test_numbers_are_those_labels_however_written(
    labels: tuple[str, ...], held: list[float], tmp_path: Path
) -> None:
    """Not the places of classes, though without the last class these would fit, too."""
    found, _ = read_source(config_of(parquet(held)(tmp_path), {}, TaskConfig(labels=labels)))
    assert [label for _, label in found] == [0, 1]


def test_texts_of_several_lines_are_no_rows(tmp_path: Path) -> None:
    """Though one of them reads like the end of a row and the beginning of another."""
    texts = ["bad,\nvery, bad", "good\n5,000 times", "so\n4,5 of 5\n0,0", "a\n\nb, c"] * 9
    rows = [{"label": i % 5, "text": text} for i, text in enumerate(texts)]
    found, _ = read_source(config_of(file("r.csv", as_csv(rows))(tmp_path), {}, YELP))
    assert [text for text, _ in found] == texts


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


def test_train_and_test_count_the_same_classes(tmp_path: Path) -> None:
    test = orders(tmp_path) / "b.parquet"
    with pytest.raises(RequestError, match="classes top_up_failed, lost_card"):
        read_source(config_of(tmp_path / "d/a.parquet", {"test": str(test)}, INTENTS))


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
