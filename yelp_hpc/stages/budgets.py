"""How the stage train cuts its batches: by the memory that the first start finds.

Reads the model's config.json and writes `train/budgets.json`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from yelp_hpc.config import Config
from yelp_hpc.data.packing import DataPlan, default_pieces, microbatch_tokens, more_pieces
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.forecast.memory import choose_budget
from yelp_hpc.forecast.model_shape import model_shape
from yelp_hpc.ranks.world import World
from yelp_hpc.rundir.files import read_json
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages.door import admit
from yelp_hpc.training.budget import Budget, read_budgets, write_budgets


def settle_budgets(
    paths: RunPaths,
    config: Config,
    model_path: Path,
    plan: DataPlan,
    own: Sequence[int],
    prefix: int,
    world: World,
    step: int,
) -> list[Budget]:
    """The record of how batches are cut, made at the first start and when the settings change."""
    settings = config.train
    budgets = read_budgets(paths)
    asked = (settings.max_tokens, settings.micro_batches, settings.gradient_checkpointing)
    if budgets and budgets[-1].asked == asked:
        return budgets
    try:
        shape = model_shape(read_json(model_path / "config.json"), str(model_path / "config.json"))
    except (RequestError, StageError):
        admit(config, model_path, prefix + max(own), tokenizer=False)  # every command's words
        raise
    pieces = settings.micro_batches
    if pieces == "auto":
        mean = sum(own) / len(own) * settings.global_batch
        pieces = default_pieces(mean, prefix, settings.global_batch)
    cuda = world.device.type == "cuda"
    memory = torch.cuda.get_device_properties(world.device).total_memory if cuda else free_memory()

    more = more_pieces(cuda)

    def largest(budget: int) -> int:
        return max(map(max, microbatch_tokens(plan, own, pieces, budget, prefix, more)))

    max_tokens, recompute = choose_budget(shape, config, memory, cuda, largest)
    chosen = Budget(
        step=step if budgets else 0,
        max_tokens=max_tokens,
        pieces=pieces,
        recompute=recompute,
        threads=budgets[0].threads if budgets else torch.get_num_threads(),
        asked=asked,
        why="the settings changed" if budgets else "the first start",
        more=more,
    )
    budgets.append(chosen)
    write_budgets(paths, budgets)
    return budgets


def free_memory() -> int:
    """Bytes of the host for this rank: its share of what is free."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:  # noqa: PTH123 (no file of ours)
        found = [line for line in file if line.startswith("MemAvailable")]
    free = int(found[0].split()[1]) * 1024 if found else pages
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
