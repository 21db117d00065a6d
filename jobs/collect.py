"""Launcher of `collect`: one job after every prediction, whatever became of it.

`afterany`, because `afterok` on an array of which one task failed waits for ever; the stage
itself refuses to compute anything before every row is there, and names what is missing.
"""

from __future__ import annotations

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.progress import fingerprint, made_with, newest, shards_done
from yelp_hpc.rundir.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job, or nothing when the metrics are newer than every prediction."""
    if _up_to_date(config, paths):
        return []
    return [Job("collect", after=tuple(("afterany", f"infer-{m}") for m in config.infer.models))]


def _up_to_date(config: Config, paths: RunPaths) -> bool:
    shards = config.infer.shards
    if not made_with(paths, config, "collect"):
        return False
    if any(len(shards_done(paths, m, shards)) < shards for m in config.infer.models):
        return False
    times = [newest(fingerprint(paths, "infer", m, ())) or 0.0 for m in config.infer.models]
    made = paths.answered if paths.request.is_file() else paths.metrics
    return max(times) <= made.stat().st_mtime
