"""Nodes whose hardware failed under this run: RUN/logs/node-faults.jsonl, a line each.

A stage writes the line on the node itself; the supervisor reads it when it asks for a requeue, so
that the job goes elsewhere. Imports no torch.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from yelp_hpc.errors import NodeFault, first_line
from yelp_hpc.rundir.files import append_jsonl, read_jsonl
from yelp_hpc.rundir.paths import RunPaths


def this_node() -> str:
    """The name by which Slurm calls this node, else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def recorded_faults(run: RunPaths) -> Iterator[None]:
    """Record a `NodeFault` that ends the block."""
    try:
        yield
    except NodeFault as error:
        line = {"node": this_node(), "time": round(time.time(), 3), "what": first_line(error)}
        append_jsonl(run.node_faults, line)
        raise


def read_faults(run: RunPaths) -> list[dict[str, Any]]:
    """The lines of the record, oldest first: `node`, `time`, `what`."""
    return read_jsonl(run.node_faults)
