"""The command line: parses, calls one function, turns an error into one message and an exit code.

Imports of anything slow stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from yelp_hpc.cli.across import compare, study
from yelp_hpc.cli.completion import COMPLETE_VARIABLE, completion
from yelp_hpc.cli.config import config
from yelp_hpc.cli.demo import demo
from yelp_hpc.cli.image import image
from yelp_hpc.cli.meant import Commands, Words, shards_of
from yelp_hpc.cli.options import (
    CLUSTER,
    CONFIG,
    EXECUTOR,
    JSON,
    RUN,
    SET,
    WAIT,
    WRITTEN_RUN,
    Place,
    cluster_of,
)
from yelp_hpc.cli.plan import plan
from yelp_hpc.cli.predict import predict
from yelp_hpc.cli.record import export, reproduce, track, verify
from yelp_hpc.cli.site import doctor, init
from yelp_hpc.errors import YelpHpcError, in_shell
from yelp_hpc.progress import as_called, say
from yelp_hpc.rundir.modes import unreachable
from yelp_hpc.rundir.paths import MODELS, STAGES


def _version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from yelp_hpc.own_files import version

        click.echo(f"yelp_hpc, version {version()}")
        context.exit()


def _spell_help_as_called() -> None:
    """Have every `--help` name the program as it was called."""
    helped = click.Command.get_help
    if getattr(helped, "spelt", False):
        return

    def get_help(self: click.Command, ctx: click.Context) -> str:
        return as_called(helped(self, ctx))

    get_help.spelt = True  # type: ignore[attr-defined]
    click.Command.get_help = get_help  # type: ignore[method-assign]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Fine-tune, evaluate and publish a review classifier as resumable Slurm jobs.

    \b
    The whole way on this machine, in minutes:
      python -m yelp_hpc demo
    The report's run on a cluster:
      python -m yelp_hpc submit all --config configs/yelp_chatglm3.yaml \\
          --cluster configs/clusters/4x3090.yaml --run runs/yelp
      python -m yelp_hpc status --run runs/yelp

    Exit codes: 0 done, 1 failed, 2 the request is wrong, 75 saved (run me again).
    """


cli.add_command(demo)
cli.add_command(init)
cli.add_command(doctor)
cli.add_command(plan)


@cli.command()
@click.argument("stage", type=Words([*STAGES, "all"]))
@CONFIG
@WRITTEN_RUN
@SET
@EXECUTOR
@CLUSTER
@click.option("--dry-run", is_flag=True, help="print the sbatch scripts and the commands only")
@WAIT
def submit(
    stage: str,
    config_file: str,
    run_dir: str,
    overrides: tuple[str, ...],
    executor: str,
    cluster: str | None,
    dry_run: bool,
    wait: bool,
) -> None:
    """Submit one stage, or all of them as a chain.

    \b
    What would be submitted, without submitting:
      python -m yelp_hpc submit all --config configs/yelp_chatglm3.yaml \\
          --cluster configs/clusters/4x3090.yaml --run runs/yelp --dry-run
    Another seed on the same rows, beside the first run, on this machine:
      python -m yelp_hpc submit all --config configs/demo.yaml --executor local \\
          --set seed=43 --set data.seed=42 --run runs/demo-43
    """
    from yelp_hpc.config import load_config
    from yelp_hpc.jobs.chain import submit as submit_jobs
    from yelp_hpc.rundir.manifest import Asked

    loaded = load_config(config_file, overrides)
    submit_jobs(
        stage,
        Path(run_dir).resolve(),
        loaded.config,
        cluster_of(cluster),
        executor=executor,
        dry_run=dry_run,
        wait=wait,
        asked=Asked(loaded, config_file, overrides),
    )


@cli.command("run")
@click.argument("stage", type=Words(STAGES))
@RUN
@click.option("--model", type=Words(MODELS), help="infer: which model (default: each)")
@click.option(
    "--shard", metavar="K", callback=shards_of, help="infer: which, 3 or 0-2,5 (default: all)"
)
def run_stage(stage: str, run_dir: str, model: str | None, shard: tuple[int, ...] | None) -> None:
    """Run one stage here, in this process: what the container executes.

    \b
    To see a stage fail under your eyes:
      python -m yelp_hpc run train --run runs/demo
      python -m yelp_hpc run infer --run runs/demo --model tuned --shard 1
    """
    from importlib import import_module

    from yelp_hpc.errors import RequestError
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.study import is_study, read_study, take_shared
    from yelp_hpc.runtime import set_runtime_defaults

    if stage != "infer" and (model is not None or shard is not None):
        raise RequestError(f"--model and --shard belong to infer, not to {stage}")
    if stage == "collect" and is_study(run_dir):
        import_module("yelp_hpc.stages.collect").run_study(read_study(run_dir))
        return
    run, config = load_run(run_dir)
    take_shared(run)
    set_runtime_defaults()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would fill the log
    module = import_module(f"yelp_hpc.stages.{stage}")
    if stage != "infer":
        module.run(run, config)
        return
    for name in [model] if model else config.infer.models:
        module.run(run, config, model=name, shard=shard)


@cli.command()
@WRITTEN_RUN
@JSON
def collect(run_dir: str, as_json: bool) -> None:
    """Check coverage, print the table, write metrics.json and report.html.

    \b
      python -m yelp_hpc collect --run runs/demo
      python -m yelp_hpc collect --run runs/demo --json | jq .models.tuned.f1
    """
    from yelp_hpc.rundir.collected import write_collected
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.study import is_study, read_study
    from yelp_hpc.stages import collect as stage

    if is_study(run_dir):
        study_found = read_study(run_dir)
        if as_json:
            click.echo(json.dumps(stage.rank(study_found)))
        else:
            stage.run_study(study_found)
        return
    run, config = load_run(run_dir)
    if as_json and not run.request.is_file():
        metrics, page = stage.compute(run, config)
        try:
            write_collected(run, metrics, page)
        finally:
            click.echo(json.dumps(metrics))
    else:
        stage.run(run, config)


@cli.command()
@RUN
@JSON
@click.option("--watch", is_flag=True, help="refresh until nothing runs or waits")
def status(run_dir: str, as_json: bool, watch: bool) -> None:
    """Show each stage's state, from markers first, then Slurm.

    \b
      python -m yelp_hpc status --run runs/yelp --watch
      python -m yelp_hpc status --run runs/yelp --json | jq -r '.stages[].state'
    """
    from yelp_hpc.jobs.status import show_status
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.study import is_study, read_study

    if is_study(run_dir):
        from yelp_hpc.jobs.study.status import show_study

        show_study(read_study(run_dir), as_json=as_json, watch=watch)
        return
    show_status(load_run(run_dir)[0].root, as_json=as_json, watch=watch)


@cli.command()
@RUN
@click.argument("stage", required=False, type=Words(STAGES))
@click.option("--lines", default=40, show_default=True, type=click.IntRange(1))
def logs(run_dir: str, stage: str | None, lines: int) -> None:
    """Show the end of the right log: the last failure's first.

    \b
      python -m yelp_hpc logs --run runs/yelp
      python -m yelp_hpc logs train --run runs/yelp --lines 200
    """
    from yelp_hpc.jobs.logs import show_logs
    from yelp_hpc.rundir.manifest import load_run

    run, _ = load_run(run_dir)
    show_logs(run.root, stage, lines)


@cli.command()
@RUN
def cancel(run_dir: str) -> None:
    """Cancel every job of a run and of its predictions, and nothing else. What is done is kept.

    \b
      python -m yelp_hpc cancel --run runs/yelp
    """
    from yelp_hpc.jobs.chain import cancel as cancel_jobs
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.study import is_study, read_study

    if is_study(run_dir):
        from yelp_hpc.jobs.study.submit import cancel_study

        found = cancel_study(read_study(run_dir))
    else:
        found = cancel_jobs(load_run(run_dir)[0].root)
    if not found:
        click.echo("nothing to cancel: no job of this run is waiting or running")


cli.add_command(config)


@cli.command()
@CONFIG
@SET
@click.option(
    "--cluster",
    metavar="FILE",
    type=Place(),
    help="its cache is filled; its image does what is not installed here",
)
def fetch(config_file: str, overrides: tuple[str, ...], cluster: str | None) -> None:
    """Download the model (and a Hub data set) where the network is, for jobs without one.

    A Hub model needs nothing; a Hub data set and the demo need the job side, and so the image that
    --cluster names where it is not installed.

    \b
      python -m yelp_hpc fetch --config configs/yelp_chatglm3.yaml
    """
    from yelp_hpc.config import load_config
    from yelp_hpc.models.local import model_folder

    config = load_config(config_file, overrides).config
    cluster_of(cluster, fetches=True)
    click.echo(f"model: {model_folder(config.model)}")
    if config.data.source != "file":
        from yelp_hpc.data.sources import read_source

        train, test = read_source(config)
        tested = f", {len(test)} test rows" if test else ""
        click.echo(f"data: {len(train)} training rows{tested}")


@cli.command()
@RUN
@click.option("--dry-run", is_flag=True, help="show the card and the files, upload nothing")
def publish(run_dir: str, dry_run: bool) -> None:
    """Upload the adapter, its card and its figures to the Hub, from here.

    \b
    See the card and the list of files first:
      python -m yelp_hpc publish --run runs/yelp --dry-run
    """
    from yelp_hpc.errors import RequestError
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.stages import publish as stage

    run, config = load_run(run_dir)
    if config.publish.repo_id is None and not dry_run:
        raise RequestError(
            "publish.repo_id is not set, so there is nowhere to publish to:\n  python -m yelp_hpc "
            f"submit publish --config FILE --run {in_shell(run_dir)} "
            "--set publish.repo_id=OWNER/NAME"
        )
    stage.run(run, config, dry_run=dry_run)


cli.add_command(compare)
cli.add_command(study)
cli.add_command(track)
cli.add_command(predict)
cli.add_command(export)
cli.add_command(verify)
cli.add_command(reproduce)
cli.add_command(image)
cli.add_command(completion)


def interrupted(arguments: Sequence[str]) -> str:
    """What Ctrl-C says: jobs on Slurm go on, and how to follow or stop them."""
    from yelp_hpc.cli.job_side import option

    run = option(arguments, "--out" if arguments[:1] == ["study"] else "--run")
    if run is None:
        return "interrupted"
    return (
        "interrupted; jobs that were submitted go on.\n"
        f"  follow them:  python -m yelp_hpc status --run {in_shell(run)} --watch\n"
        f"  stop them:    python -m yelp_hpc cancel --run {in_shell(run)}"
    )


def main() -> None:
    """Run the command line; every error of the toolkit is one message and an exit code."""
    _spell_help_as_called()
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = cli.main(standalone_mode=False, complete_var=COMPLETE_VARIABLE)
    except YelpHpcError as error:
        say(str(error))
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        say(interrupted(sys.argv[1:]))
        sys.exit(130)
    except click.ClickException as error:
        from yelp_hpc.cli.meant import usage_meant

        if isinstance(error, click.UsageError) and (meant := usage_meant(error, sys.argv[1:])):
            error = click.UsageError(meant, error.ctx)
        with suppress(OSError):  # nobody reads it, or a full disk holds it
            error.show()
        sys.exit(2)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            say(unreachable(error))
        sys.exit(1)
    except ModuleNotFoundError as error:
        from yelp_hpc.cli.job_side import go_on_in_image

        try:
            go_on_in_image(error, sys.argv[1:])
        except YelpHpcError as refusal:
            say(str(refusal))
            sys.exit(refusal.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
