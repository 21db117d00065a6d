"""The lines of `train/log.jsonl`: shown to people, and cut back when a run resumes."""

from __future__ import annotations

import json
from typing import Any

from yelp_hpc.progress import clock
from yelp_hpc.rundir.files import write_bytes
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.record import training_log


def progress_line(line: dict[str, Any], steps: int) -> str:
    """One line of a step for people: `step 12/400  loss 0.512 …`."""
    parts = [
        f"step {line['step']}/{steps}",
        f"loss {line['loss']:.4f}",
        f"lr {line['learning_rate']:.2e}",
        f"{line['tokens_per_second']:.0f} tokens/s",
        f"{line['examples_per_second']:.1f} rows/s",
        f"ETA {clock(line['eta_seconds'])}",
    ]
    if "validation_loss" in line:
        parts += [
            f"validation loss {line['validation_loss']:.4f}",
            f"macro F1 {line['validation_f1_macro']:.3f}",
        ]
    return "  ".join(parts)


def truncate_log(paths: RunPaths, step: int, pending: bool) -> None:
    """Drop the lines of steps that the run is about to repeat (or to finish, if `pending`)."""
    if not paths.train_log.exists():
        return
    last = step - 1 if pending else step
    kept = [line for line in training_log(paths) if line.get("step", 0) <= last]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    write_bytes(paths.train_log, text.encode())
