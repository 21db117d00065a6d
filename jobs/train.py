"""Launcher of `train`: one job of one or more nodes, a supervisor on each.

The stage itself starts a rank for each GPU of its node (train.nproc). With several nodes each
supervisor hands the rendezvous on as YELP_HPC_NNODES, YELP_HPC_NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

from collections.abc import Mapping

from yelp_hpc.config import Config
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.progress import trained
from yelp_hpc.rundir.paths import RunPaths


def jobs(config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The job that is still to be done, or nothing."""
    return [] if trained(paths) else [Job("train", after=(("afterok", "prepare"),))]


def rendezvous(env: Mapping[str, str], first_host: str) -> dict[str, str]:
    """What the stage needs to meet the other nodes; nothing when there is only one.

    The port is a function of the job id, so that all nodes agree without talking and two jobs on
    one node rarely clash.
    """
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes == 1:
        return {}
    return {
        "YELP_HPC_NNODES": str(nodes),
        "YELP_HPC_NODE_RANK": env["SLURM_NODEID"],
        "MASTER_ADDR": first_host,
        "MASTER_PORT": str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000),
    }
