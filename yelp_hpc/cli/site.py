"""The commands `init` and `doctor`: a new site's first ten minutes, and its bad days."""

from __future__ import annotations

from pathlib import Path

import click

from yelp_hpc.cli.options import CLUSTER, JSON, SET, Place, cluster_of


@click.command()
@click.option(
    "--cluster", default="cluster.yaml", show_default=True, metavar="FILE", type=Place(writes=True)
)
@click.option(
    "--config",
    "config_file",
    default="config.yaml",
    show_default=True,
    metavar="FILE",
    type=Place(writes=True),
)
@click.option("--force", is_flag=True, help="replace files that are there")
@click.option(
    "--data", metavar="FILE", type=Place(), help="write the config alone, its task from this data"
)
def init(cluster: str, config_file: str, force: bool, data: str | None) -> None:
    """Write a cluster file, by asking Slurm, and a starter config.

    \b
    python -m yelp_hpc init && python -m yelp_hpc doctor --cluster cluster.yaml
    python -m yelp_hpc init --data reviews.csv --config mine.yaml
    """
    if data is not None:
        from yelp_hpc.data.draft import init_data

        init_data(data, Path(config_file), force)
        return
    from yelp_hpc.jobs.site.init import init as write_files

    write_files(Path(cluster), Path(config_file), force)


@click.command()
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=Place(),
    help="also look at its model and data",
)
@CLUSTER
@click.option("--run", "run_dir", metavar="DIR", type=Place(), help="run directory, old or new")
@SET
@click.option("--on-node", is_flag=True, help="submit a short job that looks at a compute node")
@click.option(
    "--wait-seconds", default=900, show_default=True, type=click.IntRange(1), help="for that job"
)
@JSON
def doctor(
    config_file: str | None,
    cluster: str | None,
    run_dir: str | None,
    overrides: tuple[str, ...],
    on_node: bool,
    wait_seconds: int,
    as_json: bool,
) -> None:
    """Check Slurm, this machine, a node, the image; say what mends it. Exit 1 on a failure.

    \b
    python -m yelp_hpc doctor --cluster cluster.yaml \\
        --config configs/demo.yaml --on-node
    """
    from yelp_hpc.config import load_config
    from yelp_hpc.errors import RequestError
    from yelp_hpc.jobs.doctor.diagnose import diagnose
    from yelp_hpc.jobs.doctor.findings import print_findings

    if overrides and not config_file:
        raise RequestError("--set changes a value of a config: give --config too")
    findings = diagnose(
        cluster_of(cluster),
        load_config(config_file, overrides).config if config_file else None,
        run_dir,
        config_file=config_file or "FILE",
        cluster_file=cluster,
        on_node=on_node,
        wait_seconds=wait_seconds,
    )
    print_findings(findings, as_json)
