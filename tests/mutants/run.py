"""Do the tests notice? `python tests/mutants/run.py [--count 300] [--seed 0]`, or `make mutants`.

Changes the pure rooms one place at a time (mutmut; what and which tests: `[tool.mutmut]` in
pyproject.toml), draws `count` of the mutants and runs, of each, the tests that reach the changed
function. Works in build/mutants, where links of the repository are copies; changes nothing else.
Ends with 1 if fewer than 92 % were noticed, or if one lived that `survivors.md` beside this file
does not explain.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
NEEDED = 0.92
NOTICED = (1, 3, 24, 36, 152, 255, -24, -11, -9)
"""Exit codes that mutmut keeps: a test failed, could not run, or did not end in time."""
ACTING = (
    "status.x_show_status__",
    "status.x__screen__",
    "slurm.x_elsewhere__",
    "slurm.x_exclude__",
)
"""What asks, prints or waits in these files; tests/cluster and test_local_chain.py look at it."""


def main() -> int:
    """Draw, run, count; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="of the mutants' names, as the shell matches")
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, WORK, ignore=skipped)
    mutate("yelp_hpc.rundir.paths*")  # makes the mutants of every room
    names = [name for name in results() if fnmatch(name, options.only)]
    names = [name for name in names if not any(part in name for part in ACTING)]
    # by a hash, so that a change of the program changes little of what is drawn
    order = sorted(names, key=lambda name: sha256(f"{options.seed}/{name}".encode()).digest())
    drawn = sorted(order[: options.count])
    mutate(*drawn)
    codes = results()
    lived = [name for name in drawn if codes[name] not in NOTICED]
    print(f"{len(drawn)} of {len(names)} mutants, {len(drawn) - len(lived)} noticed")
    explained = Path(__file__).with_name("survivors.md").read_text(encoding="utf-8")
    unexplained = [name for name in lived if f"`{place(name)}`" not in explained]
    for name in lived:
        print(f"\n{name}{'' if name in unexplained else ' (explained)'}")
        print(shown(name))
    return int(len(lived) > (1 - NEEDED) * len(drawn) or bool(unexplained))


def mutate(*names: str) -> None:
    """Run mutmut on these mutants; it ends with an error only where no test can run at all."""
    subprocess.run([sys.executable, "-m", "mutmut", "run", *names], cwd=WORK, check=True)


def results() -> dict[str, int | None]:
    """Exit code of each mutant's tests, None where it was not tried."""
    found: dict[str, int | None] = {}
    for path in (WORK / "mutants").rglob("*.py.meta"):
        found |= json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    return dict(sorted(found.items()))


def place(name: str) -> str:
    """The function of a mutant, as survivors.md names it."""
    return re.sub(r"\.x_?(?:ǁ\w+ǁ)?(\w+)__mutmut_\d+$", r".\1", name)


def shown(name: str) -> str:
    """What was changed, as a diff."""
    argv = [sys.executable, "-m", "mutmut", "show", name]
    done = subprocess.run(argv, cwd=WORK, capture_output=True, text=True, check=False)
    lines = [
        line for line in done.stdout.splitlines() if line[:1] in "+-" and line[1:2] not in "+-"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
