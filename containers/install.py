"""Install what a lock names into the environment that runs this: `python containers/install.py`.

The CPU set, or the GPU set where no index offers the CPU build of torch that the lock names. Every
file is checked against the lock's hashes, the build backend of this project among them; a file that
is not what the lock names ends it with pip's own words, and nothing else is tried. This project is
then built by that backend without asking the network.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]


def main() -> int:
    """Install a lock, then this project; returns pip's exit code."""
    cpu, cuda = HERE / "cpu.lock", HERE / "cuda.lock"
    code, said = _install(cpu)
    if code and no_cpu_build(said, cuda.read_text(encoding="utf-8")):
        print("no index offers the CPU build of torch: the GPU set is installed", file=sys.stderr)
        code, said = _install(cuda)
    if code:
        print(said, file=sys.stderr, end="")
        return code
    own = ["--no-deps", "--no-index", "--no-build-isolation", "--editable", str(HERE.parent)]
    return subprocess.run([*PIP, *own], check=False).returncode


def _install(lock: Path) -> tuple[int, str]:
    argv = [*PIP, "--require-hashes", "--requirement", str(lock)]
    done = subprocess.run(argv, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def no_cpu_build(said: str, cuda_lock: str) -> bool:
    """Whether pip failed because of torch alone, and because the indexes hold PyPI's build of it.

    An index that has no torch of that version says so; one that has PyPI's offers a file whose hash
    is in the GPU set's lock. Any other hash is a mismatch.
    """
    if re.search(r"No matching distribution found for torch==", said):
        return True
    mismatched = re.findall(r"^ +([A-Za-z0-9._-]+)(?:\[[^]]*\])?==\S+ from ", said, re.MULTILINE)
    got = re.findall(r"\bGot +([0-9a-f]{64})", said)
    torch = re.search(r"^torch==(?:.*\\\n)+.*$", cuda_lock, re.MULTILINE)
    known = re.findall(r"sha256:([0-9a-f]{64})", torch[0]) if torch else []
    return mismatched == ["torch"] and len(got) == 1 and got[0] in known


if __name__ == "__main__":
    sys.exit(main())
