"""What a place must have: Python, Apptainer, the driver, folders that hold, the Hub.

Pure: facts in, findings out.
"""

from __future__ import annotations

from collections.abc import Iterator

from yelp_hpc.image.check import other_versions, version_problems
from yelp_hpc.image.file import no_apptainer
from yelp_hpc.jobs.doctor.facts import Folder, Hub, Machine
from yelp_hpc.jobs.doctor.findings import Finding, Level, advice, command, config_line, ok
from yelp_hpc.jobs.doctor.probes import HOST_PACKAGES
from yelp_hpc.jobs.doctor.request import Request

GIB = 2**30
NEEDED = {"run": 2 * GIB, "cache": 2 * GIB, "HF_HOME": 2 * GIB, "tmp": GIB // 4}
"""Free space to be comfortable with, in bytes; a quarter of it is a failure."""
FEW_INODES = 5_000
SLOW_MS = 200.0
OLDEST_APPTAINER = (1, 1)
_NAMES = {"run": "run directory", "cache": "cache", "HF_HOME": "HF_HOME", "tmp": "scratch"}


def check_machine(machine: Machine, request: Request) -> list[Finding]:
    """All findings about one place."""
    return [
        *_python(machine, request),
        *_packages(machine, request),
        *(_container(machine, request) if machine.place != "image" else []),
        *_driver(machine, request),
        *(
            finding
            for role, folder in machine.folders.items()
            for finding in _folder(role, folder, machine, request)
        ),
        *(_hub(machine.hub, machine, request) if machine.hub else []),
    ]


def _python(machine: Machine, request: Request) -> Iterator[Finding]:
    if machine.python_problem:
        named = request.cluster.python or "this one"
        text = f"python: {named} cannot run the jobs: {machine.python_problem}"
        yield config_line("python", "failure", text, "python: null")
    else:
        yield ok("python", f"Python {machine.python}")


def _packages(machine: Machine, request: Request) -> Iterator[Finding]:
    if machine.home_packages and machine.place == "image":
        text = f"packages of your home come before the image's: {machine.home_packages[0]}"
        yield command("packages", "failure", text, "export APPTAINERENV_PYTHONNOUSERSITE=1")
    if machine.lock:
        inside = machine.place == "image"
        have = machine.packages
        if not inside:
            have = {name: version for name, version in have.items() if name in HOST_PACKAGES}
        wrong = version_problems(machine.lock, have)
        if wrong:
            text = wrong[0].replace("in the image", "here")
            text += f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            others = other_versions(machine.lock, have)
            pip = " ".join(f"{name}=={wanted}" for name, (_, wanted) in others.items())
            remedy = "python -m yelp_hpc image build" if inside else f"python -m pip install {pip}"
            yield command("packages", "warning", text, remedy)
            return
        yield ok("packages", "as the lock names them")
    if request.record and not request.cluster.container and machine.place == "host":
        before = request.recorded("packages")
        changed = [
            (name, version, machine.packages[name])
            for name, version in before.items()
            if name != "yelp-hpc" and machine.packages.get(name, version) != version
        ]
        if changed:
            name, old, new = changed[0]
            text = f"the run was begun with {name} {old}; here it is {new}"
            pins = " ".join(f"{name}=={old}" for name, old, _ in changed)
            yield command("packages", "warning", text, f"python -m pip install {pins}")


def _container(machine: Machine, request: Request) -> Iterator[Finding]:
    if request.cluster.container is None:
        return
    # a login node can do without: the image is looked into on the compute node
    bad: Level = "failure" if machine.place == "node" else "warning"
    if machine.apptainer is None:
        yield config_line("apptainer", bad, no_apptainer(), 'setup: ["module load apptainer"]')
        return
    number = tuple(int(part) for part in machine.apptainer.split(".")[:2])
    if number < OLDEST_APPTAINER:
        text = f"apptainer {machine.apptainer} is older than 1.1, which needs no setuid to run"
        remedy = 'setup: ["module load apptainer/1.4"]'
        yield config_line("apptainer", "warning", text, remedy)
    else:
        yield ok("apptainer", f"apptainer {machine.apptainer}")
    if machine.root or machine.starter_suid:
        yield ok("namespaces", "not needed: apptainer runs as root or is installed setuid")
    elif machine.user_namespaces:
        yield ok("namespaces", "user namespaces are allowed")
    else:
        yield advice(
            "namespaces",
            bad,
            "user namespaces are off, so apptainer cannot start an image",
            "ask the site for `sysctl -w user.max_user_namespaces=15000` or apptainer-suid",
        )


def _driver(machine: Machine, request: Request) -> Iterator[Finding]:
    wanted = request.gpus
    driver = machine.driver
    if driver:
        names = ", ".join(f"{driver.gpus.count(n)} × {n}" for n in dict.fromkeys(driver.gpus))
        text = f"driver {driver.version}, up to CUDA {driver.cuda}; {names or 'no GPU'}"
        if machine.place == "node" and len(driver.gpus) < wanted:
            text = f"GPUs asked for: {wanted}, nvidia-smi shows {len(driver.gpus)}: {text}"
            remedy = f"scontrol show node {machine.name}"
            yield command("driver", "failure", text, remedy)
        else:
            yield ok("driver", text)
    elif machine.place == "host" or not wanted:
        yield ok("driver", "no GPU here" + ("; --on-node looks there" if wanted else ""))
    elif machine.place == "image":
        # outside there may be one that is not handed in
        text = "nvidia-smi does not answer in the image: stages would compute on the CPU"
        if request.cluster.container and request.cluster.container.nv:
            remedy = "mend the node's driver first; else ask the site about apptainer's nvliblist"
            yield advice("driver", _without_gpu(request), text, remedy)
        else:
            yield config_line("driver", _without_gpu(request), text, "container.nv: true")
    else:
        text = f"GPUs asked for: {wanted}, but nvidia-smi does not answer: no driver on this node"
        remedy = (
            f"ask the site about {machine.name}, and meanwhile defaults.exclude: {machine.name}"
        )
        yield advice("driver", _without_gpu(request), text, remedy)


def _without_gpu(request: Request) -> Level:
    """fp32, which `auto` is on a CPU, also runs there, only slowly."""
    slow = request.config is not None and request.config.train.precision in ("fp32", "auto")
    return "warning" if slow else "failure"


def _folder(role: str, folder: Folder, machine: Machine, request: Request) -> Iterator[Finding]:
    check, bad = _NAMES[role], False
    elsewhere = {
        "run": "--run DIR on another file system",
        "cache": "export YELP_HPC_CACHE=DIR",
        "HF_HOME": "export HF_HOME=DIR",
        "tmp": "export TMPDIR=DIR",
    }[role]
    if folder.problem:
        missing = folder.problem == "it does not exist"
        text = f"{folder.path}: {folder.problem[:1].lower()}{folder.problem[1:]}"
        if missing and machine.place == "host":
            yield command(check, "failure", text, f"mkdir -p {folder.path}")
        elif missing and machine.place == "image":
            yield config_line(check, "failure", text, f"container.binds: [{folder.path}]")
        elif missing:
            text += " on the node: it does not lie on a file system that both see"
            yield advice(check, "failure", text, elsewhere)
        elif "ermission" in folder.problem:
            yield command(check, "failure", text, f"chmod u+rwx {folder.path}")
        else:
            yield advice(check, "failure", text, elsewhere)
        return
    for level, text, remedy in [
        *_space(role, folder),
        *_quota(folder, machine),
        *_manners(role, folder, request),
    ]:
        bad = True
        yield advice(check, level, text, remedy or elsewhere)
    if not bad:
        free = f"{folder.free / GIB:.0f} GiB free"
        text = f"{folder.kind}, {free}, {folder.milliseconds:.1f} ms a flushed file: {folder.path}"
        yield ok(check, text)


def _space(role: str, folder: Folder) -> Iterator[tuple[Level, str, str]]:
    if folder.free < NEEDED[role]:
        level: Level = "failure" if folder.free < NEEDED[role] / 4 else "warning"
        free, need = folder.free / GIB, NEEDED[role] / GIB
        yield level, f"{folder.path}: {free:.1f} GiB free, {need:g} GiB are wanted", ""
    if folder.inodes is not None and folder.inodes < FEW_INODES and folder.kind != "btrfs":
        yield "warning", f"{folder.path}: room for only {folder.inodes} more files", ""


def _quota(folder: Folder, machine: Machine) -> Iterator[tuple[Level, str, str]]:
    for quota in machine.quotas:
        if quota.source == folder.source and quota.used >= 0.9 * quota.limit:
            level: Level = "failure" if quota.used >= quota.limit else "warning"
            used, limit = quota.used / 2**20, quota.limit / 2**20
            text = f"{folder.path}: {used:.1f} GiB of a quota of {limit:.1f} GiB are used"
            yield level, text, "remove what you no longer need, or name another file system"


def _manners(role: str, folder: Folder, request: Request) -> Iterator[tuple[Level, str, str]]:
    if role != "run":
        return
    if folder.torn:
        yield (
            "failure",
            f"{folder.path} ({folder.kind}): a file that was replaced by a rename was missing or "
            f"half for a reader, {folder.torn} times",
            "",
        )
    if not folder.locks:
        yield (
            "warning",
            f"{folder.path} ({folder.kind}) has no file locks: two submissions at once to one run "
            "would not see each other",
            "",
        )
    if folder.milliseconds > SLOW_MS:
        yield (
            "warning",
            f"{folder.path} ({folder.kind}): {folder.milliseconds:.0f} ms to write, flush and "
            "rename a small file",
            "",
        )
    if folder.kind in ("tmpfs", "ramfs"):
        yield (
            "warning",
            f"{folder.path} lies in memory ({folder.kind}): gone after a restart, and no other "
            "node sees it",
            "",
        )


def _hub(hub: Hub, machine: Machine, request: Request) -> Iterator[Finding]:
    publishing = bool(request.config and request.config.publish.repo_id)
    where = request.config.publish.where if request.config else "slurm"
    if machine.place == "host":
        yield from _token(hub, publishing)
    if hub.offline and not (publishing and where == "slurm" and machine.place == "node"):
        yield ok("hub", "HF_HUB_OFFLINE is set: nothing is asked of the Hub")
        return
    problem = "HF_HUB_OFFLINE is set" if hub.offline else hub.problem
    if not problem:
        yield ok("hub", f"{hub.endpoint} answers")
        return
    text = f"{hub.endpoint} cannot be reached: {problem}"
    if machine.place == "node" and publishing and where == "slurm":
        yield config_line("hub", "failure", text, "--set publish.where=login")
    elif request.stages_need_hub:
        text += "; fetch where the network is:"
        yield command("hub", "failure", text, request.fetch)
    elif publishing and machine.place == "host" and where == "login":
        remedy = "export https_proxy=http://PROXY:PORT"
        yield command("hub", "warning", text, remedy)
    else:
        yield ok("hub", f"{hub.endpoint} is not in reach, and not needed")


def _token(hub: Hub, publishing: bool) -> Iterator[Finding]:
    bad: Level = "failure" if publishing else "warning"
    if hub.token_problem:
        remedy = f"chmod 600 {hub.token_path}" if "chmod" in hub.token_problem else _LOGIN
        yield command("token", bad, hub.token_problem.partition(";")[0], remedy)
    elif not hub.token:
        if publishing:
            yield command("token", "failure", "no Hub token, but publish.repo_id is set", _LOGIN)
        else:
            yield ok("token", "no Hub token; none is needed until something is published")
    elif hub.token_mode & 0o077:
        text = f"{hub.token_path} can be read by others (mode {hub.token_mode:04o})"
        yield command("token", bad, text, f"chmod 600 {hub.token_path}")
    elif hub.accepted is False:
        yield command("token", bad, f"the Hub refuses the token of {hub.token}", _LOGIN)
    else:
        yield ok("token", f"from {hub.token}" + (", the Hub knows it" if hub.accepted else ""))


_LOGIN = "hf auth login"
