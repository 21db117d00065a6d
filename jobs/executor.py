"""submitit's executors, told everything: a job as data in, sbatch text or a running job out.

Writes RUN/logs/slurm or RUN/logs/local (submitit's pickles and the supervisors' own output) and
RUN/logs/cluster-DIGEST.json, the settings that every job of a submission reads.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.image.file import image_sha256
from yelp_hpc.jobs.cluster import ClusterConfig, minutes
from yelp_hpc.jobs.job import Job, job_name
from yelp_hpc.jobs.slurm import TOKENS, clean_environment, require_sbatch
from yelp_hpc.jobs.snapshot import check_line, freeze_settings, private_pickles, require_frozen
from yelp_hpc.jobs.supervisor import supervise
from yelp_hpc.rundir.attempts import task_text
from yelp_hpc.rundir.files import write_failure
from yelp_hpc.rundir.paths import RunPaths, Task

if TYPE_CHECKING:
    from submitit import LocalExecutor, SlurmExecutor

FOREVER = 365 * 24 * 60
_INHERITED = "${PYTHONPATH:+:$PYTHONPATH}"
# what sbatch says → the key to change
_HINTS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "time limit": "time",
    "feature": "constraint",
    "constraint": "constraint",
    "generic resource": "gpus and gpu_type",
    "gres": "gpus and gpu_type",
    "node configuration": "nodes, gpus, cpus, memory or constraint",
    "memory": "memory",
    "cpu count": "cpus",
    "node count": "nodes",
    "job array": "max_array_size",
    "node name": "exclude",
}


def freeze_cluster(paths: RunPaths, cluster: ClusterConfig) -> Path:
    """Write the settings, and the image's hash, where the jobs of this submission read them.

    Raises:
        RequestError: the container's image does not exist.
    """
    image = None
    if cluster.container:
        sif = Path(cluster.container.image)
        if not sif.is_file():
            raise RequestError(f"container.image: {sif} does not exist (yelp_hpc image build)")
        image = image_sha256(sif)
    content = {"cluster": cluster.model_dump(mode="json"), "image_sha256": image}
    return freeze_settings(paths, content)


# A signal that comes before the supervisor has its handlers would end the job for good: it is held
# back until then, where env can do that (coreutils 8.31 of 2019).
_HOLD = "env --block-signal=TERM --block-signal=USR1 --block-signal=USR2"
_HOLD_SIGNALS = (
    *("bash", "-c", f'if {_HOLD} true 2>/dev/null; then exec {_HOLD} "$@"; fi; exec "$@"'),
    "supervisor",
)
# One that comes earlier still, while Slurm starts the step, ends srun with its number: nothing had
# begun, so the job is run again unless it is being cancelled (then its state is not RUNNING).
_RUN_AGAIN = (
    "trap 'case $? in 10|12|15|138|140|143) "
    "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; "
    "id=${id:-$SLURM_JOB_ID}; "
    '[ "$(squeue --noheader --format=%T --jobs=$id)" = RUNNING ] && scontrol requeue $id;; '
    "esac' EXIT"
)


def parameters(
    job: Job,
    cluster: ClusterConfig,
    run: Path,
    code: Path,
    dependencies: Mapping[str, str],
    frozen: Path | None = None,
) -> dict[str, Any]:
    """submitit's parameters for a job on Slurm.

    Args:
        code: the snapshot that goes first on PYTHONPATH.
        dependencies: job name → job id of what was submitted.
        frozen: the settings that the supervisor reads; given, the script compares them and the
            code with what they are now.
    """
    want = cluster.resources(job.stage)
    limit = want.time or "60"
    after = [f"{kind}:{dependencies[name]}" for kind, name in job.after if name in dependencies]
    save = want.save_seconds or 120
    extra: dict[str, Any] = {
        "time": limit,
        # to the job step, which is the supervisor; it hands the signal on
        "signal": f"USR2@{save}",
        "requeue": True,
        **{name: value or True for name, value in want.sbatch.items()},
    }
    if after:
        extra |= {"dependency": ",".join(after), "kill-on-invalid-dep": "yes"}
    if want.memory:
        extra["mem"] = want.memory
    if want.gpus:
        kind = f"gpu:{want.gpu_type}" if want.gpu_type else "gpu"
        extra["gres"] = f"{kind}:{want.gpus}"
    chosen = {
        "job_name": job_name(job, run),
        "time": minutes(limit),
        "nodes": want.nodes or 1,
        "ntasks_per_node": 1,
        "cpus_per_task": want.cpus,
        "partition": want.partition,
        "account": want.account,
        "qos": want.qos,
        "constraint": want.constraint,
        "exclude": want.exclude,
        "mail_user": want.mail_user,
        "mail_type": want.mail_type or ("FAIL" if want.mail_user else None),
        "array_parallelism": cluster.array_parallelism,
        "stderr_to_stdout": True,
        "srun_args": ["--open-mode=append", "--kill-on-bad-exit=1", *_HOLD_SIGNALS],
        "setup": [
            *cluster.setup,
            f"export PYTHONPATH={shlex.quote(str(code))}{_INHERITED}",
            "export PYTHONSAFEPATH=1",  # else the checkout one submits from would win over it
            "export PYTHONDONTWRITEBYTECODE=1",  # the snapshot stays what its digest says
            *([check_line(cluster.python or _this_python(), code, frozen)] if frozen else []),
            _RUN_AGAIN,
        ],
        "additional_parameters": extra,
    }
    return {name: value for name, value in chosen.items() if value is not None} | {"wckey": None}


def sbatch_text(
    job: Job, params: Mapping[str, Any], paths: RunPaths, cluster: ClusterConfig
) -> str:
    """The sbatch script that `submit` hands in, without submitting it."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = paths.logs / "slurm"
    python = shlex.quote(cluster.python or _this_python())
    call = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": len(job.tasks)} if len(job.tasks) > 1 else {}
    return str(_make_sbatch_string(command=call, folder=folder, **params, **array))


def submit_slurm(
    job: Job, params: Mapping[str, Any], paths: RunPaths, cluster: ClusterConfig, frozen: Path
) -> str:
    """Submit a job or an array with one sbatch; returns the job id.

    Raises:
        RequestError: Slurm refuses the request; its own message and the key to change are shown.
        StageError: the controller cannot be reached.
    """
    require_sbatch()
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    private_pickles()

    executor: SlurmExecutor = SlurmExecutor(
        folder=paths.logs / "slurm", python=shlex.quote(cluster.python or _this_python())
    )
    fixed = [str(paths.root), str(frozen), job.model]
    quiet = io.StringIO()
    try:
        with clean_environment(), contextlib.redirect_stderr(quiet):
            executor.update_parameters(**params)
            n, tasks = len(job.tasks), [task_text(task) for task in job.tasks]
            columns = [[job.stage] * n, *([value] * n for value in fixed), tasks]
            submitted = executor.map_array(supervise, *columns)
    except FailedJobError as error:
        raise refusal(job, str(error)) from None
    except OSError as error:  # submitit's own files
        raise StageError(write_failure(paths.logs / "slurm", error)) from error
    return str(submitted[0].job_id).partition("_")[0]


def refusal(job: Job, message: str) -> RequestError | StageError:
    """The error for what sbatch said."""
    text = message.strip().removeprefix("sbatch: error: ")
    if "contact slurm controller" in text.lower() or "communication" in text.lower():
        return StageError(
            f"the Slurm controller does not answer, so {job.name} was not submitted:\n  {text}\n"
            "Nothing was lost: run the same command again when it is back."
        )
    key = next((key for words, key in _HINTS.items() if words in text.lower()), None)
    where = f"{job.stage}.{key} or defaults.{key}" if key else f"{job.stage} or defaults"
    return RequestError(
        f"Slurm refuses {job.name}:\n  {text}\nChange {where} in the cluster config."
    )


def start_local(job: Job, task: Task, paths: RunPaths, code: Path, frozen: Path) -> tuple[str, Any]:
    """Start one supervisor on this machine through submitit; returns its id and its process."""
    from submitit import LocalExecutor

    require_frozen(code, frozen)  # a chain runs for hours
    private_pickles()
    main = threading.current_thread() is threading.main_thread()
    # submitit's controller kills its tasks a second after Ctrl-C; made deaf to it, the supervisor,
    # which sets its own handler, is the one that hears it and has the stage saved
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    inherited = os.environ.get("PYTHONPATH")
    path = f"{code}:{inherited}" if inherited else str(code)
    try:
        executor: LocalExecutor = LocalExecutor(folder=paths.logs / "local")
        executor.update_parameters(timeout_min=FOREVER, stderr_to_stdout=True)
        with _environment(job.stage, PYTHONPATH=path):
            handle: Any = executor.submit(
                supervise, job.stage, str(paths.root), str(frozen), job.model, task_text(task)
            )
    except OSError as error:  # submitit's own files
        raise StageError(write_failure(paths.logs / "local", error)) from error
    finally:
        if main:
            signal.signal(signal.SIGINT, handler or signal.default_int_handler)
    return f"local-{handle.job_id}", handle._process


@contextlib.contextmanager
def _environment(stage: str, **changes: str) -> Iterator[None]:
    """The environment of a local supervisor: the Hub's token goes to that of publish alone."""
    changes |= {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    hidden = set() if stage == "publish" else {*TOKENS}
    before = dict(os.environ)
    try:
        for name in hidden:
            os.environ.pop(name, None)
        os.environ.update(changes)
        yield
    finally:
        for name in {*hidden, *changes}:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _this_python() -> str:
    return sys.executable
