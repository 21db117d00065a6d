"""What sbatch refuses and which key to change; which of the user's SBATCH_ defaults are taken up.

Pure: text and environments in, errors and options out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.jobs.cluster import ClusterConfig, Resources, minutes
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.site.client import NoAnswer, unanswered
from yelp_hpc.rundir.paths import STAGES

# what sbatch says → the keys to change, as the cluster file has them; {} is the stage
_SECTION = "{0}.%s or defaults.%s"
_HINTS = {
    r"(unrecognized|invalid|ambiguous) option|option '--": "{0}.sbatch or defaults.sbatch",
    r"account/partition combination|invalid account": _SECTION % ("account", "account"),
    r"(Assoc|QOS)\w*SubmitJob|too many (jobs|tasks)": (
        "max_array_size (fewer array tasks) or {0}.qos, or wait until earlier jobs have ended"
    ),
    r"(Assoc|QOS)\w*Wall|(Assoc|QOS)\w*Min(ute)?s": _SECTION % ("time", "time"),
    r"(Assoc|QOS)\w*(GRES|gres)": _SECTION % ("gpus", "gpus"),
    r"(Assoc|QOS)\w*(Cpu|CPU)": _SECTION % ("cpus", "cpus"),
    r"(Assoc|QOS)\w*Mem": _SECTION % ("memory", "memory"),
    r"(Assoc|QOS)\w*Node": _SECTION % ("nodes", "nodes"),
    r"job array": "max_array_size",
    r"requeue": "requeue (false leaves --requeue out)",
    r"accounting.?/?qos policy": (
        "{0}.time, gpus, nodes or qos, or the same of defaults, or max_array_size"
    ),
    r"qos": _SECTION % ("qos", "qos"),
    r"time limit|--time\b|(wall|run).?time": _SECTION % ("time", "time"),
    r"partition": _SECTION % ("partition", "partition"),
    r"feature|constraint": _SECTION % ("constraint", "constraint"),
    r"generic resource|gres|gpu|\btres\b": "{0}.gpus and gpu_type, or the same of defaults",
    r"node configuration|topology|node not available": (
        "{0}.nodes, gpus, cpus, memory or constraint, or the same of defaults"
    ),
    r"memory|--mem\b": _SECTION % ("memory", "memory"),
    r"cpu count|--cpus|processors": _SECTION % ("cpus", "cpus"),
    r"node count|--nodes\b": _SECTION % ("nodes", "nodes"),
    r"mail": _SECTION % ("mail_user", "mail_user"),
    r"wckey|reservation|licen[sc]e|burst.?buffer": "{0}.sbatch or defaults.sbatch",
    r"node name": "{0}.exclude or sbatch (nodelist), or the same of defaults",
    r"account": _SECTION % ("account", "account"),
}
# what no key mends
_NO_KEY = {
    r"access/permission denied|invalid user|user not found": (
        "No key of the cluster config mends that: ask the site's support whether your user may "
        "submit jobs from this machine."
    ),
    r"job dependency": (
        "A job that this one waits for has left the queue meanwhile: run the same command again."
    ),
    r"configuration file|incompatible version|protocol version|header lengths|insane message": (
        "This machine's Slurm client and its controller do not fit: ask the site's support."
    ),
    r"no cluster '": "SLURM_CLUSTERS of your environment names a cluster that is not there.",
}


def refusal(job: Job, message: str) -> RequestError | StageError:
    """The error for what sbatch said."""
    text = re.sub(r"^(sbatch( failed)?: (error: )?)+", "", message.strip(), flags=re.MULTILINE)
    shown = "\n  ".join(line for line in text.splitlines() if line.strip())
    if unanswered(message):
        return NoAnswer(
            f"the Slurm controller does not answer, so {job.name} was not submitted:\n  {shown}\n"
            "Nothing was lost: run the same command again when it is back."
        )
    # a site's plugin may say much before the error itself, which comes last
    final = re.findall(r"batch job submission failed: (.*)", text, re.IGNORECASE)
    limits = re.findall(r"\b(?:Assoc|QOS)(?:Max|Min|Grp)\w+", text)
    limits += re.findall(r"^(?:CPU count|Memory specification|Node count).*", text, re.MULTILINE)
    for said in (*limits, *final, *reversed(text.splitlines())):
        for words, advice in _NO_KEY.items():
            if re.search(words, said, re.IGNORECASE):
                return RequestError(f"Slurm refuses {job.name}:\n  {shown}\n{advice}")
        for words, keys in _HINTS.items():
            if re.search(words, said, re.IGNORECASE):
                return _refused(job, shown, keys)
    return RequestError(
        f"Slurm refuses {job.name}:\n  {shown}\nIf that is about what the job asks for, change it "
        f"in {job.stage} or defaults of the cluster config; else ask the site's support."
    )


def _refused(job: Job, shown: str, keys: str) -> RequestError:
    where, wait, until = keys.format(job.stage).partition(", or wait")
    change = f"Change {where} in the cluster config{wait}{until}."
    return RequestError(f"Slurm refuses {job.name}:\n  {shown}\n{change}")


# SBATCH_NAME → the option; those of one group are told by the cluster file together or not at all
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "account": {"ACCOUNT": "account"},
    "partition": {"PARTITION": "partition"},
    "qos": {"QOS": "qos"},
    "time": {"TIMELIMIT": "time"},
    "constraint": {"CONSTRAINT": "constraint"},
    "memory": {"MEM_PER_NODE": "mem", "MEM_PER_CPU": "mem-per-cpu", "MEM_PER_GPU": "mem-per-gpu"},
    "gpus": {
        "GRES": "gres",
        "GPUS": "gpus",
        "GPUS_PER_NODE": "gpus-per-node",
        "GPUS_PER_TASK": "gpus-per-task",
        "GPU_FREQ": "gpu-freq",
        "GPU_BIND": "gpu-bind",
    },
    "cpus": {"CPUS_PER_GPU": "cpus-per-gpu"},
    "reservation": {"RESERVATION": "reservation"},
    "wckey": {"WCKEY": "wckey"},
    "exclusive": {"EXCLUSIVE": "exclusive"},
    "hint": {"HINT": "hint"},
    "network": {"NETWORK": "network"},
    "switches": {"REQ_SWITCH": "switches"},
    "core-spec": {"CORE_SPEC": "core-spec", "THREAD_SPEC": "thread-spec"},
    "threads-per-core": {"THREADS_PER_CORE": "threads-per-core"},
    "acctg-freq": {"ACCTG_FREQ": "acctg-freq"},
    "profile": {"PROFILE": "profile"},
}


def user_defaults(want: Resources, environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What the cluster file leaves out and the user's shell has a default for.

    Returns:
        Option of sbatch → (value, "" for a flag; the variable that it comes from).
    """
    found = {}
    for key, names in _DEFAULTS.items():
        if getattr(want, key, None) is not None or set(names.values()) & set(want.sbatch):
            continue
        for name, option in names.items():
            value = environ.get(f"SBATCH_{name}")
            if value is not None and value.isprintable() and _usable(option, value):
                found[option] = (value, f"SBATCH_{name}")
    return found


def as_the_shell_fills_it(cluster: ClusterConfig, environ: Mapping[str, str]) -> ClusterConfig:
    """The cluster file with what its stages take from the user's shell, as far as it has a key."""
    filled = {}
    for stage in STAGES:
        taken = user_defaults(cluster.resources(stage), environ)
        own = {
            key: taken[key][0] for key in ("account", "partition", "qos", "time") if key in taken
        }
        filled[stage] = getattr(cluster, stage).model_copy(update=own)
    return cluster.model_copy(update=filled)


def _usable(option: str, value: str) -> bool:
    """A time that cannot be read would leave nobody knowing when to save."""
    if option != "time":
        return True
    try:
        minutes(value)
    except ValueError:
        return False
    return True


def of_the_shell(cluster: ClusterConfig, stage: str, environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each SBATCH_ variable: taken up for `stage`, or not."""
    taken = {
        name: (option, value)
        for option, (value, name) in user_defaults(cluster.resources(stage), environ).items()
    }
    for name in sorted(name for name in environ if name.startswith("SBATCH_")):
        if name in taken:
            option, value = taken[name]
            yield f"--{option}{f'={value}' if value else ''}: from {name} of your environment"
        elif name != "SBATCH_CLUSTERS":
            yield f"{name} of your environment is not used"
