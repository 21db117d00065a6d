"""What starting a stage in the image costs against bare: `python -m benchmarks.image_start IMAGE`.

Starts the same Python work bare and in the image, in turn, and prints the median seconds of each:
the command line alone, and what a training stage imports. The image must hold the same packages as
this Python, or the second is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from yelp_hpc.jobs.cluster import Container
from yelp_hpc.jobs.container import inside

WORK = {
    "command line": ["-m", "yelp_hpc", "run", "train", "--help"],
    "imports of train": ["-c", "import torch, transformers, yelp_hpc.stages.train"],
}
VERSIONS = "import importlib.metadata as m; print(m.version('torch'), m.version('transformers'))"


def run(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, cwd="/").stdout


def measure(container: Container, run_dir: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds: work → side → seconds."""
    image = inside(container, run_dir, ["python"], {})
    sides = {"bare": [sys.executable], "image": image}
    same = len({run([*argv, "-c", VERSIONS]) for argv in sides.values()}) == 1
    medians: dict[str, dict[str, float]] = {}
    for name, arguments in WORK.items():
        if name != "command line" and not same:
            print(f"{name}: other packages in the image than here, left out", file=sys.stderr)
            continue
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats + 1):  # the first fills the page cache
            for side, argv in sides.items():
                start = time.perf_counter()
                run([*argv, *arguments])
                times[side].append(time.perf_counter() - start)
        medians[name] = {side: statistics.median(taken[1:]) for side, taken in times.items()}
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        container = Container(image=str(arguments.image), cache=folder)
        medians = measure(container, Path(folder), arguments.repeats)
    if arguments.json:
        print(json.dumps(medians))
        return
    for name, sides in medians.items():
        more = sides["image"] - sides["bare"]
        print(f"{name}: bare {sides['bare']:.2f} s, image {sides['image']:.2f} s, {more:+.2f} s")


if __name__ == "__main__":
    main()
