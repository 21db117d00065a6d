"""Launcher of `prepare`: one job, the first of the chain."""

from __future__ import annotations

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.progress import prepared
from yelp_hpc.rundir.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job that is still to be done, or nothing."""
    return [] if prepared(paths) else [Job("prepare")]
