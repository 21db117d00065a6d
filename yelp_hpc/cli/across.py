"""The commands on several runs: `compare` and `study`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from yelp_hpc.cli.options import JSON


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path())
@JSON
@click.option("--html", metavar="FILE", type=click.Path(), help="write one HTML page, too")
def compare(runs: tuple[str, ...], as_json: bool, html: str | None) -> None:
    """Compare finished runs on the test rows that they share.

    Settings that differ, figures with intervals, paired tests of every two models, cost. A row is
    shared where its text and its label are the same; runs that share none are refused.

    \b
      python -m yelp_hpc compare runs/demo runs/demo-43
      python -m yelp_hpc compare runs/* --html compared.html
    """
    from yelp_hpc.errors import RequestError
    from yelp_hpc.evaluation.across import compared, compared_shown
    from yelp_hpc.rundir.files import write_bytes
    from yelp_hpc.rundir.manifest import load_run

    loaded = [load_run(run) for run in runs]
    if len({run.root for run, _ in loaded}) < len(loaded):
        raise RequestError("the same run directory is named twice")
    found = compared.compare(loaded)
    if as_json:
        click.echo(json.dumps(found))
    else:
        compared_shown.print_comparison(found)
    if html:
        write_bytes(Path(html), compared_shown.comparison_page(found).encode())
        click.echo(f"wrote {html}", err=True)
