"""What a run took is told by its files, and what they do not tell is None."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_model, tiny_config
from yelp_hpc.errors import RequestError
from yelp_hpc.forecast.happened import what_happened
from yelp_hpc.forecast.inputs import read_shape
from yelp_hpc.forecast.page import Happened
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.attempts import Attempt
from yelp_hpc.rundir.files import append_jsonl
from yelp_hpc.rundir.paths import RunPaths


def logged(run: RunPaths) -> None:
    run.train.mkdir(parents=True)
    for step in (1, 2):
        line = {"step": 2 * step, "seconds": 3.0, "tokens_per_second": 100.0 * step}
        append_jsonl(run.train_log, {**line, "memory_bytes": 5_000 // step})
    append_jsonl(run.train_log, {"step": 5, "validation_loss": 1.0, "seconds": 9.0})


def test_an_empty_run_tells_nothing(tmp_path: Path) -> None:
    assert what_happened(RunPaths(tmp_path), tiny_config(Path("m"))) == Happened()


def test_a_run_by_hand_is_told_by_its_log(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    logged(run)
    config = tiny_config(Path("m"), train={"log_every": 1})
    assert what_happened(run, config) == Happened(5, 900, 6.0, 5_000, restarts=0)
    # every second step is logged: the others were as long
    config = tiny_config(Path("m"), train={"log_every": 2})
    assert what_happened(run, config).train_tokens == 1800


def test_a_log_that_counts_nothing_tells_its_step_alone(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    append_jsonl(run.train_log, {"step": 3, "loss": 1.5, "seconds": 2.0})
    append_jsonl(run.train_log, {"step": 4, "loss": 1.5, "tokens_per_second": 7.0})
    assert what_happened(run, tiny_config(Path("m"))) == Happened(4)


def test_jobs_tell_their_time_and_files_their_size(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    logged(run)
    for name, job, restart, gpus, ended in (
        ("train", "7", 0, 2, 1100.0),
        ("train", "7", 1, 2, 1800.0),
        ("infer-base", "8", 0, 1, 1360.0),
        ("infer-tuned", "9", 4, 1, 1360.0),
        ("prepare", "6", 9, 8, 9000.0),
    ):
        attempts.write(
            run, Attempt(name, job, restart, gpus=gpus, started=1000.0, ended=ended, verdict="done")
        )
    for path, size in (
        (run.split("train"), 10),
        (run.checkpoint(4) / "state.json", 200),
        (run.adapter / "adapter_model.safetensors", 3_000),
        (run.shard("tuned", 0, 1), 40_000),
        (run.metrics, 500_000),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    found = what_happened(run, tiny_config(Path("m"), train={"log_every": 1}))
    assert found == Happened(5, 900, 900.0, 5_000, 720.0, 0.7, 43_210, 1)


def test_a_shape_is_read_from_the_folder_or_known_or_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    assert read_shape(tiny_config(tmp_path / "m")).model_type == "llama"
    assert read_shape(tiny_config(Path("THUDM/chatglm3-6b-base"))).layers == 28
    for text, words in (("[1]", "is not a JSON object"), ("{", "is not JSON: ")):
        (tmp_path / "m" / "config.json").write_text(text)
        with pytest.raises(RequestError) as error:
            read_shape(tiny_config(tmp_path / "m"))
        assert str(error.value).startswith(f"{tmp_path}/m/config.json {words}")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(RequestError, match=rf"^{tmp_path}/m/config.json does not describe a"):
        read_shape(tiny_config(tmp_path / "m"))
    (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / "config.json").mkdir()  # a folder is no config.json
    for path, words in (
        (f"{tmp_path}/m", f"model.path {tmp_path}/m is no folder here and is not in the cache"),
        ("demo:none", "model.path demo:none is unknown; the demo's is demo:"),
        ("a/b", "model.path a/b is no folder here and is not in the cache, so its sizes are not "
                "known: run `python -m yelp_hpc fetch --config FILE` first"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as error:
            read_shape(tiny_config(Path(path)))
        assert str(error.value).startswith(words)
