"""metrics.json and report.html as one result: the page names the metrics that it shows.

collect writes the page first and the metrics last. When it was killed in between, the page's last
line names other metrics than those that are there, so that nobody takes the pair for finished.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import json_bytes, sha256_file, write_bytes
from yelp_hpc.rundir.paths import RunPaths

_SIGN = re.compile(rb"<!-- of metrics\.json sha256:([0-9a-f]{64}) -->\s*$")
_OWN = re.compile(rb"<!-- what stands above sha256:([0-9a-f]{64}) -->\n")
_END = 200  # bytes of a page that hold its last line


def write_collected(paths: RunPaths, metrics: object, page: str) -> None:
    """Write report.html, then metrics.json.

    Raises:
        StageError: as `write_bytes` does; it says what was not written.
    """
    content = json_bytes(metrics)
    shown = f"{page.rstrip()}\n".encode()
    own = f"<!-- what stands above sha256:{hashlib.sha256(shown).hexdigest()} -->\n"
    sign = f"<!-- of metrics.json sha256:{hashlib.sha256(content).hexdigest()} -->\n"
    try:
        write_bytes(paths.report, shown + own.encode() + sign.encode())
        write_bytes(paths.metrics, content)
    except StageError as error:
        raise StageError(f"metrics.json and report.html were not written: {error}") from error


def collected(paths: RunPaths) -> bool:
    """Whether both are there and belong together; pages without a sign are taken at their word."""
    with suppress(OSError):
        with paths.report.open("rb") as file:
            file.seek(max(0, paths.report.stat().st_size - _END))
            sign = _SIGN.search(file.read())
        return paths.metrics.is_file() and (
            sign is None or sign[1].decode() == sha256_file(paths.metrics)
        )
    return False


def altered_report(paths: RunPaths) -> str:
    """What is wrong with report.html beside metrics.json, "" if nothing is.

    Of a page that says no hash of its own, which an earlier version wrote, the metrics alone.
    """
    if not paths.report.is_file():
        return "is missing"
    if not collected(paths):
        return "shows other metrics than metrics.json holds"
    page = paths.report.read_bytes()
    own = _OWN.search(page)
    whole = own is None or hashlib.sha256(page[: own.start()]).hexdigest() == own[1].decode()
    return "" if whole else "was altered since it was written"


@contextmanager
def as_written(path: Path, remedy: str) -> Iterator[None]:
    """While the content of `path` is read: another shape than the one that is written is an error.

    Raises:
        StageError: what is looked for is not there, or is of another kind; it ends with `remedy`.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        what = " ".join(str(error).split())[:100]
        raise StageError(
            f"{path} does not hold what yelp_hpc writes ({type(error).__name__}: {what}); {remedy}"
        ) from None
