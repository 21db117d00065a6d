"""The command predict: what it plans, its whole way on this machine, what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from tests.cli.test_places import RIGHTS
from tests.hub.finished import finish_run
from tests.tiny import SIF, reviews
from yelp_hpc import Classifier
from yelp_hpc.rundir.paths import RunPaths


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    finish_run(folder / "run", folder / "model", str(folder / "model"))
    frame = pandas.DataFrame({"id": range(12), "text": [text for text, _ in reviews(12, seed=8)]})
    frame.to_csv(folder / "new.csv", index=False)
    return folder


def predict(folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "yelp_hpc", "predict", "--run", "run", *arguments]
    command = [*(RIGHTS if os.geteuid() == 0 else []), *command]
    env = {**os.environ, "YELP_HPC_CACHE": str(folder / "cache")}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_dry_run_on_slurm_shows_the_array_in_the_image_and_writes_nothing(finished: Path) -> None:
    (finished / "yelp_hpc.sif").write_bytes(SIF)
    (finished / "answers").mkdir()
    (finished / "cluster.yaml").write_text("container: {image: yelp_hpc.sif, cache: cache}\n")
    before = sorted(finished.rglob("*"))
    where = ["--input", "new.csv", "--out", "answers/out.csv", "--cluster", "cluster.yaml"]
    code, shown, errors = predict(
        finished, *where, "--executor", "slurm", "--shards", "4", "--dry-run"
    )
    assert code == 0, errors
    assert f"--bind {finished}/answers " in shown  # the file is written into it
    assert f"--bind {finished}/new.csv:{finished}/new.csv:ro" in shown
    assert shown.count("#SBATCH --array=0-3") == 1
    assert "--dependency=afterok:JOB_ID_OF_prepare" in shown
    assert "--dependency=afterany:JOB_ID_OF_infer-tuned" in shown
    assert "infer --run" in shown and "--model tuned --shard 0" in shown
    after = [path for path in sorted(finished.rglob("*")) if "cache" not in path.parts]
    assert after == [path for path in before if "cache" not in path.parts]


def test_the_whole_way_here_and_a_second_start_does_nothing(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(finished, folder)
    where = ["--input", "new.csv", "--out", "out.jsonl", "--shards", "2"]
    code, shown, errors = predict(folder, *where)
    assert code == 0, errors
    assert shown.strip() == "out.jsonl"
    frame = pandas.read_json(folder / "out.jsonl", lines=True)
    assert frame["id"].tolist() == list(range(12)) and frame["answer"].notna().all()
    (asked,) = RunPaths(folder / "run").predict.iterdir()
    made = {path: path.stat().st_mtime_ns for path in asked.rglob("*") if path.is_file()}
    code, _, errors = predict(folder, *where)
    assert code == 0 and "nothing to do, everything is there" in errors
    again = {path: path.stat().st_mtime_ns for path in asked.rglob("*") if path.is_file()}
    kept = ("answered.json", ".parquet", ".log")
    assert [p for p in made if p.name.endswith(kept) and again[p] != made[p]] == []
    for out in ("second.csv", "third.parquet"):  # the same answers in other files
        code, shown, errors = predict(folder, *where[:2], "--out", out, *where[4:])
        assert code == 0 and "wrote 12 rows" in errors and "infer" not in errors, errors
        assert (folder / out).is_file() and shown.strip() == out
    assert pandas.read_csv(folder / "second.csv")["answer"].tolist() == frame["answer"].tolist()
    code, _, errors = predict(folder, *where[:2], "--out", out, *where[4:])
    assert code == 0 and "nothing to do, everything is there" in errors
    status = subprocess.run(
        [sys.executable, "-m", "yelp_hpc", "status", "--run", str(asked)],
        capture_output=True,
        text=True,
        check=True,
    )
    words = [line.split()[:2] for line in status.stdout.splitlines()[1:4]]
    assert words == [["prepare", "done"], ["infer-tuned", "done"], ["collect", "done"]]


def test_answers_only_are_the_same_answers_in_a_request_of_their_own(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(finished, folder)
    # what stands in the way of a probability does not stand in that of an answer
    frame = pandas.read_csv(folder / "new.csv").assign(p_1="mine")
    frame.to_csv(folder / "new.csv", index=False)
    code, _, errors = predict(folder, "--input", "new.csv", "--out", "both.csv")
    assert code == 2 and "p_1" in errors
    code, _, errors = predict(folder, "--input", "new.csv", "--out", "only.csv", "--answers-only")
    assert code == 0, errors
    frame.drop(columns="p_1").to_csv(folder / "new.csv", index=False)
    code, _, errors = predict(folder, "--input", "new.csv", "--out", "both.csv")
    assert code == 0, errors
    only, both = (pandas.read_csv(folder / name) for name in ("only.csv", "both.csv"))
    assert [*only] == ["id", "text", "p_1", "answer", "name"]
    assert only["answer"].tolist() == both["answer"].tolist()
    assert only["name"].tolist() == both["name"].tolist()


def test_a_colleagues_run_answers_and_stays_as_it_is(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "new.csv", tmp_path)
    for path in [*(tmp_path / "run").rglob("*"), tmp_path / "run"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((tmp_path / "run").rglob("*"))
    code, shown, errors = predict(tmp_path, "--input", "new.csv", "--out", "out.csv")
    assert (code, shown) == (0, "out.csv\n"), errors
    (asked,) = (tmp_path / "out.predict").iterdir()
    assert f"may only be read, so that the work lies in {asked}" in errors
    assert sorted((tmp_path / "run").rglob("*")) == before
    frame = pandas.read_csv(tmp_path / "out.csv")
    texts = pandas.read_csv(finished / "new.csv")["text"].tolist()
    alone = [one.label for one in Classifier(finished / "run").predict(texts)]
    assert frame["answer"].astype(str).tolist() == alone
    code, _, errors = predict(tmp_path, "--input", "new.csv", "--out", "out.csv")
    assert code == 0 and "nothing to do, everything is there" in errors


def test_where_the_folder_is_gone_its_stages_start_elsewhere(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "gone").mkdir()
    leave = ["bash", "-c", 'cd gone && rmdir ../gone && exec "$@"', "-"]
    where = ["--input", str(finished / "new.csv"), "--out", str(tmp_path / "out.csv")]
    argv = [sys.executable, "-m", "yelp_hpc", "predict", "--run", str(tmp_path / "run"), *where]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*leave, *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pandas.read_csv(tmp_path / "out.csv")) == 12


def test_refusals_exit_with_2(finished: Path) -> None:
    code, _, errors = predict(finished, "--input", "gone.csv", "--out", "out.xlsx")
    assert code == 2 and "must end in .csv, .jsonl, .parquet" in errors
    code, _, errors = predict(finished, "--input", "gone.csv", "--out", "out.csv")
    assert code == 2 and "gone.csv does not exist" in errors
    assert not (finished / "run" / "predict").exists()
