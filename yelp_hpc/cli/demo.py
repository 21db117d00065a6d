"""The command `demo`: every stage on a small model and real reviews, from a checkout or a wheel."""

from __future__ import annotations

import click

from yelp_hpc.cli.options import SET, Place, cluster_of
from yelp_hpc.errors import in_shell


@click.command()
@click.option(
    "--run",
    "run_dir",
    default="runs/demo",
    show_default=True,
    metavar="DIR",
    type=Place(file_okay=False, writes=True),
    help="run directory",
)
@SET
@click.option(
    "--cluster",
    metavar="FILE",
    type=Place(),
    help="a cluster file, whose image then runs the stages, here",
)
def demo(run_dir: str, overrides: tuple[str, ...], cluster: str | None) -> None:
    """Run every stage on this machine: SmolLM2-135M and real review sentences, from PyPI.

    Minutes on two cores; no GPU, no cluster, no account. Ends with the table of the base against
    the tuned model. The same command again finds everything done.

    \b
      python -m yelp_hpc demo
      python -m yelp_hpc demo --run runs/short --set train.max_steps=20
    """
    from pathlib import Path

    from yelp_hpc.config import load_config
    from yelp_hpc.jobs.chain import submit
    from yelp_hpc.own_files import SHARE
    from yelp_hpc.progress import say
    from yelp_hpc.rundir.manifest import Asked

    file = SHARE / "configs" / "demo.yaml"
    loaded = load_config(file, overrides)
    submit(
        "all",
        Path(run_dir).resolve(),
        loaded.config,
        cluster_of(cluster),
        executor="local",
        wait=True,
        asked=Asked(loaded, str(file), overrides),
    )
    say(
        f"the report: {run_dir}/report.html\n"
        f"next: python -m yelp_hpc verify --run {in_shell(run_dir)}   "
        "every figure, computed again\n"
        "      python -m yelp_hpc init                  your cluster, by asking Slurm"
    )
