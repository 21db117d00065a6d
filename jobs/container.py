"""The command that runs a stage: on the host's Python, or inside an Apptainer image.

Pure but for ``check_image``: argv and environment come out, the supervisor runs them. The same argv
is what ``--dry-run`` prints and what a person types to run a stage by hand.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from jobs.cluster import ClusterConfig, Container
from jobs.slurm import without_tokens
from yelp_hpc.errors import StageError
from yelp_hpc.image_file import image_sha256

# handed into the image besides container.env: what the stage and CUDA need to know about the job
_HANDED_IN = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_END_TIME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
)
_PREFIXES = ("YELP_HPC_", "NCCL_")


def stage_argv(stage: str, run: Path, model: str = "", shard: str = "") -> list[str]:
    """The arguments of ``python -m yelp_hpc run``."""
    argv = [stage, "--run", str(run)]
    argv += ["--model", model] if model else []
    return argv + (["--shard", shard] if shard else [])


def command(
    cluster: ClusterConfig, run: Path, arguments: list[str], env: Mapping[str, str]
) -> list[str]:
    """The whole argv that starts a stage.

    Args:
        arguments: of ``python -m yelp_hpc run``, see ``stage_argv``.
        env: the supervisor's environment; only allow-listed names are handed into an image.
    """
    if cluster.container is None:
        python = cluster.python or sys.executable
        return [*(cluster.command or (python, "-m", "yelp_hpc", "run")), *arguments]
    return inside(cluster.container, run, ["python", "-m", "yelp_hpc", "run", *arguments], env)


def inside(container: Container, run: Path, argv: list[str], env: Mapping[str, str]) -> list[str]:
    """The whole argv that runs ``argv`` in the image as a stage is run in it."""
    return [*_apptainer(container, run, env), container.image, *argv]


def _apptainer(container: Container, run: Path, env: Mapping[str, str]) -> list[str]:
    argv = ["apptainer", "exec", "--cleanenv", "--no-home", "--writable-tmpfs"]
    argv += ["--nv"] if container.nv else []
    binds = [str(run), *container.binds]
    if "HF_HOME" in env and Path(env["HF_HOME"]).is_dir():
        binds.append(env["HF_HOME"])
    for bind in binds:
        argv += ["--bind", bind]
    wanted = {*_HANDED_IN, *container.env}
    handed = {k: v for k, v in env.items() if k in wanted or k.startswith(_PREFIXES)}
    handed["PYTHONNOUSERSITE"] = "1"
    for name, value in sorted(handed.items()):
        argv += ["--env", f"{name}={value}"]
    return [*argv, "--pwd", str(run), *container.extra_args]


def stage_environment(
    cluster: ClusterConfig, stage: str, env: Mapping[str, str], token: str | None
) -> dict[str, str]:
    """The environment of the stage's process; only ``publish`` gets the Hub's token.

    Into an image it goes as APPTAINERENV_HF_TOKEN: an ``--env`` would stand in the process list.
    """
    result = without_tokens(env)
    if cluster.container is None:
        result["PYTHONNOUSERSITE"] = result.get("PYTHONNOUSERSITE", "")
        name = "HF_TOKEN"
    else:
        name = "APPTAINERENV_HF_TOKEN"
        result = {k: v for k, v in result.items() if not k.startswith("APPTAINERENV_")}
    if stage == "publish" and token:
        result[name] = token
    return {key: value for key, value in result.items() if value}


def check_image(container: Container, expected: str | None) -> None:
    """Refuse to start in an image that is missing or not the one that was submitted.

    Raises:
        StageError: apptainer or the image is missing, a bind's source is, or the hash differs.
    """
    if shutil.which("apptainer") is None:
        raise StageError("apptainer is not on this node's PATH: add a `setup:` line (module load)")
    image = Path(container.image)
    if not image.is_file():
        raise StageError(f"the image {image} is missing: python -m yelp_hpc image build")
    for bind in container.binds:
        if not Path(bind.split(":")[0]).exists():
            raise StageError(f"container.binds names {bind}, which does not exist on this node")
    if expected:
        found = image_sha256(image)
        if found != expected:
            raise StageError(
                f"{image} is not the image that this run was submitted with: its SHA-256 is "
                f"{found}, submitted was {expected}. Submit again to use the new one."
            )
