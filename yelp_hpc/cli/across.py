"""The commands on several runs: `compare` and `study`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from yelp_hpc.cli.options import CLUSTER, CONFIG, EXECUTOR, JSON, SET, WAIT, Place, cluster_of
from yelp_hpc.progress import say


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=Place())
@JSON
@click.option("--html", metavar="FILE", type=Place(writes=True), help="write one HTML page, too")
def compare(runs: tuple[str, ...], as_json: bool, html: str | None) -> None:
    """Compare finished runs on the test rows that they share.

    Settings that differ, figures with intervals, paired tests of every two models, cost. A row is
    shared where its text and its label are the same; runs that share none are refused.

    \b
      python -m yelp_hpc compare runs/demo runs/demo-43
      python -m yelp_hpc compare runs/* --html compared.html
    """
    from yelp_hpc.errors import RequestError
    from yelp_hpc.rundir.files import write_bytes
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.modes import refuse_foreign

    loaded = [load_run(run) for run in runs]
    if len({run.root for run, _ in loaded}) < len(loaded):
        raise RequestError("the same run directory is named twice")
    from yelp_hpc.evaluation.across import compared, compared_shown  # what is no run comes first

    if html:
        refuse_foreign(Path(html), compared_shown.is_comparison)
    found = compared.compare(loaded)
    try:
        if html:
            write_bytes(Path(html), compared_shown.comparison_page(found).encode())
    finally:
        if as_json:
            click.echo(json.dumps(found))
        else:
            compared_shown.print_comparison(found)
    if html:
        say(f"wrote {html}")


@click.command()
@click.argument("file", metavar="FILE", type=Place())
@CONFIG
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=Place(file_okay=False, writes=True),
    help="the study's folder",
)
@SET
@EXECUTOR
@CLUSTER
@click.option("--dry-run", is_flag=True, help="print the runs, and what each takes of another")
@WAIT
def study(
    file: str,
    config_file: str,
    out: str,
    overrides: tuple[str, ...],
    executor: str,
    cluster: str | None,
    dry_run: bool,
    wait: bool,
) -> None:
    """Run a config with several seeds and settings, and rank them.

    FILE maps keys of the config to lists of values: `seed: [1, 2, 3]`,
    `train.learning_rate: [5e-5, 1e-4]`. Each combination is an ordinary run directory in DIR; what
    their stages would make twice is made once. Again, it does what is missing.

    \b
      python -m yelp_hpc study configs/studies/seeds.yaml --config demo \\
          --executor local --out runs/seeds
      python -m yelp_hpc status --run runs/seeds
    """
    from yelp_hpc.jobs.study.plan import plan_study
    from yelp_hpc.jobs.study.submit import submit_study

    planned, asked = plan_study(file, config_file, overrides, out)
    settings = cluster_of(cluster)
    if dry_run:
        for run in planned.runs:
            values = ", ".join(f"{key}={json.dumps(value)}" for key, value in run.values.items())
            takes = "".join(f"; {part} of {maker}" for part, maker in run.takes.items())
            click.echo(f"{run.name}: {values or 'the config as it is'}{takes}")
        return
    submit_study(planned, asked, settings, executor, wait)
    if (executor == "local" or wait) and planned.leaderboard.is_file():
        click.echo(f"leaderboard: {planned.paths.report}")
