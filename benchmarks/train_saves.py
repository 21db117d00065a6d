"""What saving costs a training run, how fast a save on request is, and what a second rank brings.

    python benchmarks/train_saves.py --run runs/demo [--steps 30] [--rounds 2]

Takes a prepared run directory and trains copies of it through `run train`, in turn: one rank that
saves nothing on its way, one that saves at every step, and two ranks. All use the same cores. The
first five steps of each are not counted. Then SIGUSR2 asks a run of two ranks to save, twice a
round; printed is the time until the process ended with 75, and the number of finished steps that
the checkpoint lacks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.rundir.files import read_json, read_jsonl, write_json
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.paths import RunPaths

NEVER = 1_000_000
SKIPPED = 5
QUIET = {"save_every_steps": NEVER, "save_every_minutes": NEVER, "evaluate_every": NEVER}
VARIANTS: dict[str, dict[str, Any]] = {
    "no saves": {**QUIET, "nproc": 1},
    "a save every step": {**QUIET, "nproc": 1, "save_every_steps": 1},
    "two ranks": {**QUIET, "nproc": 2},
}


def main() -> None:
    """Print a line for each measurement; write them as JSON with `--json FILE`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a prepared run")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.steps <= SKIPPED:
        parser.error(f"--steps must be more than {SKIPPED}, the steps that are not counted")
    seconds: dict[str, float] = dict.fromkeys(VARIANTS, 0.0)
    requests: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as work:
        for number in range(args.rounds):
            for name in list(VARIANTS)[:: -1 if number % 2 else 1]:
                train = {**VARIANTS[name], "max_steps": args.steps}
                run = copy_run(args.run, Path(work) / f"{number} {name}", train)
                code = start(run).wait()
                if code:
                    raise SystemExit(f"training ended with {code}:\n{said(run)}")
                log = read_jsonl(run.train_log)
                seconds[name] += sum(line["seconds"] for line in log[SKIPPED:])
            run = copy_run(args.run, Path(work) / f"{number} request", VARIANTS["two ranks"])
            requests += [request(run) for _ in range(2)]
    steps = args.rounds * (args.steps - SKIPPED)
    step, saving, ranks = (seconds[name] / steps for name in VARIANTS)
    every = load_run(args.run)[1].train.save_every_steps
    share = (saving - step) / (every * step)
    print(f"a step takes {step:.3f} s; one with a save {saving:.3f} s")
    print(f"saves every {every} steps, as configured, cost {share:.2%} of the time")
    print(f"two ranks on the same cores: {step / ranks:.2f} times as fast as one")
    for took, lost in requests:
        print(f"save on request: ended {took:.2f} s after the signal, {lost} finished steps lost")
    if args.json:
        figures = {"step": step, "with_save": saving, "two_ranks": ranks, "requests": requests}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def copy_run(
    prepared: Path, folder: Path, train: dict[str, Any], seed: int | None = None
) -> RunPaths:
    """A run directory with the same rows, other settings of `train`, and another seed if given."""
    _, config = load_run(prepared)
    values = config.model_dump(mode="json")
    values["train"].update(train)
    if seed is not None:
        values["seed"] = seed
    Config.model_validate(values)
    run = RunPaths(folder)
    shutil.copytree(prepared / "prepare", run.prepare)
    record = read_json(prepared / "run.json")
    write_json(run.run_json, {**record, "config": {**record["config"], "resolved": values}})
    return run


def start(run: RunPaths) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "yelp_hpc", "run", "train", "--run", str(run.root)]
    with (run.root / "output").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def said(run: RunPaths) -> str:
    return (run.root / "output").read_text(errors="replace")[-3000:]


def request(run: RunPaths) -> tuple[float, int]:
    """Train a few steps, ask for a save: seconds until the end, finished steps that are lost."""
    before = finished(run)
    process = start(run)
    while finished(run) < before + SKIPPED:
        if process.poll() is not None:
            raise SystemExit(f"training ended with {process.returncode}:\n{said(run)}")
        time.sleep(0.05)
    asked = time.perf_counter()
    process.send_signal(signal.SIGUSR2)
    code = process.wait()
    took = time.perf_counter() - asked
    if code != 75:
        raise SystemExit(f"asked to save, training ended with {code}:\n{said(run)}")
    saved = max(int(folder.name.rpartition("-")[2]) for folder in run.checkpoints.iterdir())
    return took, max(0, finished(run) - saved)


def finished(run: RunPaths) -> int:
    return len(read_jsonl(run.train_log)) if run.train_log.exists() else 0


if __name__ == "__main__":
    main()
