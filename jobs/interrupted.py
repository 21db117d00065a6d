"""Jobs that a submission queued before it was killed, and what else it left behind.

Between sbatch's answer and the record in RUN/submissions.jsonl lie submitit's own files in
RUN/logs/slurm: `ID_submission.sh` when it had the answer, `.submission_file_UUID.sh` when it had
not. Such jobs are recorded here, so that `status` shows them, `cancel` ends them and nothing is
submitted twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from yelp_hpc.errors import YelpHpcError
from yelp_hpc.jobs.slurm import client
from yelp_hpc.jobs.submission import records
from yelp_hpc.rundir.files import append_jsonl, remove
from yelp_hpc.rundir.paths import STAGES, RunPaths

_NAME = re.compile(r"^#SBATCH --job-name=[\"']?(yelp-([\w-]+):[^\"'\n]*)", re.MULTILINE)
_PICKLE = re.compile(r"[0-9a-f]{32}\.pkl")


def record_interrupted(paths: RunPaths) -> list[str]:
    """Record every job of a killed submission that has no record; returns their ids.

    To be called by who holds the lock of submissions, or ends jobs. Jobs whose submission was
    killed before sbatch had answered are asked of Slurm; where it does not answer, the next call
    asks again.

    Raises:
        StageError: a record cannot be written.
    """
    folder = paths.logs / "slurm"
    known = {line["job"] for line in records(paths)}
    found: dict[str, str] = {}
    for script in folder.glob("[0-9]*_submission.sh"):
        job = script.name.partition("_")[0]
        if job not in known and (match := _NAME.search(_text(script))):
            found[job] = match[2]
    unanswered = [path for path in folder.glob(".submission_file_*.sh") if not path.is_symlink()]
    asked = []
    for script in unanswered:
        try:
            found |= {job: name for job, name in _queued(script, folder) if job not in known}
            asked.append(script)
        except YelpHpcError:
            continue
    for job, name in found.items():
        append_jsonl(
            paths.submissions,
            {
                "time": time.time(),
                "name": name,
                "stage": next((s for s in STAGES if name.partition("-")[0] == s), name),
                "job": job,
                "executor": "slurm",
                "tasks": [],
                "command": "(its submission was interrupted)",
            },
        )
    for script in asked:
        remove(script)
    return sorted(found)


def sweep_pickles(paths: RunPaths) -> None:
    """Remove the calls of killed submissions; to be called by who holds the lock of submissions."""
    for path in (paths.logs / "slurm").glob("*.pkl"):
        if _PICKLE.fullmatch(path.name):
            remove(path)


def _queued(script: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Job id and name of what Slurm holds under a script's name, writing into this folder."""
    match = _NAME.search(_text(script))
    if match is None:
        return
    argv = ["squeue", "--noheader", "--me", f"--name={match[1]}"]
    for line in client([*argv, "--Format=ArrayJobID:|,STDOUT:|"]).splitlines():
        job, _, output = (cell.strip() for cell in line.partition("|"))
        if job.isdigit() and Path(output.rstrip("|").strip()).parent == folder:
            yield job, match[2]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
