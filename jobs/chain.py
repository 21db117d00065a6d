"""Submit a stage, or all of them as a chain that runs alone; cancel a run.

prepare → (train, infer base) → infer tuned → collect → publish. Reads what is done from the run
directory and what is live from Slurm; writes RUN/submissions.jsonl, RUN/code and RUN/logs.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import with_inputs
from yelp_hpc.jobs.interrupted import record_interrupted, sweep_pickles
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.local import local_alive, run_chain
from yelp_hpc.jobs.preflight import require_sound_request
from yelp_hpc.jobs.progress import stage_done
from yelp_hpc.jobs.slurm import require_sbatch
from yelp_hpc.jobs.snapshot import exposed, read_settings
from yelp_hpc.jobs.submission import Submission, new_submission, record, records
from yelp_hpc.progress import plain
from yelp_hpc.progress import say as tell
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.files import open_log, write_bytes
from yelp_hpc.rundir.locks import locked
from yelp_hpc.rundir.manifest import Asked, check_asked, update_run
from yelp_hpc.rundir.paths import STAGES, RunPaths

WAIT_SECONDS = 3.0


def plan(stage: str, config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The jobs that are still to be done for `stage` or `all`, in the order of the chain."""
    from yelp_hpc.jobs import collect, infer, prepare, publish, train

    launchers = {
        "prepare": prepare.jobs,
        "train": train.jobs,
        "infer": infer.jobs,
        "collect": collect.jobs,
        "publish": publish.jobs,
    }
    if stage == "all":
        skip = {"publish"} if config.publish.where == "login" else set()
        stages = [name for name in STAGES if name not in skip]
        if "tuned" not in config.infer.models:
            stages.remove("train")
    else:
        stages = [stage]
    planned = [job for name in stages for job in launchers[name](config, paths, cluster)]
    if stage == "all" and {"train", "infer"} & {job.stage for job in planned}:
        names = {job.name for job in planned}
        if "collect" not in names:  # it was up to date, but what it reads is made again
            after = tuple(("afterany", f"infer-{model}") for model in config.infer.models)
            place = next((i for i, job in enumerate(planned) if job.stage == "publish"), None)
            planned.insert(len(planned) if place is None else place, Job("collect", after=after))
    return planned


def submit(
    stage: str,
    run_dir: str | Path,
    config: Config,
    cluster: ClusterConfig,
    executor: str = "slurm",
    dry_run: bool = False,
    wait: bool = False,
    asked: Asked | None = None,
    say: Callable[[str], None] = tell,
) -> list[Submission]:
    """Submit what is still to be done of `stage` (or `all`); [] when there is nothing.

    On Slurm this returns at once, unless `wait`. Locally there is no queue to hand the chain to:
    it runs here, one supervisor after the other, to its end. Either every job is submitted or none.

    Args:
        asked: what run.json records, once nothing speaks against the request; None: run.json is
            there already.

    Raises:
        RequestError: the run's name cannot be used, a stage is running already, an earlier stage,
            the model, the data, the image or a package is missing, the run directory was made with
            another configuration, Slurm refuses the request. Nothing was written then.
        StageError: the run directory cannot be written, the controller does not answer; locally
            or with `wait`: a stage failed.
        SavedForRequeue: locally: stopped by a signal after saving.
    """
    paths = RunPaths(checked_run(run_dir))
    _refuse_unwritable(paths)
    cluster = with_inputs(cluster, config, paths.root)
    with_slurm = executor == "slurm" and not dry_run  # what --dry-run shows needs no Slurm
    live = _live(paths, with_slurm)
    if asked:
        check_asked(paths.root, asked, _stages(live))
    planned = plan(stage, config, paths, cluster)
    if stage == "publish" and config.publish.repo_id is None:
        raise RequestError(_NO_REPOSITORY)
    _refuse_running(planned, live)
    _refuse_missing(planned, config, paths, live)
    require_sound_request(planned, config, cluster, executor)
    if not planned:
        if asked and not dry_run:
            asked.record(paths.root)
        say(f"{stage}: nothing to do, everything is there")
        return []
    if dry_run:
        dry = list(_dry(planned, paths, cluster, executor))
        for submission in dry:
            print(plain(f"# {submission.name}\n{submission.script}\n$ {submission.command}\n"))
        return dry
    if executor == "slurm":
        require_sbatch()
    for warning in exposed(paths):
        say(f"warning: {warning}")
    with locked(paths.lock("submit")), _undone(paths):  # one submission at a time
        if executor == "slurm":
            record_interrupted(paths)
            sweep_pickles(paths)
        live = _live(paths, with_slurm)  # another may have been faster
        _refuse_running(planned, live)
        if asked:
            asked.record(paths.root, _stages(live))
        if executor == "slurm":
            submissions = _submit_slurm(planned, paths, cluster, live, say)
    if executor == "local":
        frozen, code = _freeze(paths, cluster)
        return run_chain(planned, paths, cluster, frozen, code, say)
    if wait:
        follow(paths, submissions, say)
        if any(job.stage == "collect" for job in planned):
            say(last_words(paths.stage_log("collect")))
    return submissions


def _refuse_unwritable(paths: RunPaths) -> None:
    there = next(path for path in (paths.root, *paths.root.parents) if _there(path))
    if not there.is_dir():
        raise StageError(f"cannot write {paths.run_json}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StageError(f"cannot write {paths.run_json}: {there} may not be written by you")


def _there(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


_NO_REPOSITORY = (
    "publish.repo_id is not set, so there is nowhere to publish to: add "
    "`--set publish.repo_id=OWNER/NAME`, or write it into the config"
)


def _stages(live: Mapping[str, str]) -> dict[str, str]:
    """Stage → its live job."""
    return {name.partition("-")[0]: job for name, job in live.items()}


@contextmanager
def _undone(paths: RunPaths) -> Iterator[None]:
    """When the request is refused after all, the run directory is as it was before."""
    before = paths.run_json.read_bytes() if paths.run_json.exists() else None
    new = not any(path.name != "logs" for path in paths.root.iterdir())
    try:
        yield
    except RequestError:
        if new and not records(paths):  # nothing but what this submission wrote
            shutil.rmtree(paths.root, ignore_errors=True)
        elif before is not None:
            write_bytes(paths.run_json, before)
        raise


def last_words(log: Path) -> str:
    """What the last start of a stage said, without the line that the supervisor put before it."""
    try:
        with open_log(log) as file:
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"{log}: {error.strerror}"
    return text.rpartition("=== job ")[2].partition("\n")[2].rstrip()


def checked_run(run_dir: str | Path) -> Path:
    """The absolute run directory, if its name can be used in job names and Slurm's patterns.

    Raises:
        RequestError: it holds `%` (Slurm fills it in), a control character, or `:` or `,`
            (which separate container binds).
    """
    run = Path(run_dir).expanduser().absolute()
    bad = sorted({c for c in str(run) if c in "%:,\"'\\`$" or ord(c) < 32 or ord(c) == 127})
    if bad:
        shown = " ".join(repr(c) for c in bad)
        raise RequestError(f"--run {str(run)!r} holds {shown}; use letters, digits and . _ - /")
    return run


def _submit_slurm(
    planned: Sequence[Job],
    paths: RunPaths,
    cluster: ClusterConfig,
    live: dict[str, str],
    say: Callable[[str], None],
) -> list[Submission]:
    from yelp_hpc.jobs.executor import parameters, submit_slurm

    frozen, code = _freeze(paths, cluster)
    ids = {name: job for name, job in live.items() if not job.startswith("local-")}
    submissions: list[Submission] = []
    try:
        for job in planned:
            params = parameters(job, cluster, paths.root, code, ids, frozen)
            ids[job.name] = submit_slurm(job, params, paths, cluster, frozen)
            submission = new_submission(job, ids[job.name], paths, cluster)
            submissions.append(submission)
            record(paths, submission, "slurm", frozen, code)
            many = f", an array of {len(job.tasks)}" if len(job.tasks) > 1 else ""
            say(f"{job.name}: job {ids[job.name]}{many}")
    except (RequestError, StageError):
        with suppress(StageError):  # all or nothing: the chain would end where this one is missing
            slurm.cancel([submission.job for submission in submissions])
            slurm.cancel(record_interrupted(paths))
        raise
    return submissions


def _dry(
    planned: Sequence[Job], paths: RunPaths, cluster: ClusterConfig, executor: str
) -> Iterator[Submission]:
    from yelp_hpc.jobs.executor import parameters, sbatch_text

    ids = {job.name: f"JOB_ID_OF_{job.name}" for job in planned}
    for job in planned:
        script = ""
        if executor == "slurm":
            code, frozen = paths.code / "DIGEST", paths.logs / "cluster-DIGEST.json"
            params = parameters(job, cluster, paths.root, code, ids, frozen)
            script = sbatch_text(job, params, paths, cluster)
        submission = new_submission(job, "", paths, cluster)
        yield Submission(job.name, job.stage, "", job.tasks, submission.command, script)


def _freeze(paths: RunPaths, cluster: ClusterConfig) -> tuple[Path, Path]:
    """Freeze settings and code, and say in run.json which code and image the jobs run."""
    from yelp_hpc.jobs.executor import freeze_cluster
    from yelp_hpc.jobs.snapshot import freeze

    frozen, code = freeze_cluster(paths, cluster), freeze(paths)
    if paths.run_json.exists():
        settings = read_settings(frozen)
        container = settings["cluster"]["container"]
        image = container and {"path": container["image"], "sha256": settings["image_sha256"]}
        update_run(paths, snapshot=f"code/{code.name}", image=image)
    return frozen, code


def _live(paths: RunPaths, with_slurm: bool) -> dict[str, str]:
    """Job name → id of what was submitted and has not ended."""
    submitted = records(paths)
    ids = [record["job"] for record in submitted if record["executor"] == "slurm"]
    alive = {row.parent for row in slurm.queue(ids)} if ids and with_slurm else set()
    live = {}
    for line in submitted:
        if line["job"] in alive or local_alive(line):
            live[line["name"]] = line["job"]
    return live


def _refuse_running(planned: Sequence[Job], live: dict[str, str]) -> None:
    running = [f"{job.name} is job {live[job.name]}" for job in planned if job.name in live]
    if running:
        raise RequestError(
            f"already submitted and not finished: {'; '.join(running)}. See "
            "`python -m yelp_hpc status`, or `cancel` it first."
        )


def _refuse_missing(
    planned: Sequence[Job], config: Config, paths: RunPaths, live: dict[str, str]
) -> None:
    names = {job.name for job in planned}
    for job in planned:
        for _, need in job.after:
            stage, _, model = need.partition("-")
            if need in names or need in live:
                continue
            if not stage_done(paths, config, stage, model):
                raise RequestError(
                    f"{job.name} needs {need}, which is neither done nor submitted: "
                    f"`python -m yelp_hpc submit {stage}` or `submit all`"
                )


def follow(paths: RunPaths, submissions: Sequence[Submission], say: Callable[[str], None]) -> None:
    """Wait until every job has ended, saying each change of state.

    Raises:
        StageError: a job failed, was cancelled or never started.
    """
    names = {submission.job: submission.name for submission in submissions}
    shown: dict[str, str] = {}
    down = False
    while True:
        try:
            rows, down = slurm.queue(list(names)), False
        except StageError as error:
            if not down:
                say(f"{str(error).splitlines()[0]}; still waiting")
            down = True
            time.sleep(WAIT_SECONDS)
            continue
        for job, name in names.items():
            states = sorted(row.state.lower() for row in rows if row.parent == job)
            text = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "ended"
            if shown.get(job) != text:
                shown[job] = text
                say(f"{name} (job {job}): {text}")
        if not rows:
            break
        time.sleep(WAIT_SECONDS)
    problems = []
    for submission in submissions:
        last: dict[str, attempts.Attempt] = {}
        for attempt in attempts.read(paths, submission.name):
            if attempt.job.partition("_")[0] == submission.job:
                last[attempt.job] = attempt
        bad = [a for a in last.values() if a.verdict != "done"]
        problems += [f"{submission.name} ({a.job}): {a.verdict or 'lost'}: {a.reason}" for a in bad]
        if len(last) < len(submission.tasks):
            missing = len(submission.tasks) - len(last)
            problems.append(f"{submission.name}: {missing} of its jobs never started")
    if problems:
        raise StageError("\n".join(problems[:5]))


def cancel(run_dir: str | Path) -> list[str]:
    """Cancel every live job of a run and nothing else; returns their ids.

    Raises:
        StageError: the Slurm controller does not answer.
    """
    paths = RunPaths(Path(run_dir).absolute())
    record_interrupted(paths)
    submitted = records(paths)
    ids = [record["job"] for record in submitted if record["executor"] == "slurm"]
    alive = sorted({row.parent for row in slurm.queue(ids)}) if ids else []
    slurm.cancel(alive)
    local = [record["job"] for record in submitted if local_alive(record)]
    for job in local:
        with suppress(ProcessLookupError):
            os.kill(int(job.removeprefix("local-")), signal.SIGTERM)
    for job in alive + local:
        print(plain(f"cancelled {job}"))
    return alive + local
