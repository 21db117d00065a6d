"""`doctor`: looks at the host, a node and the image, and says what mends what is wrong.

Asks the probes, hands what they saw to the checks. Writes a few small files into the folders that a
run would use, and removes them; with `on_node` it submits one short job.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, StageError, in_shell
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import with_inputs
from yelp_hpc.jobs.doctor.facts import Look, NodeVisit
from yelp_hpc.jobs.doctor.findings import Finding, command
from yelp_hpc.jobs.doctor.machine import check_machine
from yelp_hpc.jobs.doctor.node import visit
from yelp_hpc.jobs.doctor.probes import (
    all_reduce_argv,
    all_reduced,
    disk,
    image,
    last_line,
    look,
    seen,
)
from yelp_hpc.jobs.doctor.request import Inputs, Request, cache_of, inputs, needed_paths
from yelp_hpc.jobs.doctor.run import (
    check_allreduce,
    check_image,
    check_inputs,
    check_job_side,
    check_run,
    check_seen,
    check_sense,
    check_visit,
)
from yelp_hpc.jobs.doctor.slurm import check_slurm
from yelp_hpc.jobs.preflight import MODULES, missing_modules, on_host_python
from yelp_hpc.jobs.site.client import client
from yelp_hpc.jobs.site.refusals import as_the_shell_fills_it
from yelp_hpc.jobs.site.slurm_facts import SlurmFacts, ask_slurm
from yelp_hpc.own_files import own_module, version
from yelp_hpc.progress import say as tell
from yelp_hpc.rundir.files import read_json
from yelp_hpc.rundir.manifest import lock_hashes, recorded_config
from yelp_hpc.rundir.paths import STAGES, RunPaths
from yelp_hpc.runtime import in_image, use_programs

SUM_SECONDS = 200.0
"""Longer than `ranks.allreduce` gives itself: it ends its ranks, a kill would leave them."""


def diagnose(
    cluster: ClusterConfig,
    config: Config | None = None,
    run: str | Path | None = None,
    *,
    config_file: str = "FILE",
    cluster_file: str | None = None,
    on_node: bool = False,
    wait_seconds: float = 900,
    say: Callable[[str], None] = tell,
) -> list[Finding]:
    """Every finding, in the order of the chain: Slurm, this machine, the run, the node, the image.

    Args:
        run: run directory, made already or not; None: `runs` here.
        on_node: submit a job to a node of the train stage's partition, and wait for it.

    Raises:
        RequestError: `on_node` inside an image or without Slurm; run.json cannot be read.
    """
    use_programs(cluster.programs)
    place = Path(run or "runs").expanduser().absolute()
    record = _record(place)
    request = Request(
        *(cluster, config, place, record, config_file, cluster_file), run_named=run is not None
    )
    if config and cluster.container:
        full = _as_submitted(cluster, config, place)
        request = replace(request, cluster=full, own_binds=cluster.container.binds)
    found = inputs(config) if config else None
    request = replace(request, stages_need_hub=_needs_hub(config, found))
    if in_image():
        if on_node:
            raise RequestError("--on-node needs Slurm: run the doctor outside the image for it")
        return list(_image_side(request, found))
    facts = ask_slurm()
    if on_node and facts.problem:
        raise RequestError(f"--on-node needs Slurm: {facts.problem.splitlines()[0]}")
    if not facts.problem:
        facts = facts.model_copy(update={"refusals": _refusals(request)})
    return [
        *check_slurm(facts, as_the_shell_fills_it(cluster, os.environ), config),
        *_host_side(request, found),
        *(_node_side(request, found, facts, wait_seconds, say) if on_node else []),
    ]


def _as_submitted(cluster: ClusterConfig, config: Config, run: Path) -> ClusterConfig:
    """With the binds that `submit` adds; what is missing is said of the model and the data."""
    full = with_inputs(cluster, config, run)
    if full.container is None or cluster.container is None:
        return cluster
    added = [bind for bind in full.container.binds if bind not in cluster.container.binds]
    there = [bind for bind in added if seen(Path(bind.partition(":")[0])) != "missing"]
    binds = (*cluster.container.binds, *there)
    return full.model_copy(update={"container": full.container.model_copy(update={"binds": binds})})


def _record(run: Path) -> dict[str, Any] | None:
    path = RunPaths(run).run_json
    if not path.is_file():
        return None
    recorded_config(path)
    record: dict[str, Any] = read_json(path)
    return record


def _needs_hub(config: Config | None, found: Inputs | None) -> bool:
    return bool(config and (config.data.source == "hub" or (found and found.remote)))


def _refusals(request: Request) -> dict[str, str]:
    """What `sbatch --test-only` says to each stage's script, "" when it accepts it."""
    from yelp_hpc.jobs.executor import parameters, sbatch_text
    from yelp_hpc.jobs.job import Job

    said: dict[str, str] = {}
    known: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        paths = RunPaths(Path(scratch))
        for stage in STAGES:
            want = request.cluster.resources(stage).model_dump_json()
            if want not in known:
                params = parameters(Job(stage), request.cluster, paths.root, paths.code, {})
                script = Path(scratch) / "job.sh"
                script.write_text(sbatch_text(Job(stage), params, paths, request.cluster))
                try:
                    client(["sbatch", "--test-only", str(script)])
                    known[want] = ""
                except (StageError, RequestError) as error:
                    known[want] = str(error).removeprefix("sbatch failed: ")
            said[stage] = known[want]
    return said


def _look(request: Request, found: Inputs | None, **changes: Any) -> Look:
    folders = {
        "run": str(disk(request.run)),
        "cache": str(disk(cache_of(request.cluster))),
        "tmp": tempfile.gettempdir(),
    }
    if home := os.environ.get("HF_HOME"):
        folders["HF_HOME"] = home
    paths = [*needed_paths(request, found)]
    if request.cluster.container:
        paths.append(str(Path(request.cluster.container.image).absolute()))
        paths += [bind.partition(":")[0] for bind in request.cluster.container.binds]
    settings = {
        "folders": folders,
        "paths": tuple(dict.fromkeys(paths)),
        "python": request.cluster.python or "",
        "hub": True,
        "token_file": request.config.publish.token_file if request.config else None,
    }
    return Look.model_validate({**settings, **changes})


def _host_side(request: Request, found: Inputs | None) -> Iterable[Finding]:
    yield from check_machine(look(_look(request, found, paths=())), request)
    if on_host_python(request.cluster):
        python = request.cluster.python or sys.executable
        yield check_job_side(python, missing_modules(python, MODULES["train"]) or ())
    if request.run_named:
        yield from check_run(request)
    if request.cluster.container:
        facts = image(Path(request.cluster.container.image))
        yield from check_image(facts, request, lock_hashes(), version())
    if found:
        yield from check_inputs(found, request)
    yield from check_sense(request)


def _node_side(
    request: Request,
    found: Inputs | None,
    facts: SlurmFacts,
    wait_seconds: float,
    say: Callable[[str], None],
) -> Iterable[Finding]:
    # a folder that is missing on the host is the host's finding
    what = _look(request, found, place="node", token_file=None)
    paths = tuple(path for path in what.paths if Path(path).exists())
    what = what.model_copy(update={"paths": paths})
    made: NodeVisit = visit(request, what, wait_seconds, say)
    name = f"node {made.report.machine.name}" if made.report else "node"
    report = made.report
    findings = list(check_visit(made, request))
    if report:
        findings += [*check_machine(report.machine, request), *check_seen(report.machine, request)]
    yield from (replace(finding, where=name) for finding in findings)
    if report and report.inside:
        inside = [*check_machine(report.inside, request), *check_seen(report.inside, request)]
        yield from (replace(finding, where=f"image on {name}") for finding in inside)
    elif report and report.inside_problem:
        assert request.cluster.container
        text = f"the image does not start: {report.inside_problem}"
        remedy = f"python -m yelp_hpc image check {request.cluster.container.image}"
        if "No module named" in report.inside_problem:
            text = f"the image holds an older yelp_hpc: {report.inside_problem.split(': ')[-1]}"
            remedy = f"python -m yelp_hpc image build {in_shell(request.cluster.container.image)}"
        yield replace(command("image", "failure", text, remedy), where=f"image on {name}")


def _image_side(request: Request, found: Inputs | None) -> Iterable[Finding]:
    machine = look(_look(request, found, place="image", token_file=None))
    outside = (
        {str(Path(request.cluster.container.image).absolute())}
        if request.cluster.container
        else set()
    )
    seen = {path: state for path, state in machine.seen.items() if path not in outside}
    machine = machine.model_copy(update={"seen": seen})
    gpus = len(machine.driver.gpus) if machine.driver else 0
    module, *arguments = all_reduce_argv(gpus or 2)
    summed = last_line([*own_module(module), *arguments], dict(os.environ), SUM_SECONDS)
    findings = [
        *check_machine(machine, request),
        *check_seen(machine, request),
        *(check_run(request) if request.run_named else ()),
        *(check_inputs(found, replace(request, cluster=ClusterConfig())) if found else []),
        *check_allreduce(all_reduced(*summed), request, machine),
    ]
    return [replace(finding, where="image") for finding in findings]
