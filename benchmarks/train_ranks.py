"""What the fixed tree of gradients costs against one all-reduce, in real steps, in turn.

    python benchmarks/train_ranks.py --run runs/demo [--ranks 2] [--steps 20] [--pieces 4]

Starts ranks (gloo) that take the steps of a prepared run: each step once as training does, every
micro-batch's gradient gathered and added in a fixed tree, and once with the gradients summed where
they are computed and one all-reduce. Both are cut alike. Prints the ratio of the sums of seconds,
wall and CPU, over all ranks; the CPU's holds on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from yelp_hpc.models.local import model_folder
from yelp_hpc.ranks.launch import Rendezvous, free_port, rank_environment
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.runtime import set_runtime_defaults

BATCH = 32


def main() -> None:
    """Start the ranks, add up what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a prepared run")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pieces", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "RANK" in os.environ:
        return one_rank(args)
    set_runtime_defaults()
    place = Rendezvous(1, 0, "127.0.0.1", free_port())
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, __file__, *sys.argv[1:]]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **rank_environment(place, rank, args.ranks, cores, os.environ)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(args.ranks)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    sums = [json.loads(text.splitlines()[-1]) for text in said]
    total = {way: {kind: sum(s[way][kind] for s in sums) for kind in ("wall", "cpu")}
             for way in sums[0]}  # fmt: skip
    ratios = {kind: total["tree"][kind] / total["all-reduce"][kind] - 1 for kind in ("wall", "cpu")}
    for kind, more in ratios.items():
        print(f"{kind}: the tree takes {more:+.2%} of a step with {args.ranks} ranks")
    if args.json:
        args.json.write_text(json.dumps({"seconds": total, "more": ratios}, indent=2) + "\n")


def one_rank(args: argparse.Namespace) -> None:
    """The steps of one rank, each in both ways."""
    from yelp_hpc.ranks.rank import StopRequest
    from yelp_hpc.ranks.world import join_world
    from yelp_hpc.rundir.paths import RunPaths
    from yelp_hpc.stages.train import build

    run, config = load_run(args.run)
    changes = {"global_batch": BATCH, "micro_batches": args.pieces, "max_tokens": 8192}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    world = join_world()
    with tempfile.TemporaryDirectory() as scratch:
        trial = RunPaths(Path(scratch) / "run")
        trial.root.mkdir()
        (trial.root / "prepare").symlink_to(run.prepare.resolve())
        trial.train.mkdir()
        training = build(trial, config, model_folder(config.model), {}, world, StopRequest())
        gradients, budget = training.gradients, training.budgets[0]
        ways: dict[str, Any] = {
            "tree": gradients.of,
            "all-reduce": lambda *a: summed(gradients, *a),
        }
        seconds = {way: {"wall": 0.0, "cpu": 0.0} for way in ways}
        for step in range(args.steps + 1):
            rows = training.plan.batch(step)
            for way in list(ways)[:: -1 if step % 2 else 1]:
                world.agree(step)  # all begin together
                wall, cpu = time.perf_counter(), time.process_time()
                ways[way](step, rows, budget)
                if step:
                    seconds[way]["wall"] += time.perf_counter() - wall
                    seconds[way]["cpu"] += time.process_time() - cpu
    print(json.dumps(seconds), flush=True)


def summed(gradients: Any, step: int, rows: tuple[int, ...], budget: Any) -> None:
    """The same micro-batches, their gradients added up in place, then one all-reduce."""
    import torch
    from torch.nn import functional as F

    from yelp_hpc.data.packing import cut_batch, deal
    from yelp_hpc.models.packed.batch import forward_selected, pack

    train, world = gradients.train, gradients.world
    own = [train.own_length(row) for row in rows]
    cut = cut_batch(own, budget.pieces, budget.max_tokens, train.prefix_length, budget.more)
    work = [train.prefix_length + sum(own[i] for i in piece) for piece in cut]
    count = sum(train.supervised(rows))
    gradients._forget_gradients()
    for piece in deal(work, world.size)[world.rank]:
        group = [rows[i] for i in cut[piece]]
        batch = pack(
            [train.sequence(row) for row in group], train.prefix_length, train.supervised(group)
        )
        with gradients.dropout.batch(step, group, batch):
            logits = forward_selected(gradients.model, batch)
            loss = F.cross_entropy(logits, train.targets(group), reduction="sum") / count
            loss.backward()
    parts = [p.grad.flatten() for p in gradients.parameters.values()]
    world.sum(torch.cat(parts))


if __name__ == "__main__":
    main()
