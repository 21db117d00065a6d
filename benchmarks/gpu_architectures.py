"""Every decoder that transformers knows, on a GPU: computed there as on the CPU, or named.

    python benchmarks/gpu_architectures.py [--out FILE] [--processes N] [--device cuda] [KIND …]

The small twin of each architecture goes through the proof at the door on the CPU; the way that it
found is then proved on the device, in fp32 (TF32 off) and in bf16, where the variable-length kernel
and the fused forms of a GPU run. In bf16 the packed logits' distance from the CPU's in fp32 is
printed as a multiple of what the plain model, one row a call, has on the same device. Prints what
does not hold, the largest multiples and how many were asked; 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from tests.models.architectures import judge, kinds
from yelp_hpc.errors import RequestError
from yelp_hpc.models.packed.batch import forward_selected, pack, prepare_model
from yelp_hpc.models.packed.proof import PREFIX, prove, rows


def ask(kind: str, name: str) -> dict[str, Any]:
    """What one architecture's twin does on the device."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    device = torch.device(name)
    found, model = judge(kind)
    said: dict[str, Any] = {"kind": kind, "way": found.way, "faults": []}
    if model is None:
        return said
    way: Any = found.way
    trained = any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        right = _logits(model, "alone")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(device, dtype)
        try:
            prove(model, (way,), gradients=trained)
            with torch.no_grad():
                packed, plain = (_off(_logits(model, one), right) for one in (way, "alone"))
            said[str(dtype).removeprefix("torch.")] = {"packed": packed, "plain": plain}
        except (RequestError, RuntimeError) as error:
            said["faults"].append(f"{dtype}: {error}"[:300])
    return said


def _logits(model: Any, way: Any) -> torch.Tensor:
    """fp32 on the CPU: [rows, V], of each row's last token."""
    texts = rows(seed=1)
    device = next(model.parameters()).device
    prepare_model(model, way=way)
    batch = pack(texts, PREFIX).to(device)
    return forward_selected(model, batch).float().cpu()


def _off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def main() -> int:
    """Ask them all; 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", default=None)
    parser.add_argument("--out", type=Path, default=Path("gpu_architectures.json"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    asked = args.kinds or kinds()
    random.Random(0).shuffle(asked)  # a run that is cut off is a sample
    answers: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for job in as_completed([pool.submit(ask, kind, args.device) for kind in asked]):
            answers.append(job.result())
            args.out.write_text(json.dumps(answers, indent=1) + "\n")
            for fault in answers[-1]["faults"]:
                print(answers[-1]["kind"], answers[-1]["way"], fault, flush=True)
    computed = [one for one in answers if "float32" in one or "bfloat16" in one]
    halves = [one for one in computed if "bfloat16" in one]
    ratio = {one["kind"]: one["bfloat16"]["packed"] / one["bfloat16"]["plain"] for one in halves}
    for kind in sorted(ratio, key=lambda kind: -ratio[kind])[:8]:
        print(f"bf16: {kind} is {ratio[kind]:.2f} times as far off as its plain model")
    worst = max((one["float32"]["packed"], one["kind"]) for one in computed if "float32" in one)
    print(f"fp32: at most {worst[0]:.1e} from the CPU ({worst[1]})")
    wrong = sum(bool(one["faults"]) for one in answers)
    print(f"{len(answers)} asked, {len(computed)} computed, {wrong} do not hold")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
