"""submitit's executors, told everything: a job as data in, sbatch text or a running job out.

Writes RUN/logs/slurm or RUN/logs/local (submitit's pickles and the supervisors' own output) and
RUN/logs/cluster-DIGEST.json, the settings that every job of a submission reads.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.image.file import image_sha256, why_no_image
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.cluster import DEFAULT_TIME, ClusterConfig, minutes
from yelp_hpc.jobs.job import Job, job_name
from yelp_hpc.jobs.site.client import (
    PATIENCE,
    NoAnswer,
    client,
    no_client,
)
from yelp_hpc.jobs.site.refusals import refusal, user_defaults
from yelp_hpc.jobs.snapshot import check_line, freeze_settings, private_pickles, require_frozen
from yelp_hpc.jobs.supervisor import supervise
from yelp_hpc.rundir.attempts import task_text
from yelp_hpc.rundir.files import write_failure
from yelp_hpc.rundir.paths import RunPaths, Task
from yelp_hpc.runtime import CARDS, GIVEN_CARDS, TOKENS, program

if TYPE_CHECKING:
    from submitit import LocalExecutor

FOREVER = 365 * 24 * 60
_INHERITED = "${PYTHONPATH:+:$PYTHONPATH}"


def freeze_cluster(paths: RunPaths, cluster: ClusterConfig) -> Path:
    """Write the settings, and the image's hash, where the jobs of this submission read them.

    Raises:
        RequestError: the container's image is none.
    """
    image = None
    if cluster.container:
        sif = Path(cluster.container.image)
        if problem := why_no_image(sif):
            raise RequestError(f"container.image: {problem} (yelp_hpc image build)")
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
    "id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}; "
    "id=${{id:-$SLURM_JOB_ID}}; "
    '{0} -o show job $id | grep -q " JobState=RUNNING " && {0} requeue $id;; '
    "esac' EXIT"
)
# The user's own wishes for srun would change what the step gets; a submission without any
# environment (SBATCH_EXPORT=NONE of a site) would leave the supervisor no PATH.
_PLAIN_SRUN = "unset ${!SRUN_@}; export SLURM_EXPORT_ENV=ALL"


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

    What the cluster file leaves out comes from the user's SBATCH_ variables, where there is one.
    """
    want = cluster.resources(job.stage)
    own = {name: value for name, (value, _) in user_defaults(want, os.environ).items()}
    limit = want.time or own.get("time") or DEFAULT_TIME
    after = [f"{kind}:{dependencies[name]}" for kind, name in job.after if name in dependencies]
    save = want.save
    extra: dict[str, Any] = {
        "time": limit,
        # to the job step, which is the supervisor; it hands the signal on
        "signal": f"USR2@{save}",
        **{name: value or True for name, value in own.items()},
        **({"requeue": True} if cluster.requeue else {}),
        **{name: value or True for name, value in want.sbatch.items()},
    }
    if after:
        extra |= {"dependency": ",".join(after), "kill-on-invalid-dep": "yes"}
    if want.memory:
        extra["mem"] = want.memory
    if want.gpus:
        kind = f"gpu:{want.gpu_type}" if want.gpu_type else "gpu"
        others = want.sbatch.get("gres")  # of another kind, as a node's scratch
        extra["gres"] = f"{kind}:{want.gpus}" + (f",{others}" if others else "")
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
        "srun_args": [
            "--open-mode=append",
            "--kill-on-bad-exit=1",
            # since 22.05 a step does not inherit it from its job
            *([f"--cpus-per-task={want.cpus}"] if want.cpus else []),
            *_HOLD_SIGNALS,
        ],
        "setup": [
            *cluster.setup,
            *([_RUN_AGAIN.format(program("scontrol"))] if cluster.requeue else []),
            f"export PYTHONPATH={shlex.quote(str(code))}{_INHERITED}",
            "export PYTHONSAFEPATH=1",  # else the checkout one submits from would win over it
            "export PYTHONDONTWRITEBYTECODE=1",  # the snapshot stays what its digest says
            *([check_line(cluster.python or sys.executable, code, frozen)] if frozen else []),
            _PLAIN_SRUN,
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
    python = shlex.quote(cluster.python or sys.executable)
    call = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": len(job.tasks)} if len(job.tasks) > 1 else {}
    return str(_make_sbatch_string(command=call, folder=folder, **params, **array))


@dataclass(frozen=True)
class Ticket:
    """What Slurm gave for a submission."""

    job: str
    cluster: str
    name: str
    script: str
    """Both as Slurm shows them: a site's plugin or script may have changed them."""
    submitted: float | None
    """By the controller's clock."""


def submit_slurm(
    job: Job,
    params: Mapping[str, Any],
    paths: RunPaths,
    cluster: ClusterConfig,
    frozen: Path,
    runs: Sequence[tuple[Path, Path]] = (),
) -> Ticket:
    """Submit a job or an array with one sbatch.

    Args:
        runs: of an array over several runs, each task's run directory and frozen settings.

    Raises:
        RequestError: Slurm refuses the request; its own message and the key to change are shown.
        StageError: the controller cannot be reached.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    private_pickles()
    folder, tag = paths.logs / "slurm", uuid.uuid4().hex[:12]
    script = folder / f"{job.name}-{tag}.sh"
    pickles = [folder / f"{tag}-{task}.pkl" for task in range(len(job.tasks))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for dead in folder.glob(f"{'[0-9a-f]' * len(tag)}-*.pkl"):  # of a killed submission
            dead.unlink()
        where = runs or [(paths.root, frozen)] * len(job.tasks)
        for pickle, task, (run, settings) in zip(pickles, job.tasks, where, strict=True):
            fixed = (str(run), str(settings), job.model)
            delayed = DelayedSubmission(supervise, job.stage, *fixed, task_text(task))
            delayed.set_timeout(int(params["time"]), 0)
            delayed.dump(pickle)
        script.write_text(sbatch_text(job, params, paths, cluster))
    except OSError as error:
        raise StageError(write_failure(folder, error)) from None
    try:
        job_id, where_to = sbatch(script)
    except (StageError, RequestError) as error:
        for path in (*pickles, script):
            path.unlink(missing_ok=True)
        refused = isinstance(error, NoAnswer) or str(error).startswith("sbatch failed: ")
        if not refused:  # there is no sbatch, or something else in its place
            raise
        raise refusal(job, str(error)) from None
    try:
        for place, pickle in enumerate(pickles):
            name = f"{job_id}_{place}" if len(pickles) > 1 else job_id
            JobPaths(folder, name).move_temporary_file(pickle, "submitted_pickle")
    except OSError as error:  # its jobs would wait for their calls in vain
        with suppress(StageError, RequestError):
            slurm.cancel([job_id])
        raise StageError(write_failure(folder, error)) from None
    facts: Mapping[str, str] = {}
    with suppress(StageError, RequestError):
        facts = slurm.facts_of(job_id)
    when = facts.get("SubmitTime", "")
    return Ticket(
        job_id,
        where_to or slurm.cluster_name(),
        facts.get("JobName") or params["job_name"],
        facts.get("Command") or str(script),
        float(when) if when.isdigit() else None,
    )


def sbatch(script: Path) -> tuple[str, str]:
    """Submit until somebody answers; returns the job id and, where Slurm tells it, the cluster.

    A call that timed out may well have queued the job: it is looked for before it is made again.
    """
    end, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            said = client(["sbatch", "--parsable", str(script)], timeout=90)
            found = _job_id(said, script) or next(((i, "") for i in _queued(script)), None)
            if found is None:
                raise no_client("sbatch", said)
            twins = [i for i in _queued(script) if i != found[0]] if pause > 1 else []
            slurm.cancel(twins)  # an earlier call was heard after all
            return found
        except NoAnswer:
            if time.monotonic() + pause > end:
                # once more, before it is said that nothing was submitted
                if queued := _queued(script):
                    return queued[0], ""
                raise
        except StageError:
            if queued := _queued(script):  # a site's script failed after the job was queued
                return queued[0], ""
            raise
        time.sleep(pause)
        if queued := _queued(script):
            return queued[0], ""
        pause = min(2 * pause, 8.0)


def _queued(script: Path) -> list[str]:
    with suppress(StageError, RequestError):
        rows = slurm.of_script(script)
        # what Slurm refused it shows for a while, as a job that failed
        return sorted({row.parent for row in rows if row.state != "FAILED"}, key=int)
    return []


def _job_id(said: str, script: Path) -> tuple[str, str] | None:
    """Id and cluster of `123` or `123;cluster`, whatever a site's banner says around it."""
    lines = "\n".join(line.strip() for line in said.splitlines())
    sure = re.findall(r"^Submitted batch job (\d+)(?: on cluster (\S+))?$", lines, re.MULTILINE)
    found: list[tuple[str, str]] = sure or re.findall(r"^(\d+)(?:;(\S+))?$", lines, re.MULTILINE)
    if len({job for job, _ in found}) > 1:  # a banner may hold numbers, as of credits left
        queued = _queued(script)
        found = [each for each in found if each[0] in queued] or found
    return found[-1] if found else None


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
    given = {"PYTHONPATH": f"{code}:{inherited}" if inherited else str(code)}
    if (gpus := os.environ.get(CARDS)) is not None:
        given[GIVEN_CARDS] = gpus or "-1"  # an empty list hides them all
    try:
        executor: LocalExecutor = LocalExecutor(folder=paths.logs / "local")
        executor.update_parameters(timeout_min=FOREVER, stderr_to_stdout=True)
        with _environment(job.stage, **given):
            handle: Any = executor.submit(
                supervise, job.stage, str(paths.root), str(frozen), job.model, task_text(task)
            )
    except OSError as error:  # submitit's own files
        raise StageError(write_failure(paths.logs / "local", error)) from error
    finally:
        if main:
            signal.signal(signal.SIGINT, handler or signal.default_int_handler)
    return f"local-{handle.job_id}", handle._process


@contextmanager
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
