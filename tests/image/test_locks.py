"""Every package of both locks has a wheel for the image: pip is asked, nothing is fetched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from yelp_hpc.image.build import wheel_choice
from yelp_hpc.own_files import SHARE

# pip's own search, as `pip download` does it before it fetches; it has no command for that alone.
SEARCH = """
import hashlib, json, sys
from pip._internal.cli.cmdoptions import make_target_python
from pip._internal.commands.download import DownloadCommand
from pip._internal.utils.hashes import Hashes
from pip._vendor.packaging.specifiers import SpecifierSet

flags, wanted = json.loads(sys.stdin.read())
command = DownloadCommand("download", "")
options, _ = command.parse_args(flags)
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(
        options=options, session=session, target_python=make_target_python(options),
        ignore_requires_python=True,
    )
    for name, version, hashes in wanted:
        best = finder.find_best_candidate(
            name, SpecifierSet(f"=={version}"), Hashes({"sha256": hashes})
        ).best_candidate
        found = best is not None and best.link.is_hash_allowed(Hashes({"sha256": hashes}))
        if best is not None and best.link.is_file:  # a folder of wheels names no hashes
            with open(best.link.file_path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest() in hashes
        if not found:
            print(f"{name}=={version}: {best and best.link.filename}")
"""


def entries(lock: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and hashes of each package."""
    for block in re.split(r"(?m)^(?=[A-Za-z0-9])", lock.read_text(encoding="utf-8")):
        if found := re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([^\s\\]+)", block):
            yield found[1], found[2], re.findall(r"sha256:([0-9a-f]{64})", block)


# one of them was just installed, as a rule the first
@pytest.mark.parametrize("name", ["cuda.lock", pytest.param("cpu.lock", marks=pytest.mark.slow)])
def test_pip_finds_a_wheel_for_every_entry(name: str) -> None:
    wanted = list(entries(SHARE / "containers" / name))
    assert len(wanted) > 60
    done = subprocess.run(
        [sys.executable, "-c", SEARCH],
        input=json.dumps([["--no-deps", *wheel_choice("3.11")], wanted]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
