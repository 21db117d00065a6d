"""Every write, fsync, rename, link and removal made to fail or to be the last one.

    nice python benchmarks/faults.py                       # 2,000 injections
    python benchmarks/faults.py --injections 300 --seed 2 --only append_jsonl,submit

Needs a C compiler. Each injection is a process of its own in which one file operation of a unit
fails (ENOSPC, EIO, EDQUOT, that or all from there on), takes half (short write) or is the last one
(SIGKILL before, in the middle, after). Then the same is asked for again, as a user would, and what
is there is compared with what an undisturbed run leaves, to the byte. Small units are struck at
every operation in every way, stages at operations drawn by the seed.

Prints a line a unit and a total: injections, lost records, wrong bytes, leftovers, tracebacks. Ends
with 1 if there is any of the last four.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TOP), str(TOP / "tests")]

LIMIT = 180.0
"""Seconds after which an injected process counts as hung."""
Way = tuple[str, int]
WAYS: tuple[Way, ...] = (
    *(("E", number) for number in (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
    *(("P", errno.ENOSPC), ("S", 0), ("T", 0), ("K", 0), ("R", 0)),
)
WORDS = {
    "E": "failed",
    "P": "failed from there on",
    "S": "took half",
    "T": "took half and was the last",
    "K": "was not begun by a killed process",
    "R": "was the last",
}
WRITES = ("write", "pwrite")
Files = dict[str, bytes]


@dataclass(frozen=True)
class Unit:
    """Something that writes files, and what must hold after it was struck and asked for again."""

    name: str
    before: Callable[[Path], None]
    """Makes the folder that it starts from."""
    act: Callable[[Path], None]
    again: Callable[[Path], None] | None = None
    """What a user does afterwards; None: the same."""
    content: Callable[[Path], Files] | None = None
    """What is compared with the undisturbed outcome; None: every file's bytes."""
    lost: Callable[[Path, bool], int] = lambda folder, done: 0
    """Records that are gone, given whether the struck process said that it was done."""
    small: bool = True
    reset: Callable[[], None] = lambda: None
    """Undoes what an earlier injection left outside of the folder."""


@dataclass
class Tally:
    """What one unit's injections came to."""

    injections: int = 0
    lost: int = 0
    wrong: int = 0
    leftovers: int = 0
    tracebacks: int = 0
    notes: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        for name in ("injections", "lost", "wrong", "leftovers", "tracebacks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.notes += other.notes
        self.kinds += other.kinds

    @property
    def faultless(self) -> bool:
        """Whether nothing was lost, wrong, left or thrown."""
        return not (self.lost or self.wrong or self.leftovers or self.tracebacks)

    def line(self, name: str, operations: int | str) -> str:
        """One line of the table."""
        return (
            f"{name:<14} {operations:>10} {self.injections:>10} {self.lost:>5} {self.wrong:>6} "
            f"{self.leftovers:>9} {self.tracebacks:>10}"
        )


HEAD = f"{'unit':<14} {'operations':>10} {'injections':>10} {'lost':>5} {'wrong':>6} "
HEAD += f"{'leftovers':>9} {'tracebacks':>10}"


def files_of(folder: Path) -> Files:
    """Every file below `folder` by its name; locks are left out, for they stay by design."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _child(work: Callable[[], None]) -> tuple[int, str]:
    """Run `work` in a forked process: 0 done, 1 one message, 3 a traceback, negative a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                code = _outcome(work)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        status = _wait(pid)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")


def _outcome(work: Callable[[], None]) -> int:
    from yelp_hpc.errors import YelpHpcError

    try:
        work()
    except YelpHpcError as error:
        print(error)
        return 1
    except SystemExit as error:
        return 1 if error.code else 0
    return 0


def _wait(pid: int) -> int:
    end = time.monotonic() + LIMIT
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(pid, signal.SIGALRM)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.002)


def _armed(folder: Path, number: int, way: Way, trace: int, act: Callable[[Path], None]) -> None:
    library = ctypes.CDLL(None)
    library.fault_arm(
        ctypes.c_long(number),
        ctypes.c_char(way[0].encode()),
        ctypes.c_int(way[1]),
        ctypes.c_char_p(f"{folder}/".encode()),
        ctypes.c_int(trace),
    )
    try:
        act(folder)
    finally:
        library.fault_arm(
            ctypes.c_long(0), ctypes.c_char(b"E"), 0, ctypes.c_char_p(b"\xff"), ctypes.c_int(-1)
        )


class Injector:
    """Strikes one unit, in a folder of its own; see `run`."""

    def __init__(self, unit: Unit, top: Path) -> None:
        self.unit, self.top = unit, top / unit.name
        self.work, self.template = self.top / "run", self.top / "template"
        self.top.mkdir(parents=True)
        self._must(lambda: unit.before(self.template))
        self.template.mkdir(exist_ok=True)
        self.operations = self._trace()
        self.expected = self._content()

    def _must(self, work: Callable[[], None]) -> None:
        code, said = _child(work)
        if code:
            raise SystemExit(f"{self.unit.name} cannot be set up ({code}):\n{said[-3000:]}")

    def _fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.template, self.work, symlinks=True)
        self.unit.reset()

    def _trace(self) -> list[str]:
        """The operations of an undisturbed run, in their order; leaves what a second one leaves."""
        self._fresh()
        with tempfile.TemporaryFile() as file:
            trace = file.fileno()
            self._must(lambda: _armed(self.work, 0, ("E", 0), trace, self.unit.act))
            self._must(lambda: (self.unit.again or self.unit.act)(self.work))
            file.seek(0)
            return [line.split(" ")[0] for line in file.read().decode().splitlines()]

    def _content(self) -> Files:
        found: Files = {}
        with tempfile.TemporaryDirectory() as scratch:

            def write() -> None:
                content = (self.unit.content or files_of)(self.work)
                for number, (name, value) in enumerate(sorted(content.items())):
                    Path(scratch, f"{number}.name").write_text(name)
                    Path(scratch, f"{number}.value").write_bytes(value)

            code, said = _child(write)  # a reader may start threads: never in this process
            if code:
                return {"cannot be read": said.encode()}
            for path in Path(scratch).glob("*.name"):
                found[path.read_text()] = path.with_suffix(".value").read_bytes()
        return found

    def ways(self) -> Iterator[tuple[int, Way]]:
        """Every operation in every way that differs for it."""
        for number, operation in enumerate(self.operations, 1):
            for way in WAYS:
                if way[0] not in "ST" or operation in WRITES:
                    yield number, way

    def strike(self, number: int, way: Way) -> Tally:
        """One injection, and what it came to."""
        unit, tally = self.unit, Tally(1)
        where = f"{unit.name} {self.operations[number - 1]} {number} {way[0]}"
        where += f" {errno.errorcode[way[1]]}" if way[1] else ""
        self._fresh()
        code, said = _child(lambda: _armed(self.work, number, way, -1, unit.act))
        allowed = (0, 1, -signal.SIGKILL) if way[0] in "TKR" else (0, 1)
        if code not in allowed or "Traceback" in said:
            tally.tracebacks += 1
            tally.notes.append(f"{where}: struck: {code}\n{said[-1500:]}")
        done = code == 0
        code, said = _child(lambda: (unit.again or unit.act)(self.work))
        if code or "Traceback" in said:
            tally.tracebacks += 1
            tally.notes.append(f"{where}: again: {code}\n{said[-1500:]}")
        if lost := unit.lost(self.work, done):
            tally.lost += lost
            tally.notes.append(f"{where}: {lost} records lost")
        found = self._content()
        wrong = [
            name for name, value in self.expected.items() if name in found and found[name] != value
        ]
        wrong += [name for name in self.expected if name not in found]
        left = [name for name in found if name not in self.expected]
        if wrong:
            tally.wrong += 1
            tally.notes.append(f"{where}: wrong or missing: {', '.join(wrong[:5])}")
        if left:
            tally.leftovers += 1
            tally.notes.append(f"{where}: left over: {', '.join(left[:5])}")
        return tally


def build_shim(folder: Path) -> Path:
    """Compile faults.c.

    Raises:
        SystemExit: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("a C compiler is needed: cc, gcc or clang")
    shim = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    argv = [compiler, "-O1", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl", "-pthread"]
    subprocess.run(argv, check=True)
    return shim


def inject(
    units: list[Unit], top: Path, injections: int, seed: int, log: Callable[[str], None]
) -> Tally:
    """Strike the units: small ones everywhere, the others at places drawn by `seed`.

    Args:
        injections: how many in all, at least; small units alone may need more.
    """
    draw, total = random.Random(seed), Tally()
    large = [unit for unit in units if not unit.small]
    for unit in sorted(units, key=lambda unit: not unit.small):
        injector = Injector(unit, top)
        ways = list(injector.ways())
        if not unit.small:
            rest = len(large) - large.index(unit)
            share = max(0, injections - total.injections) // rest
            ways = sorted(draw.sample(ways, min(len(ways), share)))
        tally = Tally()
        for number, way in ways:
            tally.add(injector.strike(number, way))
            tally.kinds[way[0]] += 1
        total.add(tally)
        log(tally.line(unit.name, len(injector.operations)))
        for note in tally.notes[:10]:
            log(f"  {note}")
        shutil.rmtree(injector.top, ignore_errors=True)
    return total


def main() -> int:
    """Build the shim, start again under it, and strike."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--injections", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="units, separated by commas")
    options = parser.parse_args()
    if "YELP_HPC_FAULTS" not in os.environ:
        with tempfile.TemporaryDirectory() as place:
            env = {**os.environ, "YELP_HPC_FAULTS": place}
            env |= {"LD_PRELOAD": str(build_shim(Path(place))), "OMP_NUM_THREADS": "1"}
            env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_XET": "1"}
            env |= {"YELP_HPC_CACHE": f"{place}/cache", "TQDM_DISABLE": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=env, check=False).returncode
    from benchmarks.faults_small import light_units
    from benchmarks.faults_units import heavy_units

    folder, started = Path(os.environ["YELP_HPC_FAULTS"]), time.monotonic()
    chosen = set(filter(None, options.only.split(",")))

    def log(text: str) -> None:
        print(text, flush=True)

    def strike(units: list[Unit], injections: int) -> Tally:
        wanted = [unit for unit in units if not chosen or unit.name in chosen]
        return inject(wanted, folder / "work", injections, options.seed, log)

    log(HEAD)
    total = strike(light_units(), 0)
    if not chosen or chosen - {unit.name for unit in light_units()}:
        with heavy_units(folder) as units:
            total.add(strike(units, options.injections - total.injections))
    log(total.line("all", ""))
    kinds = sorted(total.kinds.items())
    log(", ".join(f"{count} {WORDS[kind]}" for kind, count in kinds))
    log(f"{time.monotonic() - started:.0f} s on {os.cpu_count()} cores")
    return 0 if total.faultless else 1


if __name__ == "__main__":
    sys.exit(main())
