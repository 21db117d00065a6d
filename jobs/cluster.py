"""The cluster's side of a run: resources of each stage, the container, requeue limits.

Reads configs/clusters/*.yaml into one frozen object; unknown keys and wrong values are reported all
at once. The object is stored as JSON beside the run's logs, where the supervisor reads it again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from yelp_hpc.cache import cache_folder
from yelp_hpc.config import Config
from yelp_hpc.explain import dotted_keys
from yelp_hpc.jobs.site.client import user_name
from yelp_hpc.own_files import expanded, shipped
from yelp_hpc.rundir.paths import STAGES
from yelp_hpc.runtime import TOKENS
from yelp_hpc.settings import MOST, Section, read_settings
from yelp_hpc.synonyms import CLUSTER, CONFIG, SBATCH, SHORT


def _expanded(value: str) -> str:
    # as a shell would; what it cannot know is no part of a name
    if "\\$" in value:
        raise ValueError("has a `$` that names no variable")
    known = {"USER": user_name(), **os.environ}
    for name in sorted(re.findall(r"\$\{?(\w+)\}?", value), key=len, reverse=True):
        if not known.get(name):
            raise ValueError(f"${name} is not set here")
        for written in (f"${{{name}}}", f"${name}"):
            value = value.replace(written, known[name])
    if "$" in value or "`" in value:
        raise ValueError("holds more of a shell than `~` and variables, which nobody runs here")
    return expanded(value)


def _expanded_bind(value: str) -> str:
    if not value.partition(":")[0].strip():
        raise ValueError("names no folder; write SOURCE[:TARGET[:ro]]")
    return ":".join(_expanded(part) for part in value.split(":"))


def _absolute(value: str) -> str:
    if "://" in value:
        raise ValueError(f"must be a file or a folder here; `apptainer pull FILE.sif {value}`")
    if value[0] in "'\"":
        raise ValueError("stands in quotes twice: one pair is a part of the name")
    if found := re.search(r"%[jJAaNnstux]\b", value):
        raise ValueError(f"holds {found[0]}, which Slurm fills in for the outputs of jobs alone")
    # the job starts in another folder
    return str(Path(_expanded(value)).absolute())


def _bindable(value: str) -> str:
    if set(value) & set(":,"):
        raise ValueError("must not hold `:` or `,`, which separate binds")
    return value


def _no_token(value: str) -> str:
    if value in TOKENS:
        raise ValueError("the Hub's token is handed to publish alone, by itself")
    return value


def _nodes(value: Any) -> int | str | None:
    if value is None:
        return None
    least, range_, most = str(value).partition("-")
    most = most if range_ else least
    if not (str(value).isascii() and least.isdecimal() and most.isdecimal()) or int(least) < 1:
        raise ValueError("must be a number of nodes, or the least and the most of them as in 1-4")
    if int(most) < int(least):
        raise ValueError(f"must not be at most {most} where it is at least {least}")
    return int(least) if int(most) == int(least) else f"{int(least)}-{int(most)}"


LocalPath = Annotated[str, AfterValidator(_absolute)]
Expanded = Annotated[str, AfterValidator(_expanded)]
_PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel", "sacct", "sacctmgr", "apptainer")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# what the launchers set themselves: a second value in `sbatch:` would silently win over it
_RESERVED = frozenset(
    {
        *("array", "dependency", "error", "export", "export-file", "job-name", "ntasks"),
        *("kill-on-invalid-dep", "ntasks-per-gpu", "ntasks-per-node", "open-mode", "output"),
        *("parsable", "quiet", "requeue", "no-requeue", "signal", "test-only", "wait", "wrap"),
    }
)
# our key → options that say the same in another way, which sbatch or we take instead of it
_INSTEAD = {
    "memory": ("mem-per-cpu", "mem-per-gpu"),
    "gpus": ("gpus-per-task", "gpus-per-socket", "tres-per-task"),
    "cpus": ("cpus-per-gpu",),
}


DEFAULT_TIME = "60"
"""The time limit where neither the cluster file nor the user's SBATCH_ variables name one."""


def minutes(text: str) -> int:
    """Minutes of a Slurm time: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError("write it as minutes, H:M:S or D-H:M:S")
    days, *rest = (int(part) if part else 0 for part in match.groups())
    count = sum(part is not None for part in match.groups()[1:])
    if match[1] is not None or count == 3:
        hours, mins, seconds = rest
    else:
        hours, mins, seconds = 0, rest[0], rest[1]
    return max(1, days * 1440 + hours * 60 + mins + (1 if seconds else 0))


def time_text(count: int) -> str:
    """Minutes as Slurm writes them: `D-HH:MM:00` or `H:MM:00`."""
    days, rest = divmod(count, 1440)
    text = f"{rest // 60:02d}:{rest % 60:02d}:00"
    return f"{days}-{text}" if days else text.removeprefix("0")


class Resources(Section):
    """What one job of a stage asks of Slurm. In a stage's section a null takes the default."""

    partition: str | None = Field(default=None, description="as in `sinfo`")
    account: str | None = Field(default=None, description="whom Slurm charges")
    qos: str | None = Field(default=None, description="quality of service")
    gpu_type: str | None = Field(default=None, description="type in --gres=gpu:TYPE:N; null: any")
    gpus: int | None = Field(default=None, ge=0, description="GPUs a node")
    nodes: Annotated[int | str | None, BeforeValidator(_nodes)] = Field(
        default=None, description="nodes of one job; 1-4: as many of them as the queue gives"
    )
    cpus: int | None = Field(default=None, ge=1, description="CPUs a node")
    memory: Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")] | None = Field(
        default=None, description="memory a node: a number and K, M, G or T, as 64G"
    )
    time: str | None = Field(default=None, description="time limit of a job, which is requeued")
    constraint: str | None = Field(default=None, description="features that a node must have")
    exclude: str | None = Field(default=None, description="nodes not to run on")
    mail_user: str | None = Field(default=None, description="whom Slurm writes to")
    mail_type: str | None = Field(default=None, description="when; null: FAIL")
    save_seconds: int | None = Field(
        default=None,
        ge=10,
        description="seconds before the limit to save at; null: 120, at most half of it",
    )
    sbatch: dict[str, Expanded] = Field(default={}, description="other sbatch options: value or ''")

    @property
    def has_gpus(self) -> bool:
        """Whether a job asks for GPUs, in any way."""
        return bool(self.gpus) or bool({*_INSTEAD["gpus"]} & {*self.sbatch})

    @property
    def least_nodes(self) -> int:
        """Nodes that one job has at least."""
        return int(str(self.nodes or 1).partition("-")[0])

    @property
    def save(self) -> int:
        """Seconds before the time limit at which a stage is told to save."""
        return self.save_seconds or min(120, self.seconds // 2)

    @property
    def seconds(self) -> int:
        """The time limit."""
        return 60 * minutes(self.time or DEFAULT_TIME)

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, value: Any) -> Any:
        # 64GB, 64GiB and 64g are all Slurm's 64G
        if type(value) in (int, float):
            raise ValueError("say the unit, as in 64G: Slurm reads a bare number as megabytes")
        found = re.fullmatch(r"([0-9]+)([KMGT])(?:i?B)?", str(value), re.IGNORECASE)
        return f"{found[1]}{found[2].upper()}" if found else value

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            return value
        if minutes(str(value)) > MOST:
            raise ValueError("is more than Slurm can count")
        if not re.search("[1-9]", str(value)):
            raise ValueError("0 is no limit to Slurm, and a job saves before its limit: name one")
        return str(value)

    @field_validator("sbatch", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        named = value.items() if isinstance(value, dict) else ()
        wrong = [text for name, given in named if (text := cls._no_option(str(name), given))]
        if wrong:
            raise ValueError("; ".join(wrong))
        return value

    @classmethod
    def _no_option(cls, name: str, value: Any) -> str | None:
        """Why an option cannot stand in `sbatch:`, however it is spelt; None when it can."""
        bare = name.lstrip("-")
        option = SHORT.get(bare, bare.lower().replace("_", "-"))
        keys = {synonym: key for synonym, key in CLUSTER.items() if key in cls.model_fields}
        keys |= {key: key for key in cls.model_fields if key not in ("sbatch", "gpu_type")}
        known = sorted({*_RESERVED, *(key.replace("_", "-") for key in keys)})
        if option not in known and len(option) > 1:  # sbatch takes a name's beginning for it
            option = next((one for one in known if one.startswith(option)), option)
        key = keys.get(option.replace("-", "_"))
        if option == "gres" and not re.search(r"(^|,|/)gpu\b", str(value)):
            key = None
        if key:
            dashes = " (and no option with dashes in front)" if bare != name else ""
            return f"option {name} is the key {key}: write `{key}: VALUE` beside `sbatch:`{dashes}"
        if option in _RESERVED:
            return f"option {name} is set by the launchers and cannot be given here"
        if name != option or not _OPTION.fullmatch(name) or len(name) == 1:
            meant = f", as {option}" if _OPTION.fullmatch(option) and len(option) > 1 else ""
            return f"{name!r} is no sbatch option; write it in full, without dashes in front{meant}"
        return None


class Container(Section):
    """The Apptainer image that stages run in."""

    image: LocalPath = Field(description="the .sif file, on a file system that all nodes see")
    binds: tuple[Annotated[str, AfterValidator(_expanded_bind)], ...] = Field(
        default=(), description="SOURCE[:TARGET[:ro]] besides run, cache, model and data"
    )
    env: tuple[
        Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_no_token)], ...
    ] = Field(default=(), description="names of host variables that are handed in")
    nv: bool = Field(default=False, description="hand the NVIDIA driver in")
    cache: Annotated[LocalPath, AfterValidator(_bindable)] = Field(
        default=None,  # type: ignore[assignment]
        description="folder with room that all nodes see, for what stages download and compile; "
        "null: YELP_HPC_CACHE or ~/.cache/yelp_hpc",
    )
    node_disk: str | None = Field(
        default=None, description="folder on a node's disk that gets a copy of the image, once"
    )
    extra_args: tuple[Expanded, ...] = Field(default=(), description="further arguments of exec")

    @field_validator("cache", mode="before")
    @classmethod
    def _cache(cls, value: Any) -> Any:
        return str(cache_folder()) if value is None else value


class ClusterConfig(Section):
    """Where and how the jobs of a run are run."""

    synonyms: ClassVar[Mapping[str, str]] = CLUSTER
    elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            {part for key in (*dotted_keys(Config), *CONFIG) for part in key.split(".")},
            "it belongs into a config, which --config names",
        ),
        **dict.fromkeys(
            ("slurm", "sbatch_options", "resources", "all", "default"),
            "resources stand under `defaults:`, or under a stage's name",
        ),
        **{
            name.replace("-", "_"): f"give it as an option of sbatch, `sbatch: {{{name}: VALUE}}`"
            for name in SBATCH
        },
        **{
            name.replace("-", "_"): "the launchers set it themselves; leave it out"
            for name in _RESERVED
        },
    }

    defaults: Resources = Resources()
    prepare: Resources = Resources()
    train: Resources = Resources()
    infer: Resources = Resources()
    collect: Resources = Resources()
    publish: Resources = Resources()
    container: Container | None = Field(default=None, description="null: the host's Python")
    python: Expanded | None = Field(default=None, description="host's; null: the submitting one")
    command: tuple[Expanded, ...] | None = Field(
        default=None, description="what runs a stage on the host; null: PYTHON -m yelp_hpc run"
    )
    setup: tuple[str, ...] = Field(default=(), description="shell lines first: module load …")
    array_parallelism: int = Field(default=16, ge=1, description="array tasks that run at once")
    max_array_size: int = Field(default=1001, ge=2, description="the site's MaxArraySize")
    requeue_cap: int = Field(default=5, ge=1, description="idle restarts before giving up")
    requeue: bool = Field(
        default=True,
        description="false where Slurm refuses --requeue: a stage that meets its limit saves and "
        "waits for the next `submit`",
    )
    programs: dict[str, Expanded] = Field(
        default={}, description="other names of programs, e.g. {squeue: /usr/bin/squeue.real}"
    )

    @field_validator("programs")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        for name, program in value.items():
            if not program.strip():
                raise ValueError(f"{name} has no name; leave it out, or name a program")
            if name not in _PROGRAMS:
                raise ValueError(f"{name} is none of {', '.join(_PROGRAMS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if self.container and self.command:
            raise ValueError("give container or command, not both")
        wrong = {
            f"{key} and sbatch.{option} say the same: leave one out (in {stage}, or in defaults)"
            for stage in STAGES
            for key, options in _INSTEAD.items()
            for option in {*options} & {*self.resources(stage).sbatch}
            if getattr(self.resources(stage), key)
        }
        late: dict[str, list[str]] = {}
        for stage in STAGES:
            want = self.resources(stage)
            if want.save >= want.seconds:
                text = f"save_seconds {want.save} is all of the time limit, {want.seconds} s"
                late.setdefault(text, []).append(stage)
        for text, stages in late.items():
            own = f"{', '.join(stages)}, or " if len(stages) < len(STAGES) else ""
            wrong.add(f"{text}: raise time, or lower save_seconds (in {own}defaults)")
        if wrong:
            raise ValueError("; ".join(sorted(wrong)))
        return self

    def resources(self, stage: str) -> Resources:
        """The resources of `stage`: its own values over the defaults."""
        own: Resources = getattr(self, stage)
        merged = self.defaults.model_dump(exclude_none=True) | own.model_dump(exclude_none=True)
        merged["sbatch"] = {**self.defaults.sbatch, **own.sbatch}
        return Resources.model_validate(merged)


def load_cluster(path: str | Path | None, overrides: tuple[str, ...] = ()) -> ClusterConfig:
    """Read a cluster file; without one everything has its default.

    Raises:
        RequestError: the file cannot be used; all problems are in the one message.
    """
    if path is None:
        return ClusterConfig()
    cluster, _, _ = read_settings(ClusterConfig, shipped(path), overrides)
    return cluster


assert set(STAGES) <= set(ClusterConfig.model_fields)
