"""The short job on a compute node: started as training is, it reports what it finds there.

The host writes a request into a folder beside the run directory and submits; the job
(`python -m yelp_hpc.jobs.doctor.node FOLDER`) says hello, waits for the host's answer, replaces a
file while the host reads it, looks around, and writes `report.json`. The folder is removed
afterwards.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs import slurm
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import inside, stage_environment
from yelp_hpc.jobs.doctor.facts import Look, Machine, NodeReport, NodeVisit
from yelp_hpc.jobs.doctor.probes import (
    all_reduce_argv,
    all_reduced,
    disk,
    last_line,
    look,
    turn,
    whole,
)
from yelp_hpc.jobs.doctor.request import Request, visible
from yelp_hpc.jobs.site.reasons import reason_in_words
from yelp_hpc.own_files import own_module
from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.runtime import use_programs

LIMIT = "5"
"""Minutes that the job may take; it needs well under one, most of it for importing torch."""
TURNS, POLL = 200, 0.05
# NFS may keep a folder's listing for a minute
ANSWER_SECONDS, SUM_SECONDS = 75.0, 150.0


@dataclass
class _Exchange:
    """The files that host and node hand each other."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def has(self, path: Path) -> bool:
        """Whether `path` is there, asked of the server.

        A look at the name itself would be answered from NFS's cache of absent ones.
        """
        return path.name in os.listdir(self.folder)  # noqa: PTH208


def visit(
    request: Request, what: Look, wait_seconds: float, say: Callable[[str], None]
) -> NodeVisit:
    """Submit the job and wait for its report; it is cancelled when it takes too long.

    Raises:
        RequestError: there is no sbatch here.
    """
    from yelp_hpc.jobs.executor import sbatch
    from yelp_hpc.jobs.job import Job
    from yelp_hpc.jobs.site.refusals import refusal

    parent = disk(request.run)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=parent))
    except OSError as error:
        return NodeVisit(problem=f"cannot write into {parent}: {error.strerror}")
    try:
        files = _Exchange(folder)
        content = {
            "look": what.model_dump(mode="json"),
            "cluster": request.cluster.model_dump(mode="json"),
            "ranks": request.ranks,
            "run": str(parent),
        }
        write_json(files.request, content)
        try:
            script = folder / "job.sh"
            script.write_text(job_script(request.cluster, folder))
            job, _ = sbatch(script)
        except StageError as error:
            return NodeVisit(problem=str(refusal(Job("train"), str(error))))
        say(f"job {job} looks at a node")
        return _wait(files, job, wait_seconds, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def job_script(cluster: ClusterConfig, folder: Path) -> str:
    """The sbatch script: the resources of training, but for its time limit and its size."""
    from submitit.slurm.slurm import _make_sbatch_string

    from yelp_hpc.jobs.executor import parameters
    from yelp_hpc.jobs.job import Job
    from yelp_hpc.jobs.snapshot import freeze

    want = cluster.resources("train")
    short = want.model_copy(update={"time": LIMIT, "nodes": 1, "save_seconds": 10})
    code = freeze(RunPaths(folder))
    settings = cluster.model_copy(update={"train": short})
    params = parameters(Job("train"), settings, folder, code, {})
    params["job_name"] = "yelp-doctor"
    argv = [cluster.python or sys.executable, "-u", "-m", "yelp_hpc.jobs.doctor.node", str(folder)]
    return str(_make_sbatch_string(command=shlex.join(argv), folder=folder, **params))


def _wait(files: _Exchange, job: str, wait_seconds: float, say: Callable[[str], None]) -> NodeVisit:
    end, asked = time.monotonic() + wait_seconds, 0.0
    facts: dict[str, Any] = {"job": job}
    torn, turning, shown, gone = 0, files.folder / "turning", "", 0
    try:
        while True:
            if "answered" not in facts and files.has(files.hello):
                facts["answered"] = time.time()
                write_json(files.answer, {"time": facts["answered"]})
                end = max(end, time.monotonic() + 60 * int(LIMIT))
            if files.has(files.report):
                report = NodeReport.model_validate(read_json(files.report))
                return NodeVisit(report=report, torn=torn, **facts)
            if files.has(turning):
                torn += not whole(turning) and not files.turned.exists()
            if time.monotonic() - asked > 2:
                asked = time.monotonic()
                rows = _rows(job)
                state = f"{rows[0].state}: {reason_in_words(rows[0].reason)}" if rows else ""
                if rows and rows[0].state == "PENDING" and state != shown:
                    say(f"job {job} waits: {reason_in_words(rows[0].reason)}")
                    shown = state
                if "requeue" not in facts and rows:
                    facts["requeue"] = _requeue(job)
                # squeue may stand behind a cache
                gone = gone + 1 if rows == [] and not slurm.held(job) else 0
                if gone > 2:  # seen in the queue late, its report later still: ask more than once
                    return NodeVisit(problem=_ended(files, job), log=_log(files), **facts)
            if time.monotonic() > end:
                why = f" (it waits: {shown.partition(': ')[2]})" if shown else ""
                text = f"job {job} has not reported within {wait_seconds:.0f} s{why}; cancelled"
                return NodeVisit(problem=text, log=_log(files), **facts)
            time.sleep(POLL)
    except KeyboardInterrupt:
        say(f"job {job} is cancelled")
        raise
    finally:
        if not files.report.exists():  # else it is about to end by itself
            with suppress(StageError, RequestError):
                slurm.cancel([job])


def _rows(job: str) -> list[slurm.Row] | None:
    try:
        return slurm.queue([job])
    except (StageError, RequestError):
        return None


def _requeue(job: str) -> bool | None:
    try:
        told = slurm.facts_of(job).get("Requeue")
    except (StageError, RequestError):
        return None
    return told == "1" if told else None


def _ended(files: _Exchange, job: str) -> str:
    text = f"job {job} ended without a report"
    if files.has(files.hello) or _log(files):
        return text
    # Slurm could not even write the job's output there
    return f"{text} or a word: the node does not see this folder, {files.folder.parent}"


def _log(files: _Exchange) -> str:
    logs = sorted(files.folder.glob("*.out"), key=lambda path: path.stat().st_mtime)
    texts = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return "\n".join(line for line in texts if line.strip())[-600:]


def main(folder: Path) -> None:
    """What runs on the node."""
    # only the supervisor has a use for what executor.py holds back: here a signal may end the job
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    files = _Exchange(folder)
    request = read_json(files.request)
    cluster = ClusterConfig.model_validate(request["cluster"])
    use_programs(cluster.programs)
    sent = time.time()
    write_json(files.hello, {"time": sent})
    answered = None
    end = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < end and answered is None:
        if files.has(files.answer):
            answered = time.time()
        else:
            time.sleep(POLL)
    for count in range(TURNS):
        turn(folder / "turning", count)
        time.sleep(0.001)
    write_json(files.turned, {})
    what = Look.model_validate(request["look"])
    machine = look(what)
    env = stage_environment(cluster, "train", os.environ, None)

    def started(module: str, *arguments: str) -> tuple[str, str]:
        argv = [*own_module(module), *arguments]
        if cluster.container:
            python = ["python", "-m", module, *arguments]
            argv = inside(cluster.container, Path(request["run"]), python, env)
        return last_line(argv, env, SUM_SECONDS)

    within, problem = None, ""
    if cluster.container:
        with suppress(OSError):  # as the supervisor does
            Path(cluster.container.cache).mkdir(parents=True, exist_ok=True)
        here = Request(cluster, run=Path(request["run"]))
        # what is not bound is found by the check of the binds
        folders = {
            role: path
            for role, path in what.folders.items()
            if role not in ("tmp", "HF_HOME") and visible(path, here)
        }
        own = Look(place="image", folders=folders, paths=_inside_paths(what, cluster))
        text, problem = started("yelp_hpc.jobs.doctor.probes", own.model_dump_json())
        within = Machine.model_validate_json(text) if not problem else None
    summed = all_reduced(*started(*all_reduce_argv(request["ranks"])))
    report = NodeReport(
        machine=machine,
        sent=sent,
        answered=answered,
        inside=within,
        inside_problem=problem,
        allreduce=summed,
    )
    write_json(files.report, report.model_dump(mode="json"))


def _inside_paths(what: Look, cluster: ClusterConfig) -> tuple[str, ...]:
    """All but what only the host's side reads: the image and the sources of renamed binds."""
    assert cluster.container
    outside = {str(Path(cluster.container.image).absolute())}
    outside |= {bind.partition(":")[0] for bind in cluster.container.binds}
    return tuple(path for path in what.paths if path not in outside)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
