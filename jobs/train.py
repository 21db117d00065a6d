"""Launcher of `train`: one job of one or more nodes, a supervisor on each.

The stage itself starts a rank for each GPU of its node (train.nproc). With several nodes each
supervisor hands the meeting place on (`ranks.launch.Rendezvous.handed_on`).
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.progress import trained
from yelp_hpc.own_files import own_module
from yelp_hpc.rundir.manifest import load_run
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.runtime import without_tokens


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job that is still to be done, or nothing."""
    return [] if trained(paths) else [Job("train", after=(("afterok", "prepare"),))]


TRACKING_SECONDS = 300.0


def write_trackers(paths: RunPaths) -> None:
    """Have a finished training's trackers written, on the host; what fails there fails no job."""
    names = load_run(paths.root)[1].train.trackers
    if not names or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    argv = [*own_module("yelp_hpc"), "track", "--run", str(paths.root)]
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(argv, env=without_tokens(os.environ), timeout=TRACKING_SECONDS)
