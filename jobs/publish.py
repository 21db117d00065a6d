"""Launcher of `publish`: one job after `collect`, when a repository is named."""

from __future__ import annotations

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.rundir.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job, or nothing when no repository is named or it was published already."""
    if config.publish.repo_id is None or paths.published.exists():
        return []
    return [Job("publish", after=(("afterok", "collect"),))]
