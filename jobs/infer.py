"""Launcher of `infer`: a job array for each model, a task for each missing shard.

More missing shards than the site's MaxArraySize are packed, neighbours into one task, which loads
the model once.
"""

from __future__ import annotations

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job, pack
from yelp_hpc.jobs.progress import shards_missing
from yelp_hpc.rundir.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """An array for each model with shards to do."""
    planned = []
    for model in config.infer.models:
        # task ids run from 0 to MaxArraySize - 1
        tasks = pack(shards_missing(paths, config, model), cluster.max_array_size)
        if tasks:
            first = "train" if model == "tuned" else "prepare"
            planned.append(Job("infer", model, tasks, (("afterok", first),)))
    return planned
