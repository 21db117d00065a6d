"""Runs a client of Slurm: in an environment of our own, with patience, whatever bytes come back.

The user's shell and a site's modules may hold SQUEUE_, SBATCH_ and SLURM_ variables that filter
what a query shows and win over the #SBATCH lines of a script: none of them is handed on, but what
locates the cluster. `refusals.user_defaults` says which of them a submission takes up by itself.
"""

from __future__ import annotations

import grp
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.progress import plain
from yelp_hpc.rundir.modes import owner_name
from yelp_hpc.runtime import TOKENS, program

_RANKS = frozenset(
    ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
)
_LOCATES = frozenset(
    (
        *("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"),
        *("SLURM_SACK_KEY", "SLURM_SACK_JWKS"),
    )
)
_OUTER_DEVICES = frozenset(
    ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
)
"""What an allocation that one submits from was given, and no job of ours."""
_USERS = (
    *("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SACCTMGR_"),
    *("SCONTROL_", "SCANCEL_", "SINFO_", "SUBMITIT_", "PMI"),
)
# what a client says when the controller, munge or the network are at fault and not the request
_NO_ANSWER = re.compile(
    r"contact slurm controller|(socket|operation) timed out|zero bytes|backup controller"
    r"|standby mode|munge|authentication (credential|error)|resource temporarily unavailable"
    r"|communications? (connection|shutdown|error|failure)|connection (refused|reset|timed out)"
    r"|temporarily unable|create job record|message (send|receive) failure|rate limit"
    r"|controller not responding|missing socket|unable to establish (controller|connection)"
    r"|transport endpoint|no route to host|network is unreachable|broken pipe|try again later"
    r"|temporary failure in name|unknown host|slurmdbd|unexpected message|i/o error writing"
    r"|configuration source|did not answer within|cannot allocate memory|too many open files"
    r"|stale (nfs )?file handle",
    re.IGNORECASE,
)
# where a client says its own last word, which a site's banner around it must not outshout
_LAST_WORD = re.compile(
    r"(?:submission failed|slurm_\w+ error): (?!unspecified error)(.*)", re.IGNORECASE
)
_WRAPPED = re.compile(
    r"\busage:|unrecogni[sz]ed (option|argument)|(invalid|unknown|unexpected) (option|argument)",
    re.IGNORECASE,
)
PATIENCE = 30.0
"""Seconds for which a command of the user's is tried again while the controller does not answer."""


class NoAnswer(StageError):
    """The controller, or what leads to it, did not answer: nothing is known of the request."""


def client(
    argv: Sequence[str], timeout: float = 60, epoch: bool = False, patience: float = 0.0
) -> str:
    """Run a Slurm command and return what it prints.

    Args:
        epoch: times as seconds since 1970, by the controller's clock.
        patience: seconds for which it is asked again, ever more rarely, while nobody answers.

    Raises:
        RequestError: the command is not installed here.
        NoAnswer: nobody answered.
        StageError: it failed; its own message is shown.
    """
    end, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            return _once(argv, timeout, epoch)
        except NoAnswer:
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def _once(argv: Sequence[str], timeout: float, epoch: bool) -> str:
    name, *arguments = argv
    env = own_environment(os.environ)
    env["SLURM_TIME_FORMAT"] = "%s" if epoch else "standard"
    env["SLURM_BITSTR_LEN"] = "0"  # else sparse arrays are cut short
    if name != "sbatch":  # which hands it on to the job
        env["LC_ALL"] = env["LANGUAGE"] = "C"  # its messages are read
    try:
        done = subprocess.run(
            [program(name), *arguments],
            capture_output=True,
            timeout=timeout,
            check=False,
            env=env,
            stdin=subprocess.DEVNULL,
        )
    except (FileNotFoundError, PermissionError):  # the latter: a folder on PATH that is closed
        raise _absent(name) from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{name} did not answer within {timeout:.0f} s") from None
    except OSError as error:
        raise StageError(f"{program(name)} cannot be started: {error.strerror}") from None
    # an administrator's note may be in Latin-1, a banner in colours
    text, errors = (plain(part.decode(errors="replace")) for part in (done.stdout, done.stderr))
    # a site's script in its place may lose the exit code
    lost = not text.strip() and (_LAST_WORD.search(errors) or unanswered(errors))
    if done.returncode == 0 and not lost:
        return text
    said = "\n".join(part for part in (errors.strip(), text.strip()[:500]) if part)
    if unanswered(said):
        raise NoAnswer(f"{name} failed: {said}")
    raise StageError(f"{name} failed: {said}{_hint(name) if _WRAPPED.search(said) else ''}")


def _absent(name: str) -> RequestError:
    named = f" (`programs` of the cluster file calls {name} so)" if program(name) != name else ""
    return RequestError(
        f"{program(name)} is not installed on this machine{named}: log in to a node of the "
        "cluster, or use --executor local"
    )


def require_clients(programs: Iterable[str]) -> None:
    """Raises RequestError if what submits is not installed here, or a client in `programs`."""
    for name in ("sbatch", "srun", *programs):
        if name != "apptainer" and shutil.which(program(name)) is None:
            raise _absent(name)


def unanswered(said: str) -> bool:
    """Whether what a client said means that nobody answered it."""
    return any(_NO_ANSWER.search(words) for words in _LAST_WORD.findall(said) or [said])


def _hint(name: str) -> str:
    return (
        f"\nIf the site has put a script of its own in the place of {name}, name the real one: "
        f"`programs: {{{name}: PATH}}` of the cluster file."
    )


def no_client(name: str, text: str) -> StageError:
    """The error for a client that answered, but not what it was asked."""
    shown = " ".join(text.split())[:200]
    return StageError(f"{name} printed something else than was asked for: {shown}{_hint(name)}")


def own_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What a client gets: nothing that filters or chooses, no outer job, none of the Hub's tokens.

    An sbatch of ours exports it to the job.
    """
    hidden = {*TOKENS, *_RANKS, *(_OUTER_DEVICES if "SLURM_JOB_ID" in env else ())}
    kept = {
        name: value
        for name, value in env.items()
        if name in _LOCATES or not (name.startswith(_USERS) or name in hidden)
    }
    if "SBATCH_CLUSTERS" in env:
        kept.setdefault("SLURM_CLUSTERS", env["SBATCH_CLUSTERS"])
    return kept


def user_name() -> str:
    """The user as Slurm knows it: by its number, whatever USER says."""
    return owner_name(os.getuid())


def user_groups() -> tuple[str, ...]:
    """The user's groups by name, as far as this machine knows them."""
    names = []
    for number in sorted({*os.getgroups(), os.getgid()}):
        with suppress(KeyError):
            names.append(grp.getgrgid(number).gr_name)
    return tuple(names)
