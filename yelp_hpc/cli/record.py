"""The commands on what a run holds: `track`, `export`, `verify` and `reproduce`."""

from __future__ import annotations

from pathlib import Path

import click

from yelp_hpc.cli.meant import Words
from yelp_hpc.cli.options import RUN, WRITTEN_RUN, Place
from yelp_hpc.progress import as_called, plain, say
from yelp_hpc.rundir.paths import TRACKERS


@click.command()
@WRITTEN_RUN
@click.option(
    "--to",
    "names",
    multiple=True,
    type=Words(TRACKERS),
    help="which, again and again; default: train.trackers of the config",
)
def track(run_dir: str, names: tuple[str, ...]) -> None:
    """Write the training's curves for TensorBoard, W&B (offline), trackio or MLflow.

    Into trackers/ of the run directory, from its log: one run there, however often it was requeued.

    \b
      python -m yelp_hpc track --run runs/demo --to tensorboard
    """
    from yelp_hpc.errors import RequestError
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.training import trackers

    run, config = load_run(run_dir)
    names = names or config.train.trackers
    if not names:
        raise RequestError(f"name one: --to {' or --to '.join(TRACKERS)}")
    for said in trackers.track(run, config, tuple(dict.fromkeys(names))):
        click.echo(said)


@click.command()
@RUN
@click.option("--merged", is_flag=True, help="the model: adapter and base as one")
@click.option(
    "--out",
    metavar="DIR",
    type=Place(file_okay=False, writes=True),
    help="folder to write the model to",
)
@click.option(
    "--predictions",
    metavar="FILE",
    type=Place(writes=True),
    help="csv, jsonl or parquet: review, truth, each model's answer and probabilities",
)
def export(run_dir: str, merged: bool, out: str | None, predictions: str | None) -> None:
    """Write the tuned model as a folder of its own, or the predictions as one file.

    \b
      python -m yelp_hpc export --run runs/demo --merged --out tuned-model
      python -m yelp_hpc export --run runs/demo --predictions demo.csv
    """
    from yelp_hpc.errors import RequestError
    from yelp_hpc.rundir.manifest import load_run

    if merged != (out is not None) or not (merged or predictions):
        raise RequestError("name what to export: --merged --out DIR, or --predictions FILE")
    run, config = load_run(run_dir)
    if predictions:
        from yelp_hpc.evaluation.joined import export_predictions

        export_predictions(run, config, Path(predictions))
        click.echo(predictions)
    if out:
        from yelp_hpc.publishing.export import export_merged

        export_merged(run, config, Path(out))
        click.echo(out)


@click.command()
@RUN
def verify(run_dir: str) -> None:
    """Hash everything again and recompute the metrics from the shards.

    Every F1 is computed a second time by scikit-learn, where that is installed.

    \b
      python -m yelp_hpc verify --run runs/demo
    """
    from yelp_hpc.errors import StageError, all_problems
    from yelp_hpc.proof import second_opinion
    from yelp_hpc.proof.verify import verify as find_problems
    from yelp_hpc.proof.verify import verify_study
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.study import is_study, read_study

    if is_study(run_dir):
        study = read_study(run_dir)
        root, problems = study.root, verify_study(study)
    else:
        run, _ = load_run(run_dir)
        root, problems = run.root, find_problems(run)
    if problems:
        raise StageError(all_problems(f"{root} does not hold what it says:", problems))
    click.echo(f"{root}: everything is what was written, and the metrics follow from it")
    if second_opinion.available():
        click.echo("scikit-learn finds the same F1, in both conventions and for each class")
    else:
        click.echo("scikit-learn is not installed here: F1 stands on our own counts alone")


@click.command()
@click.option(
    "--from",
    "source",
    required=True,
    metavar="FILE",
    type=Place(),
    help="run.json, or a run directory",
)
@RUN
@click.option("--compare", is_flag=True, help="both are done: say whether they are the same")
def reproduce(source: str, run_dir: str, compare: bool) -> None:
    """Prepare the same run again in a new directory, or compare it with the first.

    \b
      python -m yelp_hpc reproduce --from runs/demo/run.json --run runs/again
      python -m yelp_hpc reproduce --from runs/demo --run runs/again --compare
    """
    from yelp_hpc.errors import RequestError, StageError, all_problems
    from yelp_hpc.proof import reproduce as again
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.modes import unwritable

    if not compare:
        if problem := unwritable(Path(run_dir), folder=True):
            raise RequestError(f"--run: {problem}")
        prepared = again.reproduce(source, run_dir)
        for warning in prepared.warnings:
            say(f"warning: {warning}")
        click.echo(as_called(prepared.command))
        return
    root = Path(source)
    first, _ = load_run(root if root.is_dir() else root.parent)
    second, _ = load_run(run_dir)
    found = again.compare(first, second)
    if not found.identical:
        problems = [*found.differences, *found.missing]
        raise StageError(all_problems(f"{second.root} differs from {first.root}:", problems))
    click.echo(plain("the same: " + ", ".join(found.same)))
