"""Options that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from yelp_hpc.cli.completion import complete_settings
from yelp_hpc.cli.meant import Words
from yelp_hpc.own_files import expanded
from yelp_hpc.rundir.paths import RunPaths

if TYPE_CHECKING:
    from yelp_hpc.jobs.cluster import ClusterConfig

Command = TypeVar("Command", bound=Callable[..., Any])


class Place(click.Path):
    """A path that can be one: it has a name, and no file, link or missing right hinders it.

    Args:
        writes: the command writes there.
    """

    def __init__(self, *, writes: bool = False, **what: Any) -> None:
        super().__init__(**what)
        self.writes = writes

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """As click does, with the home folder for a `~`; fails with what hinders."""
        from yelp_hpc.rundir.modes import in_the_way, unwritable

        if not str(value).strip():
            self.fail("it is empty (a variable that is not set?); write a name", param, ctx)
        try:  # no shell does so in `--run=~/x`
            value = expanded(os.fsdecode(value))
        except ValueError as error:
            self.fail(f"{value}: {error}", param, ctx)
        found = super().convert(value, param, ctx)
        path = Path(os.fsdecode(found))
        problem = unwritable(path, not self.file_okay) if self.writes else in_the_way(path)
        record = RunPaths(path).run_json
        if problem and self.writes and os.path.isfile(record):  # noqa: PTH113 - never raises
            problem += "; `verify`, `compare`, `predict` and `export` only read a run"
        if problem:
            self.fail(problem, param, ctx)
        return found


class Number(click.FloatRange):
    """A number of a range; neither nan nor infinity is one."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As click does; fails with what is no number."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return found


def _run(*, writes: bool) -> Callable[[Command], Command]:
    return click.option(
        "--run",
        "run_dir",
        required=True,
        metavar="DIR",
        type=Place(file_okay=False, writes=writes),
        help="run directory",
    )


RUN = _run(writes=False)
WRITTEN_RUN = _run(writes=True)
CONFIG = click.option(
    "--config", "config_file", required=True, metavar="FILE", type=Place(), help="YAML config"
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
    type=Place(),
    help="resources and container: configs/clusters/*.yaml",
)
WAIT = click.option("--wait", is_flag=True, help="follow until the end")


def cluster_of(path: str | None, fetches: bool = False) -> ClusterConfig:
    """A cluster file's settings; from here on models and data are looked for in its cache.

    Jobs in its image look there. One that this machine does not see is left to them.

    Args:
        fetches: what is downloaded goes there, so that it is made.

    Raises:
        RequestError: the file cannot be used.
    """
    from yelp_hpc.jobs.cluster import load_cluster

    found = load_cluster(path)
    if found.container and (fetches or Path(found.container.cache).is_dir()):
        os.environ["YELP_HPC_CACHE"] = found.container.cache
    return found
