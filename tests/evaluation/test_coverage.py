"""Coverage: every test row exactly once, or every fault named with the command that mends it."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fabricated import logits, shard_table, write_shards, write_test_set
from yelp_hpc.errors import StageError
from yelp_hpc.evaluation.coverage import MISSING, Coverage, read_test_set, refuse_unless_complete
from yelp_hpc.rundir.files import sha256_file
from yelp_hpc.rundir.paths import RunPaths

LABELS = [i % 5 for i in range(100)]
SHARDS = 4


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    run = RunPaths(tmp_path)
    write_test_set(run, LABELS)
    write_shards(run, "tuned", LABELS, LABELS, SHARDS)
    return run


def cover(run: RunPaths, shards: int = SHARDS) -> Coverage:
    coverage = Coverage(run, "tuned", shards, read_test_set(run.split("test")))
    for _ in coverage.read():
        pass
    return coverage


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def test_whole_shards_have_no_problem(run: RunPaths) -> None:
    coverage = cover(run)
    assert coverage.problems() == []
    assert coverage.codes.tolist() == LABELS
    refuse_unless_complete([coverage])


def test_rows_may_come_in_any_order_with_any_ids_and_any_answer(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    ids = [int(i) for i in np.random.default_rng(1).permutation(10**6)[:100]]
    write_test_set(run, LABELS, ids)
    answers = [None if i % 7 == 0 else 2019 if i % 11 == 0 else -1 if i % 13 == 0 else i % 6
               for i in range(100)]  # fmt: skip
    turned = slice(None, None, -1)
    write_shards(run, "tuned", LABELS[turned], answers[turned], SHARDS, rows=ids[turned])
    coverage = cover(run)
    assert coverage.problems() == []
    expected = [5 if a is None else a if 0 <= a <= 4 else 6 for a in answers]
    assert coverage.codes.tolist() == expected
    assert coverage.test.row_ids(np.arange(100)) == ids


def test_missing_shards_are_named_with_the_command_for_each(run: RunPaths) -> None:
    for shard in (1, 2):
        run.shard("tuned", shard, SHARDS).unlink()
    coverage = cover(run)
    first, second = coverage.problems()
    assert "shards 1-2 of 4 missing" in first
    assert second == "tuned: 50 of 100 test rows have no answer: 25-34 and 40 more"
    command = f"python -m yelp_hpc run infer --run {run.root} --model tuned --shard"
    assert coverage.mend() == [f"{command} 1", f"{command} 2"]


def test_no_shard_at_all_asks_for_the_whole_model(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "my run")  # the command is one to be typed
    write_test_set(run, LABELS)
    coverage = cover(run)
    assert "shards 0-3 of 4 missing" in coverage.problems()[0]
    command = f"python -m yelp_hpc run infer --run '{run.root}' --model tuned"
    assert coverage.mend() == [command]


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.97])
def test_a_shard_cut_short_is_named(run: RunPaths, keep: Any) -> None:
    path = run.shard("tuned", 2, SHARDS)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    problems = cover(run).problems()
    assert any(str(path) in line and "torn or altered" in line for line in problems)
    assert cover(run).mend() == [
        f"python -m yelp_hpc run infer --run {run.root} --model tuned --shard 2"
    ]


def test_doubled_rows_are_named_with_the_shards_that_hold_them(run: RunPaths) -> None:
    rewrite(run.shard("tuned", 3, SHARDS), lambda t: pa.concat_tables([
        t, pq.read_table(run.shard("tuned", 0, SHARDS)).slice(7, 1)]))  # fmt: skip
    coverage = cover(run)
    assert coverage.problems() == [
        "tuned: answered more than once: row 7 "
        "(shard-0000-of-0004.parquet and shard-0003-of-0004.parquet)"
    ]
    assert any("--shard 3" in command for command in coverage.mend())


def test_a_row_doubled_inside_one_shard_is_found(run: RunPaths) -> None:
    rewrite(run.shard("tuned", 1, SHARDS), lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    assert "row 25 (shard-0001-of-0004.parquet)" in cover(run).problems()[0]


def test_a_missing_row_is_named(run: RunPaths) -> None:
    rewrite(run.shard("tuned", 0, SHARDS), lambda t: t.slice(2))
    assert cover(run).problems() == ["tuned: 2 of 100 test rows have no answer: 0-1"]


def test_a_shard_of_another_division_is_named_and_removed_by_the_command(run: RunPaths) -> None:
    run = RunPaths(run.root.rename(run.root.with_name("my run")))
    left = run.shard("tuned", 0, 8)
    run.shard("tuned", 0, SHARDS).rename(left)
    coverage = cover(run)
    assert any(left.name in line and "left over" in line for line in coverage.problems())
    assert coverage.mend()[0] == f"rm '{left.parent}'/shard-*-of-0008.parquet"
    run.split("test").unlink()
    with pytest.raises(StageError, match=f"run prepare --run '{run.root}'"):
        cover(run)


def test_rows_of_another_test_set_are_found_by_id_by_label_and_by_hash(run: RunPaths) -> None:
    path = run.shard("tuned", 0, SHARDS)
    whole = pq.read_table(path)
    pq.write_table(shard_table([*range(24), 555], LABELS[:25], LABELS[:25]), path)
    assert any("row 555 is not in the test set" in line for line in cover(run).problems())
    pq.write_table(shard_table(range(25), [4, *LABELS[1:25]], LABELS[:25]), path)
    assert any("row 0 has another label" in line for line in cover(run).problems())
    pq.write_table(whole.replace_schema_metadata({"yelp_hpc.test_sha256": "0" * 64}), path)
    assert any("made from another test set" in line for line in cover(run).problems())
    digest = sha256_file(run.split("test"))
    pq.write_table(whole.replace_schema_metadata({"yelp_hpc.test_sha256": digest}), path)
    assert cover(run).problems() == []


def test_shards_of_two_adapters_do_not_mix(run: RunPaths) -> None:
    for shard in range(SHARDS):
        identity = {"yelp_hpc.identity": "a" if shard else "b"}
        marked = methodcaller("replace_schema_metadata", identity)
        rewrite(run.shard("tuned", shard, SHARDS), marked)
    assert any("another model, adapter or setting" in line for line in cover(run).problems())


def test_scores_are_checked(run: RunPaths) -> None:
    path = run.shard("tuned", 0, SHARDS)
    scores = logits(LABELS[:25], 1, 3.0)

    def found(scores: Any, predictions: Any) -> str:
        pq.write_table(shard_table(range(25), LABELS[:25], predictions, scores), path)
        return "\n".join(cover(run).problems())

    best = scores.argmax(axis=1).tolist()
    assert found(scores.tolist(), best) == ""
    assert "not the labels with the highest scores" in found(scores.tolist(), best[::-1])
    assert "not 5 scores" in found([row[:4] for row in scores.tolist()], best)
    assert "not finite" in found([[float("nan")] * 5, *scores.tolist()[1:]], best)
    assert "some have none" in found([None, *scores.tolist()[1:]], best)


def test_what_makes_a_shard_unusable_is_said(run: RunPaths) -> None:
    """Whole lines: the file, and what is wrong with it."""
    path = run.shard("tuned", 2, SHARDS)
    whole = pq.read_table(path)
    rows, labels = list(range(50, 75)), LABELS[50:75]
    unsure = [[0.0] * 5] * 25

    def table(columns: dict[str, Any]) -> pa.Table:
        made = dict(zip(whole.schema.names, whole.columns, strict=True))
        made |= {k: pa.array(v, whole.schema.field(k).type) for k, v in columns.items()}
        return pa.table(made)

    other = "made with another model, adapter or setting than the rest"
    for shard in range(SHARDS):
        mark = {"yelp_hpc.identity": "a"}
        rewrite(run.shard("tuned", shard, SHARDS), methodcaller("replace_schema_metadata", mark))
    for made, words in (
        (whole.replace_schema_metadata({"yelp_hpc.identity": "b"}), other),
        (whole.replace_schema_metadata({}), other),
        (whole.replace_schema_metadata({"yelp_hpc.test_sha256": "0", "yelp_hpc.identity": "a"}),
         "it was made from another test set"),
        (table({"row": [None, *rows[1:]]}), "it holds rows without a row id or a label"),
        (table({"label": [None, *labels[1:]]}), "it holds rows without a row id or a label"),
        (table({"scores": [None, *unsure[1:]]}), "some of its rows have scores and some have none"),
        (table({"scores": [row[:4] for row in unsure]}), "it holds rows that have not 5 scores"),
        (table({"scores": [[float("inf")] * 5, *unsure[1:]]}),
         "it holds scores that are not finite numbers"),
        (table({"scores": [[0.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0], *unsure[2:]]}),
         "its predictions are not the labels with the highest scores"),
        (table({"row": [999, *rows[1:]]}), "row 999 is not in the test set"),
        (table({"label": [labels[0], 4, *labels[2:]]}), "row 51 has another label in the test set"),
        (whole.drop_columns(["scores"]), "its columns are not those of a shard"),
    ):  # fmt: skip
        if "identity" not in str(made.schema.metadata) and made.schema.metadata is None:
            made = made.replace_schema_metadata({"yelp_hpc.identity": "a"})
        pq.write_table(made, path)
        assert cover(run).problems()[0] == f"{path}: {words}"
    # where the best are equal any of them may be the answer; an unparsed one has no best
    equal = table({"scores": unsure, "prediction": [None, *labels[1:]]})
    pq.write_table(equal.replace_schema_metadata({"yelp_hpc.identity": "a"}), path)
    assert cover(run).problems() == []


@pytest.mark.parametrize("count", [10, 11, 12])
def test_ten_of_a_kind_are_named_and_the_rest_counted(tmp_path: Path, count: int) -> None:
    run, shards = RunPaths(tmp_path), 25
    write_test_set(run, LABELS)
    write_shards(run, "tuned", LABELS, LABELS, shards)
    folder, more = run.predictions("tuned"), count - 10
    twice = pq.read_table(run.shard("tuned", 24, shards))
    others = [pq.read_table(run.shard("tuned", i, shards)) for i in range(20, 24)]
    again = pa.concat_tables([*others, twice]).slice(20 - count - 4, count)
    pq.write_table(pa.concat_tables([twice, again]), run.shard("tuned", 24, shards))
    for shard in range(count):
        run.shard("tuned", shard, shards).write_bytes(b"PAR1")
        (folder / f"shard-{shard:04d}-of-0099.parquet").write_bytes(b"")
    lines = cover(run, shards).problems()
    named = [line for line in lines if "torn or altered" in line]
    assert [line.partition(":")[0] for line in named] == [
        str(run.shard("tuned", shard, shards)) for shard in range(10)
    ]
    rest = [line for line in lines if line not in named]
    if more:
        assert rest.pop(0) == f"{folder}: {more} more shards cannot be used"
    assert rest.pop(0).endswith(
        f"0009-of-0099.parquet{f' and {more} more' * bool(more)} left over from another division "
        "(this run has 25 shards)"
    )
    doubled = rest.pop(0)
    assert doubled.count("row ") == 10
    assert doubled.endswith(f"and {more} more rows") == bool(more)
    assert rest == [
        f"tuned: {4 * count} of 100 test rows have no answer: 0-9 and {4 * count - 10} more"
    ]


def test_a_shard_with_other_columns_is_named(run: RunPaths) -> None:
    path = run.shard("tuned", 0, SHARDS)
    rewrite(path, lambda t: t.drop_columns(["scores"]))
    assert any(str(path) in line and "columns" in line for line in cover(run).problems())


def test_every_problem_of_every_model_is_in_the_one_message(run: RunPaths) -> None:
    run.shard("tuned", 0, SHARDS).unlink()
    base = Coverage(run, "base", SHARDS, read_test_set(run.split("test")))
    list(base.read())
    with pytest.raises(StageError) as caught:
        refuse_unless_complete([base, cover(run)])
    message = str(caught.value)
    assert "nothing was computed" in message
    assert "--model base" in message and "--model tuned --shard 0" in message
    assert (base.codes == MISSING).all()


def test_a_bad_test_set_is_refused(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    path = run.split("test")
    with pytest.raises(StageError, match=r"missing; make it again: .* run prepare --run"):
        read_test_set(path)
    write_test_set(run, [])
    with pytest.raises(StageError, match="holds no rows"):
        read_test_set(path)
    write_test_set(run, [0, 1, 7])
    with pytest.raises(StageError, match="labels outside 0-4"):
        read_test_set(path)
    write_test_set(run, [0, 1, 2], [4, 9, 4])
    with pytest.raises(StageError, match="holds row 4 more than once"):
        read_test_set(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StageError, match="cannot be read"):
        read_test_set(path)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_beyond_the_classes_is_refused(tmp_path: Path, label: int) -> None:
    run = RunPaths(tmp_path)
    write_test_set(run, [0, 4, label])
    mend = f"make it again: python -m yelp_hpc run prepare --run {tmp_path}"
    with pytest.raises(StageError) as error:
        read_test_set(run.split("test"))
    assert str(error.value) == f"{run.split('test')} holds labels outside 0-4; {mend}"
    write_test_set(run, [0, 4])
    assert read_test_set(run.split("test")).labels.tolist() == [0, 4]
    assert read_test_set(run.split("test"), 6).classes == 6


def test_row_ids_and_places_are_each_others_way_back(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    for ids in ([7, 8, 9, 10], [40, 3, 500, 20], [9, 8, 7, 6]):
        write_test_set(run, [0, 1, 2, 3], ids)
        test = read_test_set(run.split("test"))
        places = test.positions(np.array([*ids[::-1], 2, 11, 10**6]))
        assert places.tolist() == [3, 2, 1, 0, -1, -1 if 11 not in ids else ids.index(11), -1]
        assert test.row_ids(np.arange(4)) == ids
        assert test.first == min(ids)
        assert (test.ids is None) == (ids == [7, 8, 9, 10])  # consecutive ones need no memory


def test_what_makes_a_test_set_unreadable_is_said(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    path = run.split("test")
    mend = f"make it again: python -m yelp_hpc run prepare --run {tmp_path}"

    def said() -> str:
        with pytest.raises(StageError) as error:
            read_test_set(path)
        return str(error.value)

    assert said() == f"{path} is missing; {mend}"
    write_test_set(run, [])
    assert said() == f"{path} holds no rows; {mend}"
    write_test_set(run, [0, 1, 2], [5, 9, 5])
    assert said() == f"{path} holds row 5 more than once; {mend}"
    write_test_set(run, [0, 1, 2], [5, 9, 9])
    assert said() == f"{path} holds row 9 more than once; {mend}"
    rewrite(path, lambda table: table.drop_columns(["label"]))
    assert "label" in said() and said().endswith(f"); {mend}")


def test_the_whole_message_of_a_run_in_which_everything_went_wrong(run: RunPaths) -> None:
    """What is said of 16 shards, most of them bad, word by word."""
    shards, folder = 16, run.predictions("tuned")
    for path in folder.glob("*.parquet"):
        path.unlink()
    write_shards(run, "tuned", LABELS, LABELS, shards)
    for shard in (0, 1, 2, 5):
        run.shard("tuned", shard, shards).unlink()
    run.shard("tuned", 7, shards).write_bytes(b"PAR1")
    rewrite(run.shard("tuned", 8, shards), lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    for left in range(12):
        (folder / f"shard-{left:04d}-of-0099.parquet").write_bytes(b"")
    with pytest.raises(StageError) as error:
        refuse_unless_complete([cover(run, shards)])
    lines = str(error.value).splitlines()
    torn, names = lines.pop(2), [f"shard-{left:04d}-of-0099.parquet" for left in range(10)]
    seventh = run.shard("tuned", 7, shards)
    assert torn.startswith(f"  - {seventh}: torn or altered (")
    first = [row for row in range(100) if row * 16 // 100 in (0, 1, 2, 5, 7)]
    assert lines == [
        "predictions are not complete, so nothing was computed:",
        f"  - {folder}: shards 0-2, 5 of 16 missing (shards count from 0)",
        f"  - {folder}: {', '.join(names)} and 2 more left over from another division "
        "(this run has 16 shards)",
        "  - tuned: answered more than once: row 50 (shard-0008-of-0016.parquet)",
        f"  - tuned: {len(first)} of 100 test rows have no answer: 0-9 and {len(first) - 10} more",
        "To mend it, run:",
        f"  rm {folder}/shard-*-of-0099.parquet",
        f"  python -m yelp_hpc run infer --run {run.root} --model tuned",
    ]


def test_rows_that_no_shard_holds_are_mended_by_the_whole_model(run: RunPaths) -> None:
    rewrite(run.shard("tuned", 1, SHARDS), lambda table: table.slice(1))
    coverage = cover(run)
    coverage.damaged.clear()  # a shard that is whole as far as its file tells
    infer = f"python -m yelp_hpc run infer --run {run.root} --model tuned"
    assert coverage.mend() == [infer]
    assert cover(run, SHARDS).codes.tolist().count(MISSING) >= 1
