"""The measurements that the README quotes, each from nothing: `make bench`.

    python benchmarks/bench.py [--work build/bench] [NAME …]

Makes what they need, the demo's model and a finished run of the demo, in the folder named by
`--work`, then runs one after the other; a measurement that fails does not keep the next from
running. Without a NAME all that need neither Slurm nor root; those beside LLaMA-Factory install it
(minutes, once). For figures to quote the machine must have nothing else to do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MODEL, RUN = "MODEL", "RUN"
COMMANDS: dict[str, tuple[str, ...]] = {
    "train_vs_llamafactory": ("--model", MODEL, "--steps", "10"),
    "train_efficiency": ("--model", MODEL),
    "train_saves": ("--run", RUN),
    "train_ranks": ("--run", RUN),
    "quality_vs_llamafactory": ("--run", RUN),
    "infer_vs_llamafactory": ("--run", RUN),
    "label_tree": (),
    "collect_scale": (),
    "prepare_scale": (),
    "gpu": (),
}
# What these need is not here, or they take hours.
ELSEWHERE = {
    "chaos": "root and `make cluster`",
    "submit_cost": "`make cluster`",
    "image_start": "an image",
    "gpu_commands": "a GPU",
    "gpu_architectures": "a GPU",
    "faults": "a C compiler, and time",
}


def main() -> int:
    """Run them; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*COMMANDS, []])
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    names = args.names or list(COMMANDS)
    run = args.work / "demo"
    if not (run / "metrics.json").is_file():
        demo = [sys.executable, "-m", "yelp_hpc", "demo", "--run", str(run)]
        subprocess.run(demo, check=True)
    from yelp_hpc.data.demo import model_folder

    places = {MODEL: str(model_folder()), RUN: str(run)}
    ended: dict[str, str] = {}
    for name in names:
        options = [places.get(word, word) for word in COMMANDS[name]]
        if name == "gpu" and not _gpu():
            options.append("--small")
        print(f"\n== {name} {' '.join(options)}", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], check=False)
        said = "ended" if not done.returncode else f"failed with {done.returncode}"
        ended[name] = f"{said} after {time.monotonic() - began:.0f} s"
    print("\n" + "\n".join(f"{name:<26}{how}" for name, how in ended.items()))
    return any("failed" in how for how in ended.values())


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
