"""The command `plan`: what a run will cost, or what it was said to cost beside what it did."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yelp_hpc.cli.completion import complete_cards
from yelp_hpc.cli.options import JSON, SET, Number, Place, cluster_of
from yelp_hpc.progress import plain, say

if TYPE_CHECKING:
    from yelp_hpc.config import Config
    from yelp_hpc.forecast.forecast import Forecast
    from yelp_hpc.forecast.page import Happened
    from yelp_hpc.rundir.paths import RunPaths


@click.command()
@click.option("--config", "config_file", metavar="FILE", type=Place(), help="YAML config")
@click.option(
    "--run",
    "run_dir",
    metavar="DIR",
    type=Place(file_okay=False),
    help="count the tokens in its prepare/, keep a forecast with times there",
)
@SET
@click.option(
    "--cluster",
    metavar="FILE",
    type=Place(),
    help="names the nodes and the GPU: configs/clusters/*.yaml",
)
@click.option(
    "--gpu",
    metavar="NAME",
    shell_complete=complete_cards,
    help="a card of the table, e.g. rtx3090, a100, h100",
)
@click.option("--probe", is_flag=True, help="measure 20 steps on this machine first (minutes)")
@click.option("--tokens", type=Number(8), help="mean tokens of a prompt, where not known")
@click.option(
    "--efficiency",
    type=Number(0.01, 1),
    help="share of the card's rate of matrix products (default 0.7)",
)
@click.option("--mtbf", type=Number(0.1), help="hours between failures of a node")
@click.option("--compare", is_flag=True, help="put the forecast beside what happened in --run")
@JSON
def plan(
    config_file: str | None,
    run_dir: str | None,
    overrides: tuple[str, ...],
    cluster: str | None,
    gpu: str | None,
    probe: bool,
    tokens: float | None,
    efficiency: float | None,
    mtbf: float | None,
    compare: bool,
    as_json: bool,
) -> None:
    """Forecast tokens, memory, time, GPU-hours and disk before anything is queued.

    \b
    The report's run on four RTX 3090, nothing downloaded:
      python -m yelp_hpc plan --config configs/yelp_chatglm3.yaml --gpu rtx3090
    This machine, measured; the forecast is kept in the run directory:
      python -m yelp_hpc plan --config configs/demo.yaml --probe --run runs/demo
    And afterwards:
      python -m yelp_hpc plan --compare --run runs/demo
    """
    from yelp_hpc.config import load_config
    from yelp_hpc.errors import RequestError
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.modes import unwritable
    from yelp_hpc.rundir.paths import RunPaths

    problems = []
    if compare and run_dir is None:
        problems.append("--compare needs --run DIR, a run that is done")
    if config_file is None and run_dir is None:
        problems.append("name --config FILE, or --run DIR of a run that was submitted")
    if overrides and config_file is None:
        problems.append("--set changes a --config FILE; a run directory keeps its own settings")
    if run_dir is not None and not compare:
        problems += filter(None, [unwritable(Path(run_dir), folder=True)])
    if problems:
        raise RequestError("; ".join(problems))
    run = None
    if config_file is not None:
        config = load_config(config_file, overrides).config
        run = RunPaths(Path(run_dir).resolve()) if run_dir else None
    else:
        run, config = load_run(str(run_dir))
    happened = _happened(run, config) if compare and run else None
    # whoever names a machine or a size anew asks for another forecast than the one that was kept
    anew = any((overrides, cluster, gpu, probe, tokens, efficiency, mtbf))
    found = _kept(run) if compare and run and not anew else None
    if found is None:
        found = _forecast(config, run, cluster, gpu, probe, tokens, efficiency, mtbf)
        if run is not None and not compare and found.train_seconds is not None:
            from yelp_hpc.rundir.files import write_json

            write_json(run.plan, asdict(found))
    _show(found, happened, as_json)


def _forecast(
    config: Config,
    run: RunPaths | None,
    cluster: str | None,
    gpu: str | None,
    probe: bool,
    tokens: float | None,
    efficiency: float | None,
    mtbf: float | None,
) -> Forecast:
    from yelp_hpc.forecast.forecast import MTBF_HOURS, forecast
    from yelp_hpc.forecast.inputs import estimated_lengths, prepared_lengths, read_shape
    from yelp_hpc.forecast.machine import EFFICIENCY
    from yelp_hpc.gpus import find_card
    from yelp_hpc.models.door import check_model

    nodes, gpus = 1, 1
    if cluster is not None:
        from yelp_hpc.jobs.preflight import precision_note

        settings = cluster_of(cluster)
        wanted = settings.resources("train")
        if note := precision_note(config, settings):
            say(note)
        nodes, gpus = wanted.least_nodes, wanted.gpus or 1
        gpu = gpu or wanted.gpu_type
    card = find_card(gpu) if gpu and not probe else None
    notes = check_model(config)  # first: it says the same as every other command
    shape = read_shape(config)
    for note in notes:
        say(note)
    measured, lengths = None, None
    if probe:
        import pyarrow  # noqa: F401 - what the probe's stages need is missed before they start

        from yelp_hpc.forecast.probe import measure

        measured, lengths = measure(config, run)
    lengths = lengths or (prepared_lengths(run) if run else None)
    return forecast(
        config,
        shape,
        lengths or estimated_lengths(config, tokens),
        card=card,
        probe=measured,
        nodes=nodes,
        gpus=gpus,
        efficiency=efficiency or EFFICIENCY,
        mtbf_hours=mtbf or MTBF_HOURS,
    )


def _happened(run: RunPaths, config: Config) -> Happened:
    from yelp_hpc.errors import RequestError
    from yelp_hpc.forecast.happened import what_happened

    happened = what_happened(run, config)
    if happened.steps is None and happened.infer_seconds is None:
        raise RequestError(f"nothing has happened in {run.root} yet: nothing to compare with")
    return happened


def _kept(run: RunPaths) -> Forecast | None:
    """The forecast that a run directory holds; None for none, or one of another version."""
    from pydantic import TypeAdapter, ValidationError

    from yelp_hpc.forecast.forecast import Forecast
    from yelp_hpc.rundir.files import read_json

    if not run.plan.is_file():
        return None
    try:
        return TypeAdapter(Forecast).validate_python(read_json(run.plan))
    except ValidationError:
        return None


def _show(found: Forecast, happened: Happened | None, as_json: bool) -> None:
    from yelp_hpc.forecast.page import comparison, comparison_page, page

    if happened is None:
        click.echo(json.dumps(asdict(found)) if as_json else plain(page(found)))
    elif as_json:
        rows: list[dict[str, Any]] = [
            {"what": what, "forecast": before, "happened": after}
            for what, before, after in comparison(found, happened)
        ]
        click.echo(json.dumps({"rows": rows, "restarts": happened.restarts}))
    else:
        click.echo(plain(comparison_page(found, happened)))
