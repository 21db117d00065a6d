"""Launcher of ``prepare``: one job, the first of the chain."""

from __future__ import annotations

from jobs.cluster import ClusterConfig
from jobs.job import Job
from jobs.progress import prepared
from yelp_hpc.config import Config
from yelp_hpc.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job that is still to be done, or nothing."""
    return [] if prepared(paths) else [Job("prepare")]
