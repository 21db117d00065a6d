"""The command `predict`: rows that nobody has labelled, answered by the model of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from yelp_hpc.cli.meant import Words
from yelp_hpc.cli.options import RUN, Place, cluster_of
from yelp_hpc.errors import in_shell
from yelp_hpc.rundir.paths import MODELS

if TYPE_CHECKING:
    from yelp_hpc.jobs.cluster import ClusterConfig
    from yelp_hpc.rundir.paths import RunPaths
    from yelp_hpc.rundir.request import Request


@click.command()
@RUN
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE",
    type=Place(),
    help="csv, tsv, jsonl, json, parquet, arrow (text also in gz, zst, zip), or a folder of them",
)
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=Place(writes=True),
    help="csv, jsonl or parquet",
)
@click.option("--model", type=Words(MODELS), default="tuned", show_default=True)
@click.option("--executor", type=Words(["local", "slurm"]), default="local", show_default=True)
@click.option(
    "--shards", type=click.IntRange(1, 100_000), default=1, show_default=True, help="a job each"
)
@click.option(
    "--cluster",
    metavar="FILE",
    type=Place(),
    help="resources and container; slurm's default: the run's",
)
@click.option("--text-column", metavar="NAME", help="of the input; default: the run's")
@click.option("--label-column", metavar="NAME", help="gives metrics; default: the run's, if there")
@click.option("--header/--no-header", default=None, help="of a csv; without, columns are 0, 1, …")
@click.option("--prefix", default="", metavar="TEXT", help="before the names of added columns")
@click.option(
    "--answers-only",
    is_flag=True,
    help="no probabilities; saves time where labels are many and of several tokens",
)
@click.option("--dry-run", is_flag=True, help="print the sbatch scripts and the commands only")
@click.option("--wait", is_flag=True, help="slurm: follow until the end")
def predict(
    run_dir: str,
    source: str,
    out: str,
    model: str,
    executor: str,
    shards: int,
    cluster: str | None,
    text_column: str | None,
    label_column: str | None,
    header: bool | None,
    prefix: str,
    answers_only: bool,
    dry_run: bool,
    wait: bool,
) -> None:
    """Answer every row of a file with a run's model, prompt and labels.

    The file that is written has the input's columns, then answer, name, the probability p_LABEL of
    each label and, where the task is ordinal, expected. A column of labels gives metrics, too.
    What was interrupted goes on when the same command is given again. The work lies in the run
    directory; of a colleague's run, which may only be read, beside the output: in answers.predict/
    of answers.csv.

    \b
      python -m yelp_hpc predict --run runs/demo --input new.csv --out answers.csv
      python -m yelp_hpc predict --run runs/yelp --input new.parquet \\
          --out answers.parquet --executor slurm --shards 16
    """
    from yelp_hpc.config import LoadedConfig
    from yelp_hpc.jobs.chain import submit
    from yelp_hpc.progress import say
    from yelp_hpc.rundir.manifest import load_run
    from yelp_hpc.rundir.request import AskedPrediction
    from yelp_hpc.stages.request import make_request

    run, config = load_run(run_dir)
    request, note = make_request(
        run,
        config,
        model=model,
        source=source,
        out=out,
        prefix=prefix,
        text_column=text_column,
        label_column=label_column,
        header=header,
        answers_only=answers_only,
    )
    settings = _cluster(run, cluster, executor, request)
    folder = request.folder
    asked = request.config(config, shards)
    if note:
        say(f"predict: {note}")
    if folder.parent != run.predict:
        say(f"predict: {run.root} may only be read, so that the work lies in {folder}")
    submit(
        "predict",
        folder,
        asked,
        settings,
        executor=executor,
        dry_run=dry_run,
        wait=wait,
        asked=AskedPrediction(
            LoadedConfig(asked, asked.model_dump(mode="json"), {}), str(run.run_json), (), request
        ),
    )
    if dry_run:
        return
    if executor == "slurm" and not wait:
        say(f"follow it: python -m yelp_hpc status --run {in_shell(folder)} --watch")
    else:
        click.echo(out)


def _cluster(run: RunPaths, named: str | None, executor: str, request: Request) -> ClusterConfig:
    """The cluster file's settings, else those that the run's jobs had; the output's folder bound.

    Raises:
        RequestError: the file cannot be used, or the folder cannot be bound into the image.
    """
    from yelp_hpc.errors import RequestError
    from yelp_hpc.jobs.submission import submitted_with

    found = cluster_of(named)
    if named is None and executor == "slurm":
        found = submitted_with(run) or found
    if found.container is None:
        return found
    folder = str(Path(request.out).parent)
    if set(folder) & set(":,"):
        raise RequestError(
            f"{folder} cannot be bound into the image: name --out without `:` and `,`"
        )
    binds = (*found.container.binds, folder)
    container = found.container.model_copy(update={"binds": binds})
    return found.model_copy(update={"container": container})
