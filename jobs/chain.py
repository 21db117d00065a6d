"""Submit a stage, or all of them as a chain that runs alone; cancel a run.

prepare → (train, infer base) → infer tuned → collect → publish. Reads what is done from the run
directory and what is live from Slurm; writes RUN/submissions.jsonl, RUN/code and RUN/logs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import with_inputs
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.local import run_chain
from yelp_hpc.jobs.logs import last_words
from yelp_hpc.jobs.preflight import require_sound_request
from yelp_hpc.jobs.progress import stage_done
from yelp_hpc.jobs.site.client import PATIENCE, require_clients
from yelp_hpc.jobs.site.refusals import of_the_shell
from yelp_hpc.jobs.snapshot import exposed, read_settings
from yelp_hpc.jobs.submission import (
    Live,
    Submission,
    beyond_reach,
    cancelled,
    end,
    living,
    new_submission,
    record,
    records,
    sweep_pickles,
    take_up_programs,
    taken_back,
)
from yelp_hpc.jobs.watch.follow import follow
from yelp_hpc.progress import plain
from yelp_hpc.progress import say as tell
from yelp_hpc.rundir.files import read_object, write_json
from yelp_hpc.rundir.locks import Busy, locked
from yelp_hpc.rundir.manifest import Asked, check_asked, update_run
from yelp_hpc.rundir.modes import unwritable
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, STAGES, RunPaths
from yelp_hpc.runtime import use_programs


def plan(stage: str, config: Config, paths: RunPaths, cluster: ClusterConfig) -> list[Job]:
    """The jobs still to be done for `stage`, `all` or `predict`, in the order of the chain."""
    from yelp_hpc.jobs import collect, infer, prepare, publish, train

    launchers = {
        "prepare": prepare.jobs,
        "train": train.jobs,
        "infer": infer.jobs,
        "collect": collect.jobs,
        "publish": publish.jobs,
    }
    if stage == "all":
        stages = [s for s in STAGES if s != "publish" or config.publish.where == "slurm"]
        if "tuned" not in config.infer.models:
            stages.remove("train")
    elif stage == "predict":
        stages = ["prepare", "infer", "collect"]
    else:
        stages = [stage]
    planned = [job for name in stages for job in launchers[name](config, paths, cluster)]
    if stage == "predict":  # its adapter is a copy of the run's, its rows are not prepared yet
        first = (("afterok", "prepare"),)
        planned = [replace(job, after=first) if job.stage == "infer" else job for job in planned]
    stages = [job.stage for job in planned]
    if stage in ("all", "predict") and {"train", "infer"} & {*stages} and "collect" not in stages:
        # it was up to date, but what it reads is made again
        after = tuple(("afterany", f"infer-{model}") for model in config.infer.models)
        place = stages.index("publish") if "publish" in stages else len(planned)
        planned.insert(place, Job("collect", after=after))
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
        RequestError: the run's name cannot be used, the directory cannot be written, a stage is
            running already, an earlier stage, the model, the data, the image or a package is
            missing, the run directory was made with another configuration, Slurm refuses the
            request: nothing was written then. Or as below: a stage refused its input.
        StageError: the controller does not answer; locally or with `wait`: a stage failed.
        SavedForRequeue: locally or with `wait`: stopped by a signal after saving.
    """
    paths = RunPaths(checked_run(run_dir))
    use_programs(cluster.programs)
    refuse_unwritable(paths)
    cluster = with_inputs(cluster, config, paths.root)
    live = [] if dry_run else living(paths, PATIENCE)  # what --dry-run shows needs no Slurm
    if asked:
        check_asked(paths.root, asked, stages_of(live))
    planned = plan(stage, config, paths, cluster)
    if not planned and asked and asked.is_another(paths):
        planned = [Job("collect")]
    if executor == "local":  # one after the other anyhow: in one process, which loads a model once
        planned = [replace(job, tasks=(tuple(k for t in job.tasks for k in t),)) for job in planned]
    if stage == "publish" and config.publish.repo_id is None:
        raise RequestError(
            "publish.repo_id is not set, so there is nowhere to publish to: add "
            "`--set publish.repo_id=OWNER/NAME`, or write it into the config"
        )
    _refuse_running(planned, live)
    _refuse_missing(planned, config, paths, live)
    for note in require_sound_request(planned, config, cluster, executor):
        say(note)
    if not planned:
        if asked and not dry_run:
            asked.record(paths.root)
        say(f"{stage}: nothing to do, everything is there")
        return []
    if dry_run:
        dry = list(_dry(planned, paths, cluster, executor))
        for submission in dry:
            shell = of_the_shell(cluster, submission.stage, os.environ)
            notes = "".join(f"# {line}\n" for line in shell if submission.script)
            text = f"# {submission.name}\n{notes}{submission.script}\n$ {submission.command}\n"
            print(plain(text))
        return dry
    if executor == "slurm":
        require_clients(cluster.programs)
    for warning in exposed(paths):
        say(f"warning: {warning}")
    with ExitStack() as at_work:
        with locked(paths.lock("submit")), _undone(paths):  # one submission at a time
            sweep_pickles(paths)
            live = living(paths, PATIENCE)  # another may have been faster
            _refuse_running(planned, live)
            for job in planned:  # a local chain holds each of its jobs to its end
                try:
                    at_work.enter_context(locked(paths.lock(job.name), wait=0))
                except Busy as error:
                    raise RequestError(f"a local chain runs here already: {error}") from None
            if asked:
                asked.record(paths.root, stages_of(live))
            if executor == "slurm":
                submissions = _submit_slurm(planned, paths, cluster, live, say)
        if executor == "local":
            return run_chain(planned, paths, cluster, *freeze_all(paths, cluster), say)
    if wait:
        follow(paths, submissions, say)
        if any(job.stage == "collect" for job in planned):
            say(last_words(paths.stage_log("collect")))
    return submissions


def refuse_unwritable(paths: RunPaths) -> None:
    """Raises RequestError when the run directory cannot be made or written, or is a model's."""
    if problem := unwritable(paths.root, folder=True):
        raise RequestError(f"--run: {problem}")
    for file in ("config.json", ADAPTER_CONFIG):
        if (paths.root / file).is_file() and not paths.run_json.exists():
            raise RequestError(
                f"{paths.root} holds a model ({file}); name a folder of the run's own"
            )


def stages_of(live: Sequence[Live]) -> dict[str, str]:
    """Stage → its live job."""
    return {item.name.partition("-")[0]: item.job for item in live}


@contextmanager
def _undone(paths: RunPaths) -> Iterator[None]:
    """When the request is refused after all, the run directory is as it was before."""
    before = read_object(paths.run_json) if paths.run_json.exists() else None
    lock = paths.lock("submit").name  # made a moment ago
    new = not any(p != paths.logs and lock not in p.name for p in paths.root.rglob("*"))
    try:
        yield
    except RequestError:
        if before is None and not records(paths):  # nothing but what this submission wrote
            paths.run_json.unlink(missing_ok=True)
            if new:
                shutil.rmtree(paths.root, ignore_errors=True)
        elif before is not None:
            with locked(paths.lock("run.json")):  # what a stage wrote meanwhile stays
                now = read_object(paths.run_json)
                own = ["config", "seed", "snapshot", "image"]
                own += ["model", "data"] if now.get("data") is None else []
                of = {key: before if key in own else now for key in (*before, *now)}
                write_json(paths.run_json, {k: whole[k] for k, whole in of.items() if k in whole})
        raise


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
    live: Sequence[Live],
    say: Callable[[str], None],
) -> list[Submission]:
    frozen, code = freeze_all(paths, cluster)
    ids = ids_here(live)
    stages = dict.fromkeys(job.stage for job in planned)
    for line in dict.fromkeys(x for s in stages for x in of_the_shell(cluster, s, os.environ)):
        say(line)
    if not cluster.requeue:
        say(
            "requeue: false: a stage that meets its time limit saves and ends, and so does one "
            "whose node is taken away; the chain then waits for the same command again"
        )
    submissions: list[Submission] = []
    with all_or_nothing(submissions, paths):
        for job in planned:
            submissions.append(submit_job(job, paths, cluster, ids, frozen, code))
            many = f", an array of {len(job.tasks)}" if len(job.tasks) > 1 else ""
            say(f"{job.name}: job {ids[job.name]}{many}")
    return submissions


def ids_here(live: Sequence[Live]) -> dict[str, str]:
    """Job name → id of what lives on this cluster."""
    return {item.name: item.job for item in live if not item.local and not item.cluster}


def submit_job(
    job: Job,
    paths: RunPaths,
    cluster: ClusterConfig,
    ids: dict[str, str],
    frozen: Path,
    code: Path,
    runs: Sequence[tuple[RunPaths, Path]] = (),
) -> Submission:
    """Submit one job or array and record it; its id joins `ids`, job name → id.

    Args:
        runs: of an array over several runs, each task's run and frozen settings: each run gets a
            record of its own task.
    """
    from yelp_hpc.jobs.executor import parameters, submit_slurm

    params = parameters(job, cluster, paths.root, code, ids, frozen)
    where = [(run.root, settings) for run, settings in runs]
    ticket = submit_slurm(job, params, paths, cluster, frozen, where)
    ids[job.name] = ticket.job
    identity = {
        "slurm_cluster": ticket.cluster,
        "job_name": ticket.name,
        "script": ticket.script,
        "submitted": ticket.submitted,
    }
    submission = new_submission(job, ticket.job, runs[0][0] if runs else paths, cluster)
    record(paths, submission, "slurm", frozen, code, **identity)
    for place, (run, settings) in enumerate(runs):
        task = f"{ticket.job}_{place}" if len(runs) > 1 else ticket.job
        own = new_submission(Job(job.stage, job.model), task, run, cluster)
        record(run, own, "slurm", settings, code, **identity)
    return submission


@contextmanager
def all_or_nothing(submissions: Sequence[Submission], *places: RunPaths) -> Iterator[None]:
    """When one job is refused, those before it are cancelled: the chain would end where it is."""
    try:
        yield
    except (RequestError, StageError, KeyboardInterrupt):
        with suppress(StageError):
            queued = [submission.job for submission in submissions]
            slurm.cancel(queued)
            if queued:
                tell(f"cancelled what was queued before: {', '.join(queued)}")
            for paths in places:
                taken_back(paths, queued)
                slurm.cancel([item.job for item in living(paths) if item.record is None])
        raise


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


def freeze_all(paths: RunPaths, cluster: ClusterConfig) -> tuple[Path, Path]:
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


def _refuse_running(planned: Sequence[Job], live: Sequence[Live]) -> None:
    if running := [str(x) for x in live if x.name in {job.name for job in planned}]:
        raise RequestError(
            f"already submitted and not finished: {'; '.join(running)}. See "
            "`python -m yelp_hpc status`, or `cancel` it first."
        )


def _refuse_missing(
    planned: Sequence[Job], config: Config, paths: RunPaths, live: Sequence[Live]
) -> None:
    names = {*(job.name for job in planned), *(item.name for item in live)}
    for job in planned:
        for _, need in job.after:
            stage, _, model = need.partition("-")
            if need in names:
                continue
            if not stage_done(paths, config, stage, model):
                raise RequestError(
                    f"{job.name} needs {need}, which is neither done nor submitted: "
                    f"`python -m yelp_hpc submit {stage}` or `submit all`"
                )


def cancel(*run_dirs: str | Path) -> list[str]:
    """Cancel every live job of runs and of their predictions, nothing else; returns their ids.

    A submission that is under way is waited for, so that all of it is cancelled.

    Raises:
        StageError: the Slurm controller does not answer, or something runs where this machine
            cannot end it.
    """
    runs = [RunPaths(Path(run).absolute()) for run in run_dirs]
    requests = [path.parent for run in runs for path in sorted(run.predict.glob("*/run.json"))]
    beyond: list[str] = []
    roots = [*(run.root for run in runs), *requests]
    found = [job for root in roots for job in _cancel(RunPaths(root), beyond)]
    if beyond:
        raise StageError("\n".join(beyond))
    return found


def _cancel(paths: RunPaths, beyond: list[str]) -> list[str]:
    take_up_programs(paths)
    if not paths.lock("submit").exists() and not living(paths, PATIENCE):
        return []  # nothing was ever submitted here, so that nothing is written either
    with locked(paths.lock("submit")):
        live = living(paths, PATIENCE)
        told = {item.job: text for item in live if (text := beyond_reach(paths, item))}
        beyond += told.values()
        live = [item for item in live if item.job not in told]
        end(live)
        cancelled(paths, live)
    for item in live:
        far = f" here; scancel it on cluster {item.cluster}, should it wait there"
        print(plain(f"cancelled {item.job}{far if item.cluster else ''}"))
    return [item.job for item in live]
