"""Which learning rate the demo should have: decided on validation rows, the test rows stay unseen.

    python benchmarks/demo_learning_rate.py [--rates 2e-4 1e-3 2e-3]

Trains the demo's config once for each rate in a run directory of its own and prints the loss and
the macro F1 on the validation rows at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from yelp_hpc.rundir.files import read_jsonl
from yelp_hpc.rundir.paths import RunPaths

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"


def main() -> None:
    """Print one line a rate, the best by validation loss last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--rates", nargs="+", default=["2e-4", "1e-3", "2e-3"])
    rates = parser.parse_args().rates
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for rate in rates:
            run = RunPaths(Path(scratch) / f"lr-{rate}")
            for stage in ("prepare", "train"):
                command = [
                    *(sys.executable, "-m", "yelp_hpc", "submit", stage, "--executor", "local"),
                    *("--config", str(CONFIG), "--run", str(run.root)),
                    *("--set", f"train.learning_rate={rate}"),
                ]
                subprocess.run(command, check=True)
            last = [line for line in read_jsonl(run.train_log) if "validation_loss" in line][-1]
            results.append((last["validation_loss"], last["validation_f1_macro"], rate))
            print(f"lr {rate}: validation loss {results[-1][0]:.4f}, macro F1 {results[-1][1]:.3f}")
    print(f"best by validation loss: lr {min(results)[2]}")


if __name__ == "__main__":
    main()
