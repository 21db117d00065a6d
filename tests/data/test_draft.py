"""`init --data`: the config that is written loads, names the right columns and reads its data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yelp_hpc.config import Config, load_config
from yelp_hpc.data.draft import init_data
from yelp_hpc.data.sources import read_source
from yelp_hpc.errors import RequestError

WORDS = "a place that we liked a lot and would visit again with friends".split()  # noqa: SIM905


def written(path: Path, header: list[str] | None, labels: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(header)
        for i in range(60):
            text = " ".join(WORDS[: 3 + i % 9]) + f' {i}, "so"'
            writer.writerow([f"id-{i}", labels[i % len(labels)], text])
    return path


@pytest.mark.parametrize(
    ("header", "labels", "names", "ordinal"),
    [
        (
            ["id", "intent", "message"],
            ["card_arrival", "top up", "yes", "no", "#1: x"],
            None,
            False,
        ),
        (["id", "stars", "review"], list("12345"), "5 stars", True),
        (["id", "label", "text"], ["0", "1"], None, False),
        (None, list("12345"), None, False),
    ],
)
def test_the_draft_reads_its_own_data(
    tmp_path: Path, header: list[str] | None, labels: list[str], names: str | None, ordinal: bool
) -> None:
    data = written(tmp_path / "my data.csv", header, labels)
    init_data(str(data), tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml").config
    assert config.data.text_column == (header[2] if header else "2")
    assert config.data.label_column == (header[1] if header else "1")
    assert config.task.ordinal == ordinal
    assert (config.task.names or [None])[-1] == names
    rows, _ = read_source(config)
    assert len(rows) == 60
    order = config.task.values or config.task.labels
    assert [order[label] for _, label in rows] == [labels[i % len(labels)] for i in range(60)]


def test_nothing_is_replaced_without_force(tmp_path: Path) -> None:
    data = written(tmp_path / "d.csv", ["id", "label", "text"], ["a", "b"])
    (tmp_path / "c.yaml").write_text("mine")
    with pytest.raises(RequestError, match="exists"):
        init_data(str(data), tmp_path / "c.yaml")
    assert (tmp_path / "c.yaml").read_text() == "mine"
    init_data(str(data), tmp_path / "c.yaml", force=True)


def test_data_without_labels_is_said(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text\n" + "a fine text\n" * 9)
    with pytest.raises(RequestError, match="no column beside text"):
        init_data(str(tmp_path / "d.csv"), tmp_path / "c.yaml")


def drafted(folder: Path, content: str) -> Config:
    (folder / "d.csv").write_text(content)
    init_data(str(folder / "d.csv"), folder / "c.yaml", force=True)
    return load_config(folder / "c.yaml").config


def test_spellings_of_one_label_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spelled = ["pos", "POS", "neg ", "neg", "nan", ""]
    rows = [f"{spelled[i % 6]},a fine text {i}\n" for i in range(60)]
    config = drafted(tmp_path, "label,text\n" + "".join(rows[:48]).replace("\n,", "\npos,"))
    assert config.task.labels == ("nan", "neg", "pos")
    assert [label for _, label in read_source(config)[0]] == [2, 2, 1, 1, 0, 2] * 8
    drafted(tmp_path, "label,text\n" + "".join(rows))
    said = capsys.readouterr().err
    assert "label pos: 24 rows, 8 of them as POS" in said
    assert "label nan: 8 rows, a missing value?" in said
    assert "label: 10 rows have none, which prepare refuses" in said


def test_stars_as_floats_are_stars(tmp_path: Path) -> None:
    config = drafted(
        tmp_path, "stars,text\n" + "".join(f"{i % 5 + 1}.0,a text {i}\n" for i in range(50))
    )
    assert config.task.values == ("1", "2", "3", "4", "5") and config.task.ordinal
    assert [label for _, label in read_source(config)[0]] == [i % 5 for i in range(50)]


def test_a_first_row_of_values_is_no_header(tmp_path: Path) -> None:
    config = drafted(tmp_path, "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)))
    assert not config.data.header and len(read_source(config)[0]) == 20


@pytest.mark.parametrize(
    "label",
    [
        *("{review}", "{label}", "#: 'x', \"y\"", "null", "~", "1e3", "é", "...", "---", "<<", "="),
        *("😀", "👩\u200d💻", "می\u200cخواهم", "好\u3000的", "a\u00a0b", "a\tb", "\ufeffa"),
        *("- a", "? a", "!a", "&a", "*a", "%a", "@a", "`a", "| a |", "<b>&", "a\u200b"),
        *("True", "off", ".nan", "0x1f", "1_000", "2024-01-01", "1:30:00", "</s>", "__class__"),
        *("01", "\U000e0067", "$\\frac{1}{2}$", "../x"),
    ],
)  # fmt: skip
def test_any_label_stands_in_a_config(tmp_path: Path, label: str) -> None:
    quoted = label.replace('"', '""')
    config = drafted(
        tmp_path,
        "label,text\n" + "".join(f'"{quoted}",text {i}\nother,text\n' for i in range(9)),
    )
    assert set(config.task.labels) == {label, "other"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("label,text\n" + '"a\nb",fine\n"c\nd",good\n' * 9, "no column beside text"),
        ("label,text\n" + "a\0,fine\nb,good\n" * 9, "label .hidden characters."),
        ("label,text\n" + "US,fine\nus,good\n" * 9, "label .1 value, letter case and such aside."),
        ("label,text\n" + "a,fine\n" * 9, "label .1 value., text"),
        (
            "label,text\n" + "".join(f"label {i // 2},fine {i}\n" for i in range(2002)),
            "label .over 1,000 values., text",
        ),
    ],
)
def test_what_can_be_no_label(tmp_path: Path, content: str, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        drafted(tmp_path, content)
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "label,text\n" + f"{'a long label ' * 9}a,fine\n{'a long label ' * 9}b,good\n" * 9,
            "text",
        ),
        ("score,text\n" + "".join(f"{n},fine {n}\n" for n in (-1, 0, 1, 10, -10)) * 5, "text"),
    ],
)
def test_labels_longer_than_texts_and_numbers_below_0(
    tmp_path: Path, content: str, expected: str
) -> None:
    config = drafted(tmp_path, content)
    assert config.data.text_column == expected
    if config.data.label_column == "score":
        assert config.task.ordinal and config.task.labels == ("-10", "-1", "0", "1", "10")


def test_a_prompt_fits_into_the_drafted_cutoff(tmp_path: Path) -> None:
    long = [f"a label of a good many words, which is number {i}" for i in range(12)]
    config = drafted(
        tmp_path, "label,text\n" + "".join(f'"{long[i % 12]}",fine {i}\n' for i in range(60))
    )
    assert len(config.prompt.template) < 200 and config.data.cutoff == 128
    chinese = "服务很好，菜也很好吃，下次还会再来。" * 6
    config = drafted(tmp_path, "label,text\n" + f"好,{chinese}\n差,{chinese}\n" * 9)
    assert config.data.cutoff == 256


@pytest.mark.parametrize("column", ["{label}", "{review}", "a\tlabel"])
def test_a_column_of_any_name_gives_a_prompt(tmp_path: Path, column: str) -> None:
    config = drafted(tmp_path, f"{column},text\n" + "a,fine\nb,good\n" * 9)
    assert config.data.label_column == column
    assert "output its label: a, b." in config.prompt.template


def test_classes_that_a_file_names_are_the_labels(tmp_path: Path) -> None:
    """Those that no row has, too: the class numbers count all of them."""
    about = {
        "info": {"features": {"label": {"names": ["b 0", "A", "c: x"], "_type": "ClassLabel"}}}
    }
    rows = pa.table({"text": [f"fine {i}" for i in range(20)], "label": [0, 2] * 10})
    rows = rows.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(rows, tmp_path / "d.parquet")
    init_data(str(tmp_path / "d.parquet"), tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml").config
    assert config.task.labels == ("b 0", "A", "c: x") and config.task.values is None
    assert [label for _, label in read_source(config)[0]] == [0, 2] * 10
    drafted = (tmp_path / "c.yaml").read_text()
    assert "- A  # 0 rows" in drafted and "always answering b 0 is right in 50.0%" in drafted
    assert "output its label: b 0, A, c: x." in config.prompt.template


@pytest.mark.parametrize(
    ("names", "numbers", "labels"),
    [
        (["none", *"abcde"], [1, 2, 3, 4, 5], ("none", *"abcde")),  # five of them look like stars
        (["a", "a"], [0, 1], ("0", "1")),
        (["a\nb", "c"], [0, 1], ("0", "1")),
    ],
)
def test_classes_of_odd_names_give_a_draft_that_reads(
    tmp_path: Path, names: list[str], numbers: list[int], labels: tuple[str, ...]
) -> None:
    about = {"info": {"features": {"rating": {"names": names, "_type": "ClassLabel"}}}}
    truth = numbers * 4
    rows = pa.table({"text": [f"fine {i}" for i in range(len(truth))], "rating": truth})
    rows = rows.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(rows, tmp_path / "d.parquet")
    init_data(str(tmp_path / "d.parquet"), tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml").config
    assert config.task.labels == labels and config.task.values is None
    assert [label for _, label in read_source(config)[0]] == truth


def test_files_of_other_columns_are_named(tmp_path: Path) -> None:
    for name, header in (("a", "label,text"), ("b", "stars,review")):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{name}.csv").write_text(header + "\n0,bad\n1,good\n" * 5)
    with pytest.raises(RequestError, match=r"b.csv has no column of those before it \(label, text"):
        init_data(str(tmp_path / "d"), tmp_path / "c.yaml")
