"""Options that several commands share."""

from __future__ import annotations

import click

from yelp_hpc.cli.completion import complete_settings
from yelp_hpc.cli.meant import Words

RUN = click.option(
    "--run",
    "run_dir",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="run directory",
)
CONFIG = click.option(
    "--config", "config_file", required=True, metavar="FILE", type=click.Path(), help="YAML config"
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="a.b=c",
    shell_complete=complete_settings,
    help="change one value of the config",
)
JSON = click.option("--json", "as_json", is_flag=True, help="print JSON for programs")
EXECUTOR = click.option(
    "--executor", type=Words(["slurm", "local"]), default="slurm", show_default=True
)
CLUSTER = click.option(
    "--cluster",
    metavar="FILE",
    type=click.Path(),
    help="resources and container: configs/clusters/*.yaml",
)
WAIT = click.option("--wait", is_flag=True, help="follow until the end")
