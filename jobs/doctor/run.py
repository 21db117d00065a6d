"""What a run needs: its directory's record, the image, the model and the data, and the node.

Pure but for a look at the sources of binds: facts in, findings out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from yelp_hpc.data.formats.endings import ENDINGS
from yelp_hpc.data.sense import warnings
from yelp_hpc.errors import RequestError, in_shell, nearest
from yelp_hpc.gpus import OLDEST_DRIVER
from yelp_hpc.image.check import driver_problems
from yelp_hpc.jobs.chain import checked_run, refuse_unwritable
from yelp_hpc.jobs.cluster import minutes
from yelp_hpc.jobs.doctor.facts import AllReduce, Image, Machine, NodeVisit
from yelp_hpc.jobs.doctor.findings import Finding, Level, advice, command, config_line, ok
from yelp_hpc.jobs.doctor.probes import seen
from yelp_hpc.jobs.doctor.request import Inputs, Request, needed_paths, visible
from yelp_hpc.jobs.snapshot import exposed
from yelp_hpc.rundir.changes import differences, refused_changes
from yelp_hpc.rundir.manifest import absolute_paths
from yelp_hpc.rundir.paths import RunPaths

SKEW_SECONDS, SKEW_LIMIT = 5.0, 120.0


def check_run(request: Request) -> Iterator[Finding]:
    """The name of the run directory, and its record against the configuration."""
    try:
        refuse_unwritable(RunPaths(checked_run(request.run)))
    except RequestError as error:
        yield advice("run", "failure", str(error), "--run runs/NAME")
        return
    for text in exposed(RunPaths(request.run)):
        yield advice("run", "warning", text, "chmod go-w, on the folder that is named")
    if not request.record:
        yield ok("run", f"{request.run} would be a new run")
        return
    if request.config:
        before = request.recorded("config")["resolved"]
        now = absolute_paths(request.config).model_dump(mode="json")
        run = RunPaths(request.run)
        changed = [d for d in differences(before, now) if refused_changes(run, [d])]
        if changed:
            key, old, new = changed[0]
            text = f"{request.run} was made with {key} {old!r}, the config says {new!r}"
            text += f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            yield config_line("run", "failure", text, f"--set {key}={_shown(old)}")
            return
    yield ok("run", f"{request.run} was made with this configuration")


def check_job_side(python: str, missing: Sequence[str]) -> Finding:
    """The Python that stages run on, where no image is named: does it have torch?"""
    if not missing:
        return ok("job side", f"{python} has what stages import")
    text = f"jobs would run on {python}, which has no {', '.join(missing)}; no image is named"
    remedy = "container: {image: yelp_hpc.sif}"
    return config_line("job side", "failure", text, remedy)


def check_sense(request: Request) -> Iterator[Finding]:
    """What the configuration asks for that is legal but senseless, as far as it tells the rows."""
    config = request.config
    if config is None:
        return
    time = request.cluster.resources("train").time
    drawn = config.data.train_rows
    rows = drawn and round(drawn * (1 - config.data.validation_share))
    limit = minutes(time) if time else None
    for warning in warnings(config, rows, config.data.test_rows, limit):
        text, _, remedy = warning.rpartition(": ")
        yield config_line("sense", "warning", text, remedy)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def check_image(
    image: Image, request: Request, locks: dict[str, str], version: str
) -> list[Finding]:
    """The image file against the record of the run and against this code.

    Args:
        locks: name → SHA-256 of the lock files of this code.
        version: of this code.
    """
    build = f"python -m yelp_hpc image build {in_shell(image.path)}"
    build += " --cuda" if request.gpus else ""
    if image.problem:
        return [command("image", "failure", image.problem, build)]
    found = []
    recorded = request.recorded("image").get("sha256")
    if recorded and recorded != image.sha256:
        text = (
            f"{image.path} is not the image of this run: SHA-256 {image.sha256[:12]}…, the run's "
            f"is {recorded[:12]}…; queued jobs would refuse it"
        )
        again = f"python -m yelp_hpc submit all --config {in_shell(request.config_file)}"
        run = in_shell(request.run)
        remedy = f"python -m yelp_hpc cancel --run {run}\n{again} --run {run}"
        found.append(command("image", "failure", text, remedy))
    lock = image.labels.get("lock", "")
    if lock in locks and locks[lock] != image.labels.get("lock-sha256"):
        text = f"{image.path} was built from another {lock} than the one here"
        found.append(command("image", "failure", text, build))
    if image.labels and image.labels.get("version", version) != version:
        text = f"{image.path} holds yelp_hpc {image.labels['version']}, here is {version}"
        found.append(command("image", "failure", text, build))
    if request.gpus and lock and "cuda" not in lock:
        text = f"{image.path} was built from {lock}: its torch is for the CPU"
        found.append(command("image", "failure", text, build))
    return found or [ok("image", f"{image.path}, SHA-256 {image.sha256[:12]}…")]


def check_inputs(found: Inputs, request: Request) -> Iterator[Finding]:
    """The model and the data, and whether the image sees them."""
    config = request.config
    assert config is not None
    near = f"; did you mean {found.near}?" if found.near else ""
    if found.unfit and found.problem:
        yield command("model", "failure", found.unfit, request.fetch)
    elif found.problem:
        text = f"model.path {config.model.path}: {found.problem}{near}"
        if found.near or found.model is None:
            remedy = f"model.path: {found.near or 'OWNER/NAME of a Hub model, or a folder'}"
            yield config_line("model", "failure", text, remedy)
        else:
            yield command("model", "failure", text, request.fetch)
    elif found.unfit:
        named = re.search(r"\b(lora\.target|task\.labels|prompt\.template)\b", found.unfit)
        remedy = f"{named[1]}: VALUE" if named else "model.path: OWNER/NAME of another model"
        yield config_line("model", "failure", found.unfit, remedy)
    elif found.remote:
        text = f"{config.model.path} is not in the cache: the first stage downloads it"
        yield command("model", "warning", text, request.fetch)
    elif found.model:
        yield ok("model", "; ".join((str(found.model), *found.notes)))
    else:
        yield ok("model", f"{config.model.path}, made from its package on first use")
    wanted = {config.data.text_column: "text_column", config.data.label_column: "label_column"}
    good = True
    for file in found.data:
        if file.state != "file":
            good = False
            near = f"; did you mean {file.near}?" if file.near else ""
            text = f"{file.key} {file.path}: {file.state}{near}"
            if file.state == "unreadable":
                yield command("data", "failure", text, f"chmod u+r {file.path}")
            else:
                yield config_line("data", "failure", text, f"{file.key}: {file.near or 'FILE'}")
        elif file.columns is not None:
            for column, key in wanted.items():
                if column not in file.columns:
                    good = False
                    has = ", ".join(file.columns) or "no columns"
                    text = f"{file.key} {file.path} has no column {column} (it has: {has})"
                    free = [c for c in file.columns if c not in wanted]
                    guess = nearest(column, free) or (free[0] if len(free) == 1 else "NAME")
                    yield config_line("data", "failure", text, f"data.{key}: {guess}")
    if good and config.data.source == "file":
        yield ok("data", ", ".join(file.path for file in found.data))
    if request.cluster.container:
        yield from _binds(found, request)


def _binds(found: Inputs, request: Request) -> Iterator[Finding]:
    good = True
    binds = request.binds
    for bind in binds:
        source = bind.partition(":")[0]
        if seen(Path(source)) == "missing":
            good = False
            rest = [other for other in binds if other != bind]
            text = f"container.binds names {source}, which does not exist"
            yield config_line("binds", "failure", text, f"container.binds: [{', '.join(rest)}]")
    unseen = {
        path: what
        for path, what in needed_paths(request, found).items()
        if not visible(path, request)
    }
    if unseen:
        good = False
        what = " and ".join(f"{path} ({what})" for path, what in unseen.items())
        text = f"not bound into the image, so that stages would not see it: {what}"
        yield config_line("binds", "failure", text, binds_line(request, unseen))
    if good:
        yield ok("binds", "the image sees the model and the data")


def binds_line(request: Request, paths: Iterable[str]) -> str:
    """The config line that binds `paths` too: each by its folder, none within another."""
    # a model's folder may well end in .1
    folders = [str(Path(path).parent) if path.lower().endswith(ENDINGS) else path for path in paths]
    outer = [
        folder
        for folder in dict.fromkeys(folders)
        if not any(folder.startswith(f"{other}/") for other in folders)
    ]
    binds = [bind for bind in request.binds if bind not in outer]
    return f"container.binds: [{', '.join([*binds, *outer])}]"


def check_seen(machine: Machine, request: Request) -> Iterator[Finding]:
    """What the node, or the image, has to see of the host's files."""
    container = request.cluster.container
    missing = {path: state for path, state in machine.seen.items() if state in _BAD}
    for path, state in missing.items():
        text = f"{path} is {state} {'in the image' if machine.place == 'image' else 'on the node'}"
        if machine.place == "image":
            yield config_line("files", "failure", text, binds_line(request, missing))
        elif container and path == str(Path(container.image).absolute()):
            remedy = "container.image: PATH on a file system that all nodes see"
            yield config_line("files", "failure", text, remedy)
        else:
            yield advice("files", "failure", text, "copy it to a file system that all nodes see")
    if machine.seen and not missing:
        yield ok("files", f"all {len(machine.seen)} that stages read are there")


_BAD = ("missing", "unreadable")


def check_visit(visit: NodeVisit, request: Request) -> Iterator[Finding]:
    """The job on the node: that it ran, its clock, its folder, the requeue, the all-reduce."""
    report = visit.report
    if report is None:
        remedy = f"scontrol show job {visit.job}" if visit.job else "sinfo"
        text = visit.problem + (f"\n{visit.log}" if visit.log else "")
        yield command("node job", "failure", text, remedy)
        return
    yield ok("node job", f"job {visit.job} ran on {report.machine.name}")
    if not request.cluster.requeue:
        yield ok("requeue", "not asked for (requeue: false): submit again after each time limit")
    elif visit.requeue is False:
        text = "Slurm would not requeue the job although it asks for it (Requeue=0)"
        remedy = "defaults.time: as long as the whole stage needs; submit again after a fault"
        yield config_line("requeue", "failure", text, remedy)
    elif visit.requeue:
        yield ok("requeue", "Slurm grants requeues")
    if report.answered is None:
        text = "a file that the host wrote was not seen on the node within a minute"
        yield advice("shared files", "failure", text, "--run DIR on a file system that both see")
    else:
        yield from _clock(visit, report.sent, report.answered)
    if visit.torn:
        text = f"a file that the node replaced was missing or half for the host, {visit.torn} times"
        yield advice("shared files", "failure", text, "--run DIR on another file system")
    elif report.answered is not None:
        delay = report.answered - report.sent
        level: Level = "warning" if delay > 10 else "ok"
        text = f"host and node see each other's files after {delay:.1f} s at most"
        if level == "ok":
            yield ok("shared files", text)
        else:
            remedy = "nothing to do; `status` is that much behind"
            yield advice("shared files", level, text, remedy)
    yield from check_allreduce(report.allreduce, request, report.machine)


def _clock(visit: NodeVisit, sent: float, answered: float) -> Iterator[Finding]:
    # the host answered somewhere between the two moments (Cristian 1989)
    skew, unsure = visit.answered - (sent + answered) / 2, (answered - sent) / 2
    text = f"the node's clock is {abs(skew):.1f} s {'behind' if skew > 0 else 'ahead'} the host's"
    if abs(skew) - unsure > SKEW_SECONDS:
        level: Level = "failure" if abs(skew) - unsure > SKEW_LIMIT else "warning"
        remedy = "ask the site to start chronyd (or ntpd) on the node: deadlines would be wrong"
        yield advice("clock", level, text, remedy)
    else:
        yield ok("clock", f"host and node agree to {max(abs(skew), unsure):.1f} s")


def check_allreduce(found: AllReduce, request: Request, machine: Machine) -> Iterator[Finding]:
    """The sum over the ranks, and torch's CUDA against the driver."""
    debug = "export NCCL_DEBUG=INFO NCCL_P2P_DISABLE=1"
    if found.problem:
        missing = "No module named" in found.problem
        remedy = _job_packages(request) if missing else debug
        text = f"all-reduce: {found.problem}"
        yield command("all-reduce", "failure", text, remedy)
        return
    driver = machine.driver
    problems = driver_problems(found.cuda, driver.cuda if driver else None)
    if problems and request.gpus:
        text = problems[0].replace("the image", "torch").replace("this host", "this node")
        image = request.cluster.container
        build = (
            f"python -m yelp_hpc image build {in_shell(image.image)} --cuda"
            if image
            else _CUDA_PACKAGES
        )
        if found.cuda:  # the same set again would not run either
            text += f"; cuda.lock needs driver {OLDEST_DRIVER} or newer"
            build = f"bash containers/lock.sh --index URL && {build}"
        yield command("CUDA", "failure", text, build)
    elif driver and found.cuda:
        yield ok("CUDA", f"torch {found.torch} for CUDA {found.cuda}, driver up to {driver.cuda}")
    if not found.correct:
        text = f"the {found.backend} sum over {found.ranks} ranks is wrong"
        yield command("all-reduce", "failure", text, debug)
        return
    device = found.devices[0] if found.devices else "CPU"
    if found.ranks == 1:
        yield ok("all-reduce", f"torch {found.torch} computes on {device}; one rank, no exchange")
        return
    text = f"{found.ranks} ranks over {found.backend} on {device}, {found.gb_per_s:.1f} GB/s"
    yield ok("all-reduce", text)


def _job_packages(request: Request) -> str:
    image = request.cluster.container
    if image:
        return f"python -m yelp_hpc image build {in_shell(image.image)}"
    return 'python -m pip install "yelp-hpc[job]"'


_CUDA_PACKAGES = "python -m pip install --require-hashes -r containers/cuda.lock"
