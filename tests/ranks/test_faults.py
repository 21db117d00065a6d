"""A fault of a node's hardware asks for another start; a fault of the program does not."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from yelp_hpc.errors import NodeFault, StageError
from yelp_hpc.ranks.launch import launch

RANK = """
import sys
from yelp_hpc.ranks.rank import run_rank

def work(stop):
    raise RuntimeError(sys.stdin.read())

sys.exit(run_rank(work))
"""


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA error: uncorrectable ECC error encountered", NodeFault),
        ("NCCL error: ncclSystemError: System call failed or device error", NodeFault),
        ("CUDA error: device-side assert triggered", StageError),
        ("mat1 and mat2 shapes cannot be multiplied", StageError),
    ],
)
def test_a_nodes_fault_is_75_and_names_the_node(
    text: str, kind: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        launch([sys.executable, "-c", RANK], text.encode(), 1, tmp_path)
    assert text in str(caught.value)
    assert (socket.gethostname() in str(caught.value)) is (kind is NodeFault)
