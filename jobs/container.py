"""The command that runs a stage: on the host's Python, or inside an Apptainer image.

Pure but for looking at which paths exist: argv and environment come out, the supervisor runs them.
The same argv is what `--dry-run` prints and what a person types to run a stage by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from yelp_hpc.cache import SEEN, repository, seen_folders, seen_hub
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.image.file import variables
from yelp_hpc.jobs.cluster import ClusterConfig, Container
from yelp_hpc.rundir.attempts import task_text
from yelp_hpc.rundir.manifest import absolute_paths
from yelp_hpc.rundir.paths import Task
from yelp_hpc.runtime import program, without_tokens

# handed into the image besides container.env: what the stage and CUDA need to know about the job
_HANDED_IN = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURMD_NODENAME",
    "SLURM_RESTART_COUNT",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
)
_PREFIXES = ("YELP_HPC_", "NCCL_", "PYTORCH_", "TORCH_", "NVIDIA_", "CUDA_")
# where libraries keep what they download or compile, inside container.cache. The host's own HF_HOME
# is not handed in: it holds the Hub's token.
_CACHES = {
    "YELP_HPC_CACHE": "",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "XDG_CACHE_HOME": "xdg",
}
# variables by which the host's user could reach past --cleanenv
_INTO_IMAGE = ("APPTAINERENV_", "SINGULARITYENV_")
_OVER_IMAGE = frozenset(
    f"{kind}_{option}"
    for kind in ("APPTAINER", "SINGULARITY")
    for option in ("BIND", "BINDPATH", "MOUNT", "OVERLAY", "CWD", "PWD", "ENV_FILE")
)
"""By which it would put the host's files in the place of the image's, or start elsewhere."""


def stage_argv(stage: str, run: Path, model: str = "", task: Task = ()) -> list[str]:
    """The arguments of `python -m yelp_hpc run`; `task`: the shards, () for all there are."""
    argv = [stage, "--run", str(run)]
    argv += ["--model", model] if model else []
    return argv + (["--shard", task_text(task)] if task else [])


def command(
    cluster: ClusterConfig, run: Path, arguments: list[str], env: Mapping[str, str]
) -> list[str]:
    """The whole argv that starts a stage.

    Args:
        arguments: of `python -m yelp_hpc run`, see `stage_argv`.
        env: the supervisor's environment; only allow-listed names are handed into an image.
    """
    if cluster.container is None:
        python = cluster.python or sys.executable
        return [*(cluster.command or (python, "-m", "yelp_hpc", "run")), *arguments]
    return inside(cluster.container, run, ["python", "-m", "yelp_hpc", "run", *arguments], env)


def inside(container: Container, run: Path, argv: list[str], env: Mapping[str, str]) -> list[str]:
    """The whole argv that runs `argv` in the image as a stage is run in it."""
    return [*_apptainer(container, run, env), container.image, *argv]


def _apptainer(container: Container, run: Path, env: Mapping[str, str]) -> list[str]:
    argv = [program("apptainer"), "exec", "--cleanenv", "--no-mount", "home,cwd"]
    argv += ["--nv"] if container.nv else []
    binds = [str(run), container.cache]
    set_here = {k: v for k, v in env.items() if v}  # an empty list would hide every GPU
    handed = {k: v for k, v in set_here.items() if k in _HANDED_IN or k.startswith(_PREFIXES)}
    scratch = env.get("TMPDIR", "")  # the job's own on the node; else the image has its /tmp
    if scratch.startswith("/") and not set(scratch) & set(":,") and Path(scratch).is_dir():
        binds.append(scratch)
        handed["TMPDIR"] = scratch
    for bind in [*binds, *container.binds]:
        argv += ["--bind", bind]
    handed |= {name: str(Path(container.cache, at)) for name, at in _CACHES.items()}
    handed |= {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1"}  # nothing of the user's shadows ours
    for name, value in sorted(handed.items()):
        argv += ["--env", _as_one(f"{name}={value}")]
    return [*argv, "--pwd", str(run), *container.extra_args]


def _as_one(pair: str) -> str:
    """`NAME=VALUE`, in quotes where apptainer would read several: NCCL_IB_HCA==mlx5_0,mlx5_1."""
    quoted = pair.replace('"', '""')
    return f'"{quoted}"' if pair.count("=") > 1 else pair


def over_image(env: Mapping[str, str]) -> list[str]:
    """Variables of the user's that would change what is in the image; a stage gets none of them."""
    return sorted(_OVER_IMAGE & env.keys())


def stage_environment(
    cluster: ClusterConfig, stage: str, env: Mapping[str, str], token: str | None
) -> dict[str, str]:
    """The environment of the stage's process; only `publish` gets the Hub's token.

    Into an image the token and the values of `container.env` go as APPTAINERENV_NAME: an
    `--env` would stand in the process list and in the log.
    """
    result = without_tokens(env)
    if cluster.container is None:
        result["PYTHONNOUSERSITE"] = result.get("PYTHONNOUSERSITE", "")
        name = "HF_TOKEN"
    else:
        name = f"{variables()}ENV_HF_TOKEN"
        own = {n: result[n] for n in cluster.container.env if n in result}
        dropped = {*over_image(result), *(k for k in result if k.startswith(_INTO_IMAGE))}
        result = {k: v for k, v in result.items() if k not in dropped}
        result |= {f"{variables()}ENV_{n}": value for n, value in own.items()}
        result.setdefault(
            f"{variables()}_CACHEDIR", str(Path(cluster.container.cache, "apptainer"))
        )
        if cluster.container.node_disk:  # where a node that cannot mount an image unpacks it
            result.setdefault(f"{variables()}_TMPDIR", cluster.container.node_disk)
    if stage == "publish" and token:
        result[name] = token
    return {key: value for key, value in result.items() if value}


def with_inputs(cluster: ClusterConfig, config: Config, run: Path) -> ClusterConfig:
    """The same settings with the model's folder and the data files bound, read-only.

    What lies in the run directory or in a folder that is bound anyway needs no bind of its own.

    Raises:
        RequestError: a path holds `:` or `,`, which separate binds.
    """
    if cluster.container is None:
        return cluster
    bound = [run, Path(cluster.container.cache)]
    bound += [Path(bind) for bind in cluster.container.binds if ":" not in bind]
    binds, problems = [], []
    for path in _inputs(config):
        if any(path.is_relative_to(folder) for folder in bound):
            continue
        if set(str(path)) & set(":,"):
            problems.append(f"{path}: give it a name without `:` and `,`")
        bound.append(path)
        binds.append(f"{path}:{path}:ro")
    if problems:
        raise RequestError(all_problems("these cannot be bound into the image:", problems))
    update = {"binds": (*cluster.container.binds, *binds)}
    if seen_repository(config):
        seen = ("--env", _as_one(f"{SEEN}={seen_hub(os.environ)}"))
        update["extra_args"] = (*cluster.container.extra_args, *seen)
    container = cluster.container.model_copy(update=update)
    return cluster.model_copy(update={"container": container})


def seen_repository(config: Config) -> Path | None:
    """The model in the cache of the Hub's own client; its token does not lie in there."""
    local = os.path.isdir(Path(config.model.path).expanduser())  # noqa: PTH112 - never raises
    if local or config.model.path.startswith("demo:"):
        return None
    found = seen_folders(config.model.path, config.model.revision)
    return repository(found[0]) if found else None


def _inputs(config: Config) -> Iterator[Path]:
    """Local files that stages read, and where symbolic links among them lead (a Hub cache's)."""
    config = absolute_paths(config)
    if seen := seen_repository(config):
        yield seen
    named: Sequence[str | None] = (
        config.model.path,
        config.data.train,
        config.data.test,
        config.train.adapter,
        config.train.start,
    )
    for path in (Path(name) for name in named if name and Path(name).is_absolute()):
        yield path
        with suppress(OSError):  # not a folder, or not one that can be read here
            links = [link for link in path.iterdir() if link.is_symlink()]
            yield from sorted({link.resolve().parent for link in links})
