"""predict: every row of an input answered by the run's model, whatever the file; or refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub.finished import finish_run
from tests.tiny import reviews
from yelp_hpc import Classifier
from yelp_hpc import load_run as results
from yelp_hpc.config import Config, LoadedConfig, config_from_dict
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.proof.verify import verify
from yelp_hpc.rundir.files import read_json, sha256_file, write_json
from yelp_hpc.rundir.manifest import load_run, record_run
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.request import AskedPrediction, Request, answered
from yelp_hpc.stages import collect, infer, prepare
from yelp_hpc.stages.request import make_request
from yelp_hpc.stages.rows import scan

TEXTS = [text for text, _ in reviews(23, seed=5)]
STARS = [label for _, label in reviews(23, seed=5)]
ADDED = ["answer", "name", *(f"p_{i}" for i in range(5)), "expected"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    folder = tmp_path_factory.mktemp("finished")
    return finish_run(folder / "run", folder / "model", str(folder / "model"))


@pytest.fixture(scope="module")
def expected(finished: RunPaths) -> list[str | None]:
    found = [one.label for one in Classifier(finished.root).predict(TEXTS)]
    assert len(set(found)) > 1
    return found


@dataclass
class Asking:
    """The command's work in this process, a step at a time."""

    run: RunPaths
    request: Request
    note: str
    config: Config

    @property
    def folder(self) -> RunPaths:
        return RunPaths(self.run.predict / self.request.name)

    def record(self) -> Asking:
        values = self.config.model_dump(mode="json")
        loaded = LoadedConfig(self.config, values, {})
        AskedPrediction(loaded, "x", (), self.request).record(self.folder.root)
        return self

    def answer(self) -> Path:
        self.record()
        prepare.run(self.folder, self.config)
        infer.run(self.folder, self.config, model=self.config.infer.models[0])
        collect.run(self.folder, self.config)
        return Path(self.request.out)


def asking(run: RunPaths, source: Path, out: Path, **options: Any) -> Asking:
    paths, config = load_run(run.root)
    shards = options.pop("shards", 1)
    given: dict[str, Any] = {"model": "tuned", "source": str(source), "out": str(out), **options}
    request, note = make_request(paths, config, **given)
    return Asking(run, request, note, request.config(config, shards))


def as_csv(path: Path, header: bool = True) -> None:
    held = io.StringIO(newline="")
    rows = csv.writer(held)
    if header:
        rows.writerow(["id", "text", "comma, quote"])
    rows.writerows((i, text, 'a "b",\nc') for i, text in enumerate(TEXTS))
    content = held.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def records() -> list[dict[str, Any]]:
    return [
        {"id": i, "text": text, "tags": ["a", {"b": i}] if i % 2 else [], "price": i / 2 or None}
        for i, text in enumerate(TEXTS)
    ]


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records()))


def as_parquet(path: Path) -> None:
    table = pa.table(
        {
            "when": pa.array([i * 10**6 for i in range(23)], pa.timestamp("us")),
            "text": TEXTS,
            "small": pa.array(range(23), pa.int8()),
        }
    )
    pq.write_table(table, path, row_group_size=7)


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_parquet])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_every_column_is_kept_and_every_row_is_answered_in_order(
    finished: RunPaths,
    expected: list[str | None],
    tmp_path: Path,
    write: Callable[[Path], None],
    ending: str,
) -> None:
    name = {"as_csv": "new.csv.gz", "as_jsonl": "new.jsonl", "as_parquet": "new.parquet"}[
        write.__name__
    ]
    source, out = tmp_path / name, tmp_path / f"out{ending}"
    write(source)
    asked = asking(finished, source, out, shards=2)
    assert asked.answer() == out and answered(asked.folder)
    if ending == ".parquet":
        table = pq.read_table(out)
        if write is as_parquet:
            assert table.select(range(3)).equals(pq.read_table(source).replace_schema_metadata())
        made = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        assert made["yelp_hpc.adapter_sha256"] == sha256_file(
            finished.adapter / "adapter_model.safetensors"
        )
        assert made[f"yelp_hpc.input.{name}"] == sha256_file(source)
        found = table.to_pylist()
    elif ending == ".jsonl":
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        if write is as_jsonl:
            given = [{k: v for k, v in one.items() if k not in ADDED} for one in found]
            assert given == records()
    else:
        with out.open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
    columns = list(found[0])
    assert columns[-len(ADDED) :] == ADDED and columns.index("text") < 3
    assert [one["text"] for one in found] == TEXTS
    assert [one["answer"] for one in found] == expected
    if write is as_csv:
        assert {one["comma, quote"] for one in found} == {'a "b",\nc'}
    for one in found:
        chances = [float(one[f"p_{i}"]) for i in range(5)]
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        mean = sum(i * chance for i, chance in enumerate(chances))
        assert float(one["expected"]) == pytest.approx(mean, abs=1e-4)
    record = read_json(asked.folder.answered)
    assert record["rows"] == 23 and record["sha256"] == sha256_file(out)
    assert verify(asked.folder) == []
    out.write_bytes(out.read_bytes() + b" ")
    assert not answered(asked.folder)
    assert any("altered since it was written" in problem for problem in verify(asked.folder))


def test_a_file_without_rows_is_one_of_a_folder(finished: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    table = pa.table({"text": TEXTS})
    pq.write_table(table, tmp_path / "new/a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "new/b.parquet")
    out = asking(finished, tmp_path / "new", tmp_path / "out.parquet", model="base").answer()
    assert pq.read_table(out)["text"].to_pylist() == TEXTS


def test_two_files_of_one_name_are_two(finished: RunPaths, tmp_path: Path) -> None:
    for name, texts in (("a", TEXTS[:9]), ("b", TEXTS[9:])):
        (tmp_path / name).mkdir()
        pandas.DataFrame({"text": texts}).to_csv(tmp_path / name / "rows.csv", index=False)
    given = tmp_path / "[ab]/rows.csv"
    out = asking(finished, given, tmp_path / "out.csv", model="base").answer()
    assert pandas.read_csv(out)["text"].tolist() == TEXTS


def labelled(path: Path, labels: list[Any], column: str = "label") -> Path:
    frame = pandas.DataFrame({"text": TEXTS, column: labels})
    frame.to_csv(path, index=False)
    return path


def test_a_column_of_labels_gives_the_metrics_too(
    finished: RunPaths,
    expected: list[str | None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = labelled(tmp_path / "new.csv", [f"{n + 1} stars" for n in STARS])
    asked = asking(finished, source, tmp_path / "out.csv")
    assert not asked.note
    asked.answer()
    metrics = read_json(tmp_path / "out.metrics.json")
    right = sum(str(n) == answer for n, answer in zip(STARS, expected, strict=True))
    assert metrics["models"]["tuned"]["accuracy"] == pytest.approx(right / 23)
    assert metrics == read_json(asked.folder.metrics)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([*STARS[:-1], None], r"1 of 23 rows have none \(first: line 24\)"),
        ([*STARS[:-1], "spam"], r"'spam' \(line 24\) is no label of the task"),
    ],
)
def test_labels_that_cannot_be_counted_are_a_column_like_others_unless_asked_for(
    finished: RunPaths, tmp_path: Path, labels: list[Any], why: str
) -> None:
    source = labelled(tmp_path / "new.csv", labels)
    asked = asking(finished, source, tmp_path / "out.csv", model="base")
    assert why.replace("\\", "") in asked.note
    asked.answer()
    assert pandas.read_csv(tmp_path / "out.csv")["label"].notna().sum() >= 22
    assert not (tmp_path / "out.metrics.json").exists()
    with pytest.raises(RequestError, match=f"--label-column label gives no metrics: {why}"):
        asking(finished, source, tmp_path / "other.csv", label_column="label")
    with pytest.raises(RequestError, match="no such column"):
        asking(finished, source, tmp_path / "other.csv", label_column="stars")


def test_numbers_count_what_they_counted_in_training(finished: RunPaths, tmp_path: Path) -> None:
    """A ClassLabel column counts its own names, not the labels; the new rows are a plain csv."""
    about = {"info": {"features": {"label": {"names": ["b", "a"], "_type": "ClassLabel"}}}}
    rows = pa.table({"text": TEXTS, "label": [i % 2 for i in range(23)]})
    rows = rows.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(rows, tmp_path / "a.parquet")
    values = load_run(finished.root)[1].model_dump(mode="json")
    values["task"] = {"labels": ["a", "b"]}
    values["data"] |= {"train": str(tmp_path / "a.parquet"), "test": None, "test_rows": 4}
    values["data"] |= {"text_column": "text", "label_column": "label", "train_rows": None}
    config = config_from_dict(values)
    run = record_run(tmp_path / "run", LoadedConfig(config, values, {}), "c.yaml", [])
    prepare.run(run, config)
    out = str(tmp_path / "out.csv")
    for held, classes in (([0, 1], {"0": 1, "1": 0}), (["a", "b"], {"a": 0, "b": 1})):
        source = labelled(tmp_path / "new.csv", [held[i % 2] for i in range(23)])
        request, _ = make_request(run, config, model="base", source=str(source), out=out)
        assert scan(request, config.task, []).classes == classes


def test_what_is_wrong_is_said_at_once_and_nothing_is_written(
    finished: RunPaths, tmp_path: Path
) -> None:
    source = tmp_path / "new.csv"
    as_csv(source)
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    (tmp_path / "o.metrics.json").write_text("mine, too")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "answer": 1}\n{"text": " "}\n{"other": 3}\n{"text": 4}\n')
    none = tmp_path / "none.csv"
    none.write_text("text\n")
    before = sorted(finished.root.rglob("*"))
    for given, out, options, words in (
        (source, tmp_path / "no" / "out.txt", {}, ["must end in .csv", "there is no folder"]),
        (source, source, {}, ["is the input itself"]),
        (source, taken, {}, ["is there already"]),
        (source, tmp_path / "o.parquet", {}, ["o.metrics.json is there already"]),
        (tmp_path / "gone.csv", tmp_path / "o.csv", {}, ["does not exist"]),
        (source, tmp_path / "o.csv", {"text_column": "body"}, ["no column body", "--text-column"]),
        (
            rows,
            tmp_path / "o.csv",
            {},
            ["line 2: text is empty", "line 3: text is empty", "line 4: text is 4", "--prefix"],
        ),
        (none, tmp_path / "o.csv", {}, ["has no rows"]),
        (
            rows,
            tmp_path / "no" / "o.csv",
            {"text_column": "body", "label_column": "stars"},
            ["there is no folder", "no column body", "--prefix", "no such column"],
        ),
        (tmp_path / "gone.csv", tmp_path / "o.txt", {}, ["must end in", "does not exist"]),
        (rows, taken, {}, ["line 2: text is empty", "is there already"]),
    ):
        with pytest.raises(RequestError) as caught:
            asking(finished, given, out, **options)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert sorted(finished.root.rglob("*")) == before
    assert taken.read_text() == "mine"


def test_added_columns_may_have_another_beginning(finished: RunPaths, tmp_path: Path) -> None:
    first = tmp_path / "first.csv"
    source = labelled(tmp_path / "new.csv", STARS)
    asking(finished, source, first, model="base").answer()
    asking(finished, first, tmp_path / "second.csv", prefix="tuned_").answer()
    columns = list(pandas.read_csv(tmp_path / "second.csv").columns)
    assert columns == ["text", "label", *ADDED, *(f"tuned_{name}" for name in ADDED)]


def test_a_csv_without_a_header(
    finished: RunPaths, expected: list[str | None], tmp_path: Path
) -> None:
    as_csv(tmp_path / "new.csv", header=False)
    asked = asking(
        finished, tmp_path / "new.csv", tmp_path / "o.jsonl", text_column="1", header=False
    )
    lines = asked.answer().read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == expected


def test_the_same_request_goes_on_and_another_is_another(
    finished: RunPaths, tmp_path: Path
) -> None:
    source = tmp_path / "new.csv"
    as_csv(source)
    first = asking(finished, source, tmp_path / "a.csv")
    first.answer()
    shard = first.folder.shard("tuned", 0, 1)
    made = shard.stat().st_mtime_ns
    again = asking(finished, source, tmp_path / "b.parquet")  # another file, the same answers
    assert again.folder == first.folder
    assert again.answer().is_file() and shard.stat().st_mtime_ns == made
    frame = results(first.folder.root).predictions.to_pandas()
    assert frame["text"].tolist() == TEXTS and frame["truth"].isna().all()
    assert (
        frame["tuned_answer"].tolist()
        == pandas.read_csv(tmp_path / "a.csv", dtype=str)["answer"].tolist()
    )
    assert asking(finished, source, tmp_path / "c.csv", model="base").folder != first.folder
    with source.open("a") as file:
        file.write("99,another,x\n")
    assert asking(finished, source, tmp_path / "c.csv").folder != first.folder


def test_what_changes_meanwhile_is_found(
    finished: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "new.csv"
    as_csv(source)
    asked = asking(finished, source, tmp_path / "out.csv", shards=2).record()
    source.write_text(source.read_text().replace("the", "The"))
    with pytest.raises(StageError, match="has changed since it was asked for"):
        prepare.run(asked.folder, asked.config)
    as_csv(source)
    prepare.run(asked.folder, asked.config)
    infer.run(asked.folder, asked.config, model="tuned", shard=0)
    with pytest.raises(StageError, match=r"shard 1 of 2 missing"):
        collect.run(asked.folder, asked.config)
    infer.run(asked.folder, asked.config, model="tuned")
    source.write_text(source.read_text().replace("the", "The"))
    with pytest.raises(StageError, match="has changed since it was asked for"):
        collect.run(asked.folder, asked.config)
    assert not (tmp_path / "out.csv").exists() and not answered(asked.folder)


def test_the_models_are_those_of_the_run(finished: RunPaths, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    shutil.copytree(finished.root, run.root)
    source = tmp_path / "new.csv"
    as_csv(source)
    record = read_json(run.run_json)
    true = record["model"]["fingerprint"]
    record["model"]["fingerprint"] = "0" * 64
    write_json(run.run_json, record)
    asked = asking(run, source, tmp_path / "out.csv").record()
    with pytest.raises(StageError, match="is not the base model of"):
        prepare.run(asked.folder, asked.config)
    record["model"]["fingerprint"] = true
    record["config"]["resolved"]["lora"]["rank"] += 1
    write_json(run.run_json, record)
    with pytest.raises(StageError, match="was not trained by this run"):
        asking(run, source, tmp_path / "out.csv")
    weights = run.adapter / "adapter_model.safetensors"
    weights.unlink()
    with pytest.raises(RequestError, match=r"no finished adapter.*--model base"):
        asking(run, source, tmp_path / "out.csv")
    assert asking(run, source, tmp_path / "out.csv", model="base").request.adapter_sha256 == ""
