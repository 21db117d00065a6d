"""What the login node can see of a submission, looked at before anything is written.

Looks at the model's folder, the data files, the image, the Python that jobs would run on and the
Hub token; writes nothing. `doctor` says the same, and more.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, YelpHpcError, all_problems, in_shell
from yelp_hpc.image.file import no_apptainer, why_no_image
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import over_image
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.slurm import several_clusters
from yelp_hpc.models.adapter_source import find_adapter
from yelp_hpc.own_files import outdated, pip_install
from yelp_hpc.publishing.token import find_token
from yelp_hpc.runtime import program
from yelp_hpc.training.trackers import missing as missing_trackers

MODULES = {
    "prepare": ("pyarrow", "transformers", "torch"),
    "train": ("pyarrow", "transformers", "torch", "peft"),
    "infer": ("pyarrow", "transformers", "torch"),
    "collect": ("numpy", "pyarrow"),
    "publish": ("pyarrow", "matplotlib"),
}
"""What each stage imports that the host's part of the toolkit does not bring."""

JOB_MODULES = {
    *(name for names in MODULES.values() for name in names),
    *("accelerate", "datasets", "gguf", "safetensors", "sentencepiece", "sklearn", "tokenizers"),
}
"""Everything that the extras `job` and `demo` bring, by the name that is imported."""


def require_sound_request(
    planned: Sequence[Job], config: Config, cluster: ClusterConfig, executor: str
) -> list[str]:
    """Look at all that the planned jobs need; returns what one should know beforehand.

    Raises:
        RequestError: with all that would keep them from doing their work.
    """
    stages = list(dict.fromkeys(job.stage for job in planned))
    problems = [
        *_inputs(stages, config),
        *_image(cluster),
        *_programs(cluster, executor),
        *_one_cluster(executor if planned else ""),
        *_packages(stages, config, cluster, executor),
        *_adapter(stages, config),
        *_token(stages, config),
    ]
    if problems:
        raise RequestError(all_problems("nothing was submitted or written:", problems))
    together = executor == "slurm" and {"train", "infer-base"} <= {job.name for job in planned}
    notes = [precision_note(config, cluster) if together else "", _not_used(cluster)]
    return list(filter(None, notes))


def _not_used(cluster: ClusterConfig) -> str:
    names = over_image(os.environ) if cluster.container else []
    if not names:
        return ""
    said = ", ".join(names)
    return (
        f"{said} of your shell: not used; jobs see what `container.binds` names of the cluster file"
    )


def _one_cluster(executor: str) -> Iterator[str]:
    if executor == "slurm" and (several := several_clusters()):
        yield (
            f"SLURM_CLUSTERS names several clusters ({several}), and a chain runs on one of them: "
            "export SLURM_CLUSTERS=NAME"
        )


def _inputs(stages: Sequence[str], config: Config) -> Iterator[str]:
    """The model and the data, in the doctor's words."""
    from yelp_hpc.jobs.doctor.request import Request, inputs
    from yelp_hpc.jobs.doctor.run import check_inputs

    found = inputs(config)
    if "prepare" not in stages:
        found = found.model_copy(update={"data": ()})
        if not {"train", "infer"} & set(stages):
            return
    for finding in check_inputs(found, Request(ClusterConfig(), config)):
        if finding.level == "failure":
            yield f"{finding.text} → {finding.remedy}"


def _adapter(stages: Sequence[str], config: Config) -> Iterator[str]:
    """The adapter that is to be evaluated or trained on, where it is on this machine."""
    named = {"train.adapter": config.train.adapter, "train.from": config.train.start}
    for key, source in named.items():
        if source is not None and "train" in stages:
            try:
                find_adapter(source, download=False)
            except YelpHpcError as error:
                yield f"{key}: {error}"


def _image(cluster: ClusterConfig) -> Iterator[str]:
    if cluster.container and (problem := why_no_image(Path(cluster.container.image))):
        image = cluster.container.image
        yield (
            f"container.image: {problem} → python -m yelp_hpc image build {in_shell(image)} "
            "(--cuda for GPUs)"
        )


def _programs(cluster: ClusterConfig, executor: str) -> Iterator[str]:
    """What stages would be started with here, and is not here; nodes may have it."""
    if executor != "local":
        return
    if cluster.container and shutil.which(program("apptainer")) is None:
        yield no_apptainer()
    if cluster.command and shutil.which(cluster.command[0]) is None:
        yield f"command: {cluster.command[0]} is no program here → name one, or leave command out"


def _packages(
    stages: Sequence[str], config: Config, cluster: ClusterConfig, executor: str
) -> Iterator[str]:
    """Packages that jobs on the host's Python would miss."""
    if "train" in stages and cluster.python in (None, sys.executable):  # they run on the host
        yield from missing_trackers(config.train.trackers)
    on_host = on_host_python(cluster, executor)
    mine = on_host and cluster.python in (None, sys.executable)
    if old := outdated(("job", "demo") if mine else ()):
        yield old
    if not on_host:
        return
    wanted = dict.fromkeys(name for stage in stages for name in MODULES[stage])
    if "train" in stages and config.train.tensorboard:
        wanted["tensorboard"] = None
    python = cluster.python or sys.executable
    missing = missing_modules(python, tuple(wanted))
    if missing is None and executor == "local":
        yield f"python: {python} is no Python that starts here → name one, or leave python out"
    elif missing == ("tensorboard",):
        yield (
            "train.tensorboard is on, but the package tensorboard is not installed → "
            f"{pip_install('tensorboard', python)}, or --set train.tensorboard=false"
        )
    elif missing:
        yield without_packages(python, missing)


def precision_note(config: Config, cluster: ClusterConfig) -> str:
    """That the base model may be asked in another precision than it will be trained in, or ""."""
    alone = {"base", "tuned"} <= {*config.infer.models} and config.train.adapter is None
    auto = config.train.precision == config.infer.precision == "auto"
    train, infer = (cluster.resources(stage).has_gpus for stage in ("train", "infer"))
    if not (alone and auto) or train == infer:
        return ""
    there, key = ("without GPUs", "fp32") if train else ("with GPUs", "bf16")
    return (
        f"infer.precision: auto: the base model may be asked before the training begins, {there}, "
        "in another precision than the training's; collect then refuses these predictions, and "
        f"the same command makes them again. To avoid it: --set infer.precision={key}"
    )


def on_host_python(cluster: ClusterConfig, executor: str = "slurm") -> bool:
    """Whether stages run on a Python that can be looked at here.

    An image has its own; what `setup` loads is seen on the node alone.
    """
    loads = executor == "slurm" and cluster.setup
    return not (cluster.container or cluster.command or loads)


def without_packages(python: str, missing: Sequence[str]) -> str:
    """That jobs would run on a Python without the job side, and both ways out."""
    return (
        f"jobs would run on {python}, which has no {', '.join(missing)} → name an image: "
        "container.image in the --cluster file (python -m yelp_hpc image build yelp_hpc.sif), or "
        f"install the job side: {install_command(python)}"
    )


def install_command(python: str) -> str:
    """What installs the job side for a Python."""
    return pip_install("'yelp-hpc[job,demo]'", python)


@functools.cache
def missing_modules(python: str, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Those of `names` that `python` cannot find; None when it does not start. Imports none."""
    if python == sys.executable:
        return tuple(name for name in names if importlib.util.find_spec(name) is None)
    code = (
        "import importlib.util, json, sys; "
        "print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n) is None]))"
    )
    try:
        argv = [python, "-c", code, *names]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
        return tuple(json.loads(done.stdout)) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def _token(stages: Sequence[str], config: Config) -> Iterator[str]:
    if "publish" not in stages or config.publish.token_file is None:
        return
    try:
        find_token(config.publish.token_file)
    except RequestError as error:
        yield str(error)
