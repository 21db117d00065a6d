"""Launcher of `train`: one job of one or more nodes, a supervisor on each.

The stage itself starts a rank for each GPU of its node (train.nproc). With several nodes each
supervisor hands the meeting place on (`ranks.launch.Rendezvous.handed_on`).
"""

from __future__ import annotations

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.progress import trained
from yelp_hpc.rundir.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job that is still to be done, or nothing."""
    return [] if trained(paths) else [Job("train", after=(("afterok", "prepare"),))]
