"""A sum over the ranks of this node: do the GPUs talk to each other, and how fast?

`python -m yelp_hpc.ranks.allreduce --ranks N` starts N processes (NCCL on GPUs, gloo on CPUs)
that meet as training ranks do, and prints one JSON object; it ends with 0 whatever it found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import IO, Any

from yelp_hpc.own_files import own_module
from yelp_hpc.ranks.launch import Rendezvous, free_port, rank_environment

MEGABYTES = 32
ROUNDS = 5
LIMIT_SECONDS = 180.0


def all_reduce(ranks: int, limit: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Start `ranks` processes, have each add its tensor to the others', look at the sums.

    Returns:
        backend, ranks, devices, torch, cuda, correct, gb_per_s; or problem, the first error.
    """
    place = Rendezvous(1, 0, "127.0.0.1", free_port())
    cores = len(os.sched_getaffinity(0))
    processes: list[subprocess.Popen[str]] = []
    errors: list[IO[str]] = []
    with ExitStack() as files:
        try:
            for rank in range(ranks):
                # a file each: a pipe could fill up and stall, in one file their lines would mix
                errors.append(files.enter_context(tempfile.TemporaryFile("w+")))
                extra = rank_environment(place, rank, ranks, cores, os.environ)
                processes.append(
                    subprocess.Popen(
                        [*own_module("yelp_hpc.ranks.allreduce"), "--rank"],
                        env={**os.environ, **extra},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=errors[rank],
                        text=True,
                    )
                )
            return _gather(processes, errors, limit)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
                if process.stdout:
                    process.stdout.close()


def _gather(
    processes: list[subprocess.Popen[str]], errors: list[IO[str]], limit: float
) -> dict[str, Any]:
    end = time.monotonic() + limit
    while any(process.poll() is None for process in processes):
        bad = [p for p in processes if p.poll() not in (None, 0)]
        if bad or time.monotonic() > end:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll() not in (None, 0):
            errors[rank].seek(0)
            printed = errors[rank].read().splitlines()
            lines = [line for line in printed if re.match(r"[\w.]*Error", line)]
            text = lines[0] if lines else f"ended with {process.returncode}"
            return {"problem": f"rank {rank}: {text}"[:500], "ranks": len(processes)}
    if any(process.poll() is None for process in processes):
        return {"problem": f"no sum within {limit:.0f} s", "ranks": len(processes)}
    outputs = [process.stdout.read() for process in processes if process.stdout]
    said = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        **said[0],
        "devices": [one["device"] for one in said],
        "correct": all(one["correct"] for one in said),
    }


def _one_rank() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if gpus and size > gpus:
        raise RuntimeError(f"{size} ranks, but torch sees {gpus} GPUs")
    backend = "nccl" if gpus else "gloo"
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    count = MEGABYTES * 2**20 // 4
    seconds = []
    for _ in range(ROUNDS):
        values = torch.full((count,), float(rank + 1), device=device)
        if gpus:
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if gpus:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    correct = bool((values == size * (size + 1) / 2).all())
    dist.destroy_process_group()
    return {
        "backend": backend,
        "ranks": size,
        "device": torch.cuda.get_device_name(device) if gpus else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "correct": correct,
        "gb_per_s": MEGABYTES * 2**20 / 1e9 / min(seconds),
    }


def main() -> None:
    """Measure on this machine, or be one of the processes that do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", action="store_true", help="be one of them")
    arguments = parser.parse_args()
    print(json.dumps(_one_rank() if arguments.rank else all_reduce(arguments.ranks)))


if __name__ == "__main__":
    main()
