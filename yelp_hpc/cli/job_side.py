"""A command that needs what only the image has: it goes on in there, or both ways out are said.

The login node's part of the toolkit is small; what a stage imports (torch, pyarrow …) it lacks.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from yelp_hpc.errors import RequestError, StageError, in_shell
from yelp_hpc.image.file import why_no_image
from yelp_hpc.jobs.cluster import ClusterConfig, Container, load_cluster
from yelp_hpc.jobs.preflight import JOB_MODULES, install_command
from yelp_hpc.own_files import expanded
from yelp_hpc.progress import say
from yelp_hpc.runtime import in_image, program, use_programs


def go_on_in_image(error: ModuleNotFoundError, arguments: Sequence[str]) -> NoReturn:
    """Start the same command in the image that the run or the cluster file names, in our place.

    Raises:
        ModuleNotFoundError: it is no package of the job side.
        RequestError: there is no image, or nothing to start it with: both ways out.
    """
    name = (error.name or "").partition(".")[0]
    if name not in JOB_MODULES:
        raise error
    arguments = [*map(_at_home, arguments)]
    container = None if in_image() else named_container(arguments)
    if (
        container is None
        or why_no_image(Path(container.image))
        or not shutil.which(program("apptainer"))
    ):
        raise RequestError(_ways_out(name, container, arguments)) from None
    from yelp_hpc.jobs.container import inside, stage_environment
    from yelp_hpc.publishing.token import hub_token

    with suppress(OSError):  # else apptainer says what it cannot bind
        Path(container.cache).mkdir(parents=True, exist_ok=True)
    here = Path.cwd()
    binds = (*container.binds, *_folders(here, arguments))
    extra = (*container.extra_args, "--pwd", str(here))
    container = container.model_copy(update={"binds": binds, "extra_args": extra})
    run = Path(option(arguments, "--run") or here).absolute()
    argv = inside(container, run, ["python", "-m", "yelp_hpc", *arguments], os.environ)
    publishing = arguments[0] == "publish"
    token = hub_token(os.environ) if publishing else None
    stage = "publish" if publishing else ""
    cluster = ClusterConfig(container=container)
    say(f"{name} is not installed here: going on in {container.image}")
    try:
        os.execvpe(argv[0], argv, stage_environment(cluster, stage, os.environ, token))
    except OSError as fault:
        raise StageError(f"{argv[0]} cannot be started: {fault.strerror}") from None


def _at_home(argument: str) -> str:
    """An argument with the home folder for its `~`, which `--run=~/x` leaves and no bind knows."""
    name, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    with suppress(ValueError):
        return f"{name}{sign}{expanded(value)}"
    return argument


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`."""
    found = next((b for a, b in pairwise(arguments) if a == name), None)
    given = (a.removeprefix(f"{name}=") for a in arguments if a.startswith(f"{name}="))
    return found or next(given, None)


def named_container(arguments: Sequence[str]) -> Container | None:
    """The image's settings: the cluster file's, else those that the run was submitted with."""
    from yelp_hpc.jobs.submission import submitted_with
    from yelp_hpc.rundir.paths import RunPaths

    if cluster := option(arguments, "--cluster"):
        loaded = load_cluster(cluster)
        use_programs(loaded.programs)
        return loaded.container
    runs = (a for a in arguments[1:] if (Path(a) / "run.json").is_file())  # of `compare`
    run = option(arguments, "--run") or next(runs, None)
    if run is None:
        return None
    found = submitted_with(RunPaths(Path(run).absolute()))
    if found is None:
        return None
    use_programs(found.programs)
    return found.container


def _folders(here: Path, arguments: Sequence[str]) -> Iterator[str]:
    """The working directory, and each folder outside of it in which an argument lies."""
    yield str(here)
    for argument in arguments:
        path = Path(argument.partition("=")[2] if argument.startswith("--") else argument)
        if len(path.parts) > 1 and not path.absolute().resolve().is_relative_to(here):
            folder = path.absolute() if path.is_dir() else path.absolute().parent
            if folder.is_dir() and not set(str(folder)) & set(":,"):
                yield str(folder)


def _ways_out(name: str, container: Container | None, arguments: Sequence[str]) -> str:
    command = shlex.join(["python", "-m", "yelp_hpc", *arguments])
    if container is None:
        way = (
            f"{program('apptainer')} exec yelp_hpc.sif {command}   (an image: python -m yelp_hpc "
            "image build; with a --cluster file that names it, or a run that was submitted with "
            "one, this command goes in by itself)"
        )
    elif problem := why_no_image(Path(container.image)):
        build = f"python -m yelp_hpc image build {in_shell(container.image)}"
        way = f"{problem}: {build}, then the same command again"
    else:
        way = (
            f"put {program('apptainer')} on PATH (often: module load apptainer), then the same "
            "command again"
        )
    return (
        f"this needs the package {name}, which {sys.executable} does not have: it holds the login "
        f"node's part of yelp_hpc.\n  In the image:         {way}\n"
        f"  Or install the rest:  {install_command(sys.executable)}"
    )
