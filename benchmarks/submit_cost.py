"""What it costs to submit a chain to Slurm, and to ask for the state of a run of 1,000 shards.

Needs a Slurm (`make cluster`): python benchmarks/submit_cost.py
Prints seconds of `submit all` and the number of sbatch calls, and seconds of `status`, medians of
five, with a process start each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROUNDS = 5
SHARDS = 1000
CONFIG = {
    "model": {"path": "none"},
    "data": {"source": "file", "train": "none.csv", "test_rows": 10},
}


def run(*argv: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "yelp_hpc", *argv],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        cluster = top / "cluster.yaml"
        # held in the queue: what is measured is the submission, not the work
        held = {"defaults": {"partition": "cpu", "sbatch": {"hold": ""}}}
        cluster.write_text(yaml.safe_dump(held))
        config = top / "config.yaml"
        common = ["--config", str(config), "--cluster", str(cluster)]
        for shards in (8, SHARDS):
            config.write_text(yaml.safe_dump({**CONFIG, "infer": {"shards": shards}}))
            times, calls = [], 0
            for round_ in range(ROUNDS):
                target = top / f"run-{shards}-{round_}"
                times.append(run("submit", "all", *common, "--run", str(target)))
                calls = len((target / "submissions.jsonl").read_text().splitlines())
                if shards == 8 or round_ < ROUNDS - 1:
                    run("cancel", "--run", str(target))
            seconds = statistics.median(times)
            print(f"submit all, {shards} shards: {seconds:.2f} s, {calls} sbatch calls")
        target = top / f"run-{SHARDS}-{ROUNDS - 1}"
        for model in ("base", "tuned"):
            attempts = target / "logs" / "attempts" / f"infer-{model}"
            (target / "infer" / model).mkdir(parents=True)
            attempts.mkdir(parents=True)
            for shard in range(SHARDS):
                record = {"name": f"infer-{model}", "job": f"1_{shard}", "restart": 0}
                record |= {"shards": str(shard), "started": 0.0, "ended": 9.0, "verdict": "done"}
                (attempts / f"1_{shard}-0.json").write_text(json.dumps(record))
                if shard % 2:
                    name = f"shard-{shard:04d}-of-{SHARDS:04d}.parquet"
                    (target / "infer" / model / name).touch()
        times = [run("status", "--run", str(target)) for _ in range(ROUNDS)]
        print(f"status, 2 x {SHARDS} shards, all tasks queued: {statistics.median(times):.2f} s")
        run("cancel", "--run", str(target))
        print(f"on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
