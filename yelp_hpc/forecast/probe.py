"""Twenty real steps and a few batches of scoring on this machine, for a plan's times and memory.

`measure` works in a folder of its own, with the stages that a run uses: prepare, train with few
steps, and, as a child (`python -m yelp_hpc.forecast.probe RUN`), the base model's scoring.
Nothing of the run that is planned is touched.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config, LoadedConfig
from yelp_hpc.errors import StageError
from yelp_hpc.forecast.inputs import prepared_lengths, read_shape
from yelp_hpc.forecast.machine import Probe
from yelp_hpc.forecast.work import Lengths, training_work
from yelp_hpc.own_files import own_module
from yelp_hpc.progress import say
from yelp_hpc.rundir.files import read_json
from yelp_hpc.rundir.manifest import chosen_precision, in_precision, load_run, record_run
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.record import training_log
from yelp_hpc.runtime import set_runtime_defaults, without_tokens
from yelp_hpc.training.budget import read_budgets

STEPS = 20
WARM_UP = 2  # steps that lay out weights and fill caches
SCORED = 200  # reviews
WHOLE = 20_000  # rows that are tokenised in seconds: then their lengths are counted, not estimated


def measure(config: Config, run: RunPaths | None = None) -> tuple[Probe, Lengths | None]:
    """Run the probe; also the run's lengths, if all its rows were prepared on the way.

    Args:
        config: of the run that is planned.
        run: its directory, if it has one; prepared files are used and not made again.

    Raises:
        StageError: a stage of the probe failed; its last lines are shown.
    """
    with tempfile.TemporaryDirectory(prefix="yelp_hpc-probe-") as scratch:
        trial = RunPaths(Path(scratch) / "run")
        lengths = prepared_lengths(run) if run is not None else None
        small = _small(config, prepared=lengths is not None)
        record_run(trial.root, LoadedConfig(small, {}, {}), "probe", [])
        if run is not None and lengths is not None:
            shutil.copytree(run.prepare, trial.prepare)
        else:
            _stage(trial, "prepare")
            if _rows(config) == _rows(small):
                lengths = prepared_lengths(trial)
        own = lengths or prepared_lengths(trial)
        assert own is not None  # prepare has just ended well
        say(f"probe: {STEPS} training steps")
        seconds = _stage(trial, "train")
        say(f"probe: scoring {SCORED} reviews")
        scored = _score(trial)
        lines = training_log(trial)
        kept = lines[WARM_UP:] or lines
        tokens = [line["tokens_per_second"] * line["seconds"] for line in kept]
        # what the probe's own training took, not what was asked for
        budget = read_budgets(trial)[-1]
        ranks = len(list(trial.logs.glob("train-rank-*.log")))
        fixed = {"max_tokens": budget.max_tokens, "micro_batches": budget.pieces}
        train = small.train.model_copy(update=fixed)
        small = small.model_copy(update={"train": train})
        small = in_precision(small, chosen := chosen_precision(trial))
        measured = training_work(small, own, ranks, None, read_shape(small))
        per_token = sum(line["seconds"] for line in kept) / sum(tokens) * ranks
        every = [line["tokens_per_second"] * line["seconds"] for line in lines]
        return (
            Probe(
                device=scored["device"],
                cuda=scored["cuda"],
                train_start=max(0.0, seconds - per_token * sum(every) / ranks),
                train_token=per_token,
                train_first=lines[0]["memory_bytes"],
                train_memory=max(line["memory_bytes"] for line in lines),
                train_largest=measured.largest,
                train_shapes=measured.shapes,
                infer_start=scored["start"],
                infer_token=scored["token"],
                infer_memory=scored["memory"],
                precision=chosen.get("train"),
            ),
            lengths,
        )


def _rows(config: Config) -> tuple[int | None, int | None]:
    return config.data.train_rows, config.data.test_rows


def _small(config: Config, prepared: bool) -> Config:
    """The run with few steps, and with few rows where there are many."""
    steps = STEPS + WARM_UP
    data, wanted = config.data, {}
    if not prepared:
        train = 2 * steps * config.train.global_batch + 100
        if not (data.train_rows and data.train_rows <= WHOLE) and data.source == "hub":
            wanted["train_rows"] = min(data.train_rows or train, train)
        if not (data.test_rows and data.test_rows <= WHOLE) and data.source == "hub":
            wanted["test_rows"] = min(data.test_rows or 2 * SCORED, 2 * SCORED)
    changed = {
        "data": data.model_copy(update=wanted),
        "train": config.train.model_copy(
            update={
                "max_steps": steps,
                "evaluate_every": 10 * steps,
                "log_every": 1,
                "save_every_steps": 10 * steps,
                "save_every_minutes": 1e6,
                "tensorboard": False,
            }
        ),
    }
    return config.model_copy(update=changed)


def _child(argv: list[str], what: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*own_module(argv[0]), *argv[1:]],
        capture_output=True,
        text=True,
        env={**without_tokens(os.environ), **(env or {})},
    )
    if done.returncode:
        tail = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-8:])
        raise StageError(f"the probe's {what} failed (exit code {done.returncode}):\n{tail}")
    return done.stdout


def _stage(trial: RunPaths, stage: str) -> float:
    """Run a stage as a job would; returns its seconds from start to end."""
    started = time.monotonic()
    _child(["yelp_hpc", "run", stage, "--run", str(trial.root)], stage)
    return time.monotonic() - started


def _score(trial: RunPaths) -> dict[str, Any]:
    started = time.monotonic()
    text = _child(["yelp_hpc.forecast.probe", str(trial.root)], "scoring")
    found: dict[str, Any] = json.loads(text)
    found["start"] = time.monotonic() - started - found.pop("seconds")
    return found


def main(root: str) -> None:
    """The child: score some of the prepared test set with the base model and print JSON."""
    set_runtime_defaults()  # as `run` does
    run, config = load_run(root)
    import pyarrow.parquet as pq
    import torch

    from yelp_hpc.inference.predictor import load_predictor

    tokens = read_json(run.tokens)
    predictor = load_predictor(config, None, tokens)
    prompts = pq.read_table(run.split("test"), columns=["input_ids"])["input_ids"].to_pylist()
    stride = max(1, len(prompts) // SCORED)
    prompts = prompts[::stride][:SCORED]
    batches = predictor.plan([len(prompt) for prompt in prompts])
    predictor.predict([prompts[i] for i in batches[-1]][:4])  # warm
    cuda, start, prefix = torch.cuda.is_available(), time.monotonic(), len(tokens["prefix"])
    computed = 0
    for batch in batches:
        predictor.predict([prompts[i] for i in batch])
        computed += prefix + sum(len(prompts[i]) - prefix for i in batch)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    result = {
        "device": torch.cuda.get_device_name() if cuda else f"this CPU ({name})",
        "cuda": cuda,
        "seconds": seconds,
        "token": seconds / computed,
        "memory": torch.cuda.max_memory_allocated() if cuda else memory,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
