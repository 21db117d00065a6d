"""Soak: rounds of random faults against real training on a real Slurm.

Needs root and the cluster of `make cluster`:

    python benchmarks/chaos.py --rounds 20 --seed 1

Each round trains the tiny model of the tests on two ranks, strikes it a few times at random moments
(scontrol requeue, SIGUSR2, SIGTERM, a kill of the whole node, preemption without grace, suspend and
resume, a moved time limit, a controller that goes away, a start whose clock was ahead, two more
submissions at once, a disk that is full for a moment) and compares the adapter with that of the
uninterrupted run. An inference array runs beside it under kills, and every row of the test set is
counted at the end. What a full disk has ended is submitted again, as its message says; nothing else
is helped. Prints rounds, faults by kind, lost rows, wrong hashes.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cluster.conftest import (
    Cluster,
    copy_run,
    descendants,
    processes,
    wait_ended,
    wait_for,
    yelp_hpc,
)
from tests.cluster.test_interruptions import write_config
from yelp_hpc.errors import YelpHpcError
from yelp_hpc.jobs import slurm as client
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import read_jsonl, sha256_file
from yelp_hpc.rundir.paths import RunPaths

FAULTS = (
    *("requeue", "USR2", "TERM", "node", "preempt", "shard-requeue", "shard-USR2"),
    *("suspend", "limit", "controller", "clock", "submit", "disk"),
)
SHARDS = 4
DISK = "400m"
"""Of the file system that the run directories lie on."""


def strike(
    fault: str, cluster: Cluster, train: str, infer: str, run: RunPaths, command: list[str]
) -> bool:
    """Do one fault to what is running now; False when nothing was there to be hit."""
    job = infer if fault.startswith("shard") else train
    running = [row for row in client.queue([job]) if row.state == "RUNNING"]
    if not running:
        return False
    victim = random.choice(running)
    if fault.endswith("requeue"):
        cluster.sh("scontrol", "requeue", victim.job)
    elif fault.endswith(("USR2", "TERM")):
        cluster.sh("scancel", f"--signal={fault[-4:].strip('-')}", victim.job)
    elif fault == "preempt":
        cluster.preempt()
    elif fault == "suspend":
        cluster.sh("scontrol", "suspend", victim.job)
        time.sleep(random.uniform(1, 4))
        cluster.sh("scontrol", "resume", victim.job)
    elif fault == "limit":
        minutes = random.randint(2, 30)
        cluster.sh("scontrol", "update", f"jobid={victim.job}", f"timelimit={minutes}")
    elif fault == "controller":
        cluster.stop_controller()
        time.sleep(random.uniform(1, 8))
        cluster.script("slurm_up.sh")
    elif fault == "clock":
        return skew(run)
    elif fault == "disk":
        fill(run.root.parent)
    elif fault == "submit":
        again = [sys.executable, "-m", "yelp_hpc", *command]
        started = [subprocess.Popen(again, stderr=subprocess.DEVNULL) for _ in range(2)]
        if any(process.wait() == 0 for process in started):
            raise SystemExit("a second chain was submitted beside the first")
    else:
        cluster.kill_node(victim.node, victim.job)
        wait_for(lambda: "down" in cluster.sh("sinfo", "-hN", "-o", "%T"), 60, "the node down")
        cluster.script("slurm_up.sh")
    return True


def skew(run: RunPaths) -> bool:
    """Have an ended start of train tell of a clock that was minutes ahead."""
    ended = [attempt for attempt in attempts.read(run, "train") if attempt.ended]
    if ended:
        attempts.write(run, replace(ended[-1], started=ended[-1].started + 300))
    return bool(ended)


def fill(folder: Path) -> None:
    """Leave no byte free for a few seconds."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**20 if shutil.disk_usage(folder).free > 2**21 else 4096))
    time.sleep(random.uniform(1, 6))
    filler.unlink()


@contextmanager
def small_disk() -> Iterator[Path]:
    """A folder on a file system of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"size={DISK},mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def kill_leftovers(run: Path) -> None:
    """End processes of this run that a failed round left behind."""
    mine = [pid for pid, line in processes() if str(run) in line and pid != os.getpid()]
    for pid in descendants(mine):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--faults", type=int, default=3, help="faults a round, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="stop at the first harm; copy its run there")
    options = parser.parse_args()
    random.seed(options.seed)
    cluster = Cluster()
    if not cluster.up():
        print("no Slurm answers: make cluster", file=sys.stderr)
        return 2
    counts: collections.Counter[str] = collections.Counter()
    wrong = lost = unfinished = again = 0
    with small_disk() as top:
        config = write_config(top)
        values = yaml.safe_load(config.read_text())
        values["infer"]["shards"] = SHARDS
        values["train"]["epochs"] = 4
        config.write_text(yaml.safe_dump(values))
        place = {"partition": "low0", "gpus": 4, "gpu_type": "rtx3090"}
        settings = {
            "defaults": {"partition": "cpu", "memory": "500M", "time": "10", "save_seconds": 30},
            "train": place,
        }
        where = top / "cluster.yaml"
        where.write_text(yaml.safe_dump({**settings, "requeue_cap": 20}))
        reference = RunPaths(top / "reference")
        yelp_hpc(
            *("submit", "all", "--config", str(config), "--executor", "local"),
            *("--run", str(reference.root)),
        )
        name = "adapter_model.safetensors"
        expected = sha256_file(reference.adapter / name)
        for round_ in range(options.rounds):
            run = RunPaths(copy_run(reference.root, top / f"round-{round_}"))
            command = ["submit", "all", "--config", str(config), "--cluster", str(where)]
            command += ["--run", str(run.root)]
            yelp_hpc(*command)
            ids = {line["name"]: line["job"] for line in read_jsonl(run.submissions)}
            end = time.monotonic() + 30 * max(8, options.faults)
            done, filled = 0, counts["disk"]
            while done < options.faults and time.monotonic() < end:
                time.sleep(random.uniform(1, 6))
                fault = random.choice(FAULTS)
                with suppress(YelpHpcError, subprocess.CalledProcessError):
                    if strike(fault, cluster, ids["train"], ids["infer-base"], run, command):
                        counts[fault] += 1
                        done += 1
                if not client.queue([ids["train"]]):
                    if run.adapter.exists() or counts["disk"] == filled:
                        break
                    if yelp_hpc(*command, check=False).returncode == 0:
                        again += 1
                        ids = {line["name"]: line["job"] for line in read_jsonl(run.submissions)}
            try:
                wait_ended(list(ids.values()), 600)
            except AssertionError:
                unfinished += 1
                client.cancel(list(ids.values()))
                kill_leftovers(run.root)
            if counts["disk"] > filled and not run.metrics.exists():
                again += 1
                yelp_hpc(*command, "--wait", check=False)
            adapter = run.adapter / name
            wrong += not adapter.exists() or sha256_file(adapter) != expected
            lost += missing_rows(run, reference)
            total = sum(counts.values())
            print(
                f"round {round_ + 1}: {total} faults so far, {wrong} wrong, {lost} lost, "
                f"{unfinished} did not end, {again} submitted again ({_kinds(counts)})",
                flush=True,
            )
            if options.keep and (wrong or lost or unfinished):
                shutil.copytree(run.root, options.keep)
                break
            shutil.rmtree(run.root)
    print(f"{options.rounds} rounds, {sum(counts.values())} faults: {_kinds(counts)}")
    print(f"lost rows: {lost}; wrong hashes: {wrong}; rounds that did not end: {unfinished}")
    print(f"submitted again after a full disk: {again}")
    return int(bool(lost or wrong or unfinished))


def _kinds(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def missing_rows(run: RunPaths, reference: RunPaths) -> int:
    """Rows of the test set that a model's shards do not hold exactly once."""
    import pyarrow.parquet as pq

    rows = set(pq.read_table(reference.split("test"), columns=["row"])["row"].to_pylist())
    lost = 0
    for model in ("base", "tuned"):
        found: collections.Counter[int] = collections.Counter()
        for path in run.predictions(model).glob("shard-*.parquet"):
            found.update(pq.read_table(path, columns=["row"])["row"].to_pylist())
        lost += sum(found[row] != 1 for row in rows)
    return lost


if __name__ == "__main__":
    sys.exit(main())
