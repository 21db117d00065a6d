"""What the doctor looks at in a place (host, node, image) and what it sees there.

Plain frozen data that travels as JSON: a look is handed to the node, a machine comes back.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from yelp_hpc.settings import Frozen

Place = Literal["host", "node", "image"]


class Look(Frozen):
    """What to look at."""

    place: Place = "host"
    folders: dict[str, str] = Field(default={})
    """Role (run, cache, HF_HOME, tmp) → folder to write a few small files in."""
    paths: tuple[str, ...] = ()
    """Files and folders that have to be there: image, binds, model, data."""
    python: str = ""
    """Python that has to run the jobs; "" for the one that looks."""
    hub: bool = False
    token_file: str | None = None


class Folder(Frozen):
    """A folder as a place sees it."""

    path: str
    problem: str = ""
    """Why nothing can be written there."""
    kind: str = ""
    """Its file system: ext4, nfs4, lustre, tmpfs …"""
    source: str = ""
    free: int = 0
    """Bytes."""
    inodes: int | None = None
    """Free ones; None where the file system does not count them."""
    milliseconds: float = 0.0
    """Median of writing, flushing and renaming a small file."""
    torn: int = 0
    """How often a reader saw a file missing or half while it was replaced."""
    locks: bool = True


class Quota(Frozen):
    """A line of `quota`, in kB."""

    source: str
    used: int
    limit: int


class Driver(Frozen):
    """What nvidia-smi says."""

    version: str = ""
    cuda: str = ""
    gpus: tuple[str, ...] = ()


class Hub(Frozen):
    """The Hub as a place reaches it. The token itself is never here."""

    endpoint: str
    offline: bool = False
    problem: str = ""
    """Why it cannot be reached."""
    token: str = ""
    """Where a token was found."""
    token_problem: str = ""
    token_path: str = ""
    token_mode: int = 0o600
    accepted: bool | None = None
    """Whether the Hub knows the token; None: not asked."""


class Machine(Frozen):
    """A place."""

    place: Place
    name: str
    python: str
    python_problem: str = ""
    packages: dict[str, str] = Field(default={})
    lock: str = ""
    """Text of the lock that the packages should be of."""
    apptainer: str | None = None
    root: bool = False
    user_namespaces: bool = True
    starter_suid: bool = False
    driver: Driver | None = None
    folders: dict[str, Folder] = Field(default={})
    seen: dict[str, str] = Field(default={})
    """Path → folder, file, missing or unreadable."""
    quotas: tuple[Quota, ...] = ()
    hub: Hub | None = None
    home_packages: tuple[str, ...] = ()
    """Folders of sys.path below the home: packages that no lock knows of."""


class AllReduce(Frozen):
    """A sum over ranks."""

    problem: str = ""
    backend: str = ""
    ranks: int = 0
    devices: tuple[str, ...] = ()
    torch: str = ""
    cuda: str | None = None
    """CUDA that torch was built with."""
    correct: bool = False
    gb_per_s: float = 0.0
    """Bytes of one rank's tensor over the time of a sum."""


class Image(Frozen):
    """The image file."""

    path: str
    problem: str = ""
    sha256: str = ""
    labels: dict[str, str] = Field(default={})
    """version, git-sha, lock, lock-sha256; {} where apptainer cannot be asked."""


class NodeReport(Frozen):
    """What the job on the node wrote."""

    machine: Machine
    sent: float
    """The node's clock when it said that it was there …"""
    answered: float | None
    """… and when it saw the host's answer; None: it never did."""
    inside: Machine | None = None
    inside_problem: str = ""
    allreduce: AllReduce


class NodeVisit(Frozen):
    """The job on the node as the host sees it."""

    job: str = ""
    problem: str = ""
    log: str = ""
    """Its last lines."""
    report: NodeReport | None = None
    answered: float = 0.0
    """The host's clock when it answered the node."""
    torn: int = 0
    """How often the host saw a file missing or half that the node was replacing."""
    requeue: bool | None = None
    """Whether Slurm would requeue the job; None: not known."""
