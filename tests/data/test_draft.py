"""`init --data`: the config that is written loads, names the right columns and reads its data."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from yelp_hpc.config import load_config
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
