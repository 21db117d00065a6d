"""Every unit that faults.py strikes beside the light ones, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults import Unit
from benchmarks.faults_commands import Publishing, Slurm, command_units
from benchmarks.faults_small import torch_units
from benchmarks.faults_stages import Stages, stage_units
from yelp_hpc.rundir import modes


def _import_everything() -> None:
    """Import once what every injected process would import anew; nothing here starts a thread."""
    import matplotlib.pyplot
    import pandas
    import peft
    import pyarrow.dataset
    import pyarrow.parquet
    import rich.table
    import submitit
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.hub import finished
    from yelp_hpc.evaluation import charts, confusion_plot, report
    from yelp_hpc.jobs import chain, executor, supervisor
    from yelp_hpc.models import load
    from yelp_hpc.models.packed import batch, fused, linear
    from yelp_hpc.stages import collect, infer, prepare, publish, train
    from yelp_hpc.training import adapter, checkpoint, loop

    known: list[object] = [peft, submitit, LlamaForCausalLM, PreTrainedTokenizerFast, charts]
    known += [confusion_plot, report, chain, executor, supervisor, load, batch, fused, linear]
    known += [collect, infer, prepare, publish, train, adapter, checkpoint, loop]
    known += [matplotlib.pyplot, pandas, pyarrow.dataset, pyarrow.parquet, rich.table, finished]
    assert all(known)


@contextmanager
def heavy_units(top: Path) -> Iterator[list[Unit]]:
    """Every other unit; what they share lies in `top`."""
    stages, slurm = Stages(top / "stages"), Slurm(top / "slurm")
    publishing = Publishing(top / "publishing")
    for folder in (stages.top, publishing.top):
        folder.mkdir(parents=True)
    _import_everything()
    modes.PATIENCE = 0  # a disk that is struck full stays full
    if (pid := os.fork()) == 0:
        code = 1
        try:
            stages.make()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the tiny model cannot be made")
    publishing.start()
    try:
        yield [*torch_units(), *stage_units(stages), *command_units(slurm, publishing)]
    finally:
        if publishing.pid:
            os.kill(publishing.pid, 9)
            os.waitpid(publishing.pid, 0)
