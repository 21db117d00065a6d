"""The logs of a run: which one to read first, and its end."""

from __future__ import annotations

from pathlib import Path

from yelp_hpc.errors import RequestError
from yelp_hpc.progress import plain
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.paths import RunPaths


def find_logs(run_dir: str | Path, stage: str | None = None) -> list[Path]:
    """Logs of a run, the one to read first: the last failure's, then the newest.

    Raises:
        RequestError: there is no log yet.
    """
    paths = RunPaths(Path(run_dir).absolute())
    known = {path for path in paths.logs.glob("*.log") if path.is_file() and not path.is_symlink()}
    if stage:
        known = {path for path in known if path.stem.partition("-")[0] == stage}
    if not known:
        what = f"{stage} has" if stage else "the run has"
        raise RequestError(f"{what} no log yet in {paths.logs}")
    names = sorted(paths.attempts.iterdir()) if paths.attempts.is_dir() else []
    last: dict[Path, attempts.Attempt] = {}
    for folder in names:
        for attempt in attempts.read(paths, folder.name):
            last[paths.stage_log(folder.name, attempt.task)] = attempt
    failed = {path: a.ended or 0.0 for path, a in last.items() if a.verdict == "failed"}
    return sorted(
        known,
        key=lambda path: (failed.get(path, 0.0), path.stat().st_mtime),
        reverse=True,
    )


def show_logs(run_dir: str | Path, stage: str | None = None, lines: int = 40) -> None:
    """Print the end of the log to read first and name the others."""
    first, *others = find_logs(run_dir, stage)
    print(f"==> {first} <==")
    print("\n".join(plain(first.read_text(errors="replace")).splitlines()[-lines:]))
    if others:
        print(f"also: {', '.join(path.name for path in others[:8])}")
