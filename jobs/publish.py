"""Launcher of `publish`: one job after `collect`, when a repository is named."""

from __future__ import annotations

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.progress import made_with
from yelp_hpc.rundir.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job, or nothing when no repository is named or the Hub has these figures already."""
    if config.publish.repo_id is None:
        return []
    if made_with(paths, config, "publish") and not _newer_metrics(paths):
        return []
    return [Job("publish", after=(("afterok", "collect"),))]


def _newer_metrics(paths: RunPaths) -> bool:
    try:
        return paths.metrics.stat().st_mtime > paths.published.stat().st_mtime
    except OSError:
        return False
