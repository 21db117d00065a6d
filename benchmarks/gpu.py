"""One GPU in under ten minutes: what runs on CUDA alone, and how fast the engine is there.

    python benchmarks/gpu.py [--out gpu.json] [--small] [--parts NAME …]

Needs torch 2.11 or newer, transformers, peft, accelerate, pydantic and pyarrow, the checkout on
PYTHONPATH and no model: weights are random, ChatGLM3-6B's sizes (12.5 GB in half precision).
`--small` takes tiny sizes, for a CPU or for a look. Each part stands for itself; after each the
JSON file is written anew, so that a run that is cut off leaves what it found. A part that fails is
recorded with its error and fails the command at the end.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the ranks of a training have it
from yelp_hpc.runtime import set_runtime_defaults

set_runtime_defaults()  # as `run` does, before torch is imported

import torch
import transformers
from torch.nn import functional as F

from yelp_hpc.config import config_from_dict
from yelp_hpc.data.answer_tree import answer_tree
from yelp_hpc.forecast.machine import EFFICIENCY, MEMORY_EFFICIENCY
from yelp_hpc.forecast.memory import traffic_bytes, training_memory
from yelp_hpc.forecast.model_shape import KNOWN, model_shape
from yelp_hpc.gpus import card_named
from yelp_hpc.inference.generation import GreedyDecoder
from yelp_hpc.inference.scoring import label_scores
from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM
from yelp_hpc.models.packed import batch as batches
from yelp_hpc.models.packed.attention import Layout, attend
from yelp_hpc.models.packed.batch import base_model, forward_selected, pack, prepare_model
from yelp_hpc.models.packed.dropout import DropoutContext, use_sequence_dropout
from yelp_hpc.models.packed.fused_gpu import GpuDecoder
from yelp_hpc.models.packed.masks import keep_mask, token_keys
from yelp_hpc.models.packed.varlen import varlen_kernel
from yelp_hpc.training.adapter import add_lora
from yelp_hpc.training.gradients import autocast
from yelp_hpc.training.loop import recompute_layers
from yelp_hpc.training.throughput import flops_per_token, peak_flops

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAME = "THUDM/chatglm3-6b-base"
PREFIX, LENGTHS = 31, (450, 300, 220, 160, 120, 90, 70, 50)  # 1,491 tokens
TINY: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4,
    "kv_channels": 64, "multi_query_group_num": 2, "padded_vocab_size": 1000, "seq_length": 2048,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"model": {"path": "x"}, "data": {"source": "demo"}}


class Bench:
    """The device, the sizes and the parts."""

    def __init__(self, small: bool) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.small = small
        self.lengths = tuple(n // 8 for n in LENGTHS) if small else LENGTHS
        sizes = {k: v for k, v in KNOWN[NAME].items() if k != "model_type"}
        self.sizes = TINY if small else {**sizes, "seq_length": 8192}
        self.halves = ("fp16", "bf16") if self.cuda else ("bf16",)

    # --- what the parts share ---------------------------------------------------------------

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def model(
        self, precision: str, *, kind: str = "chatglm", recompute: bool = False, own: bool = False,
        sizes: dict[str, Any] | None = None,
    ) -> tuple[Any, DropoutContext]:  # fmt: skip
        """A model with LoRA on the device. `own`: by its own code, without the fused forms."""
        config = config_from_dict(SETTINGS)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[precision])
        try:
            with self.device:
                made = _chatglm(sizes or self.sizes) if kind == "chatglm" else _llama()
        finally:
            torch.set_default_dtype(before)
        model = add_lora(made, config).to(self.device)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
        masks = use_sequence_dropout(model, 1)
        base = base_model(prepare_model(model, fused=False).train())
        if not own:
            batches._decoders[base] = GpuDecoder(base)
        if recompute:
            recompute_layers(model)
        return model, masks

    def step(
        self, made: tuple[Any, DropoutContext], precision: str, scaler: Any = None,
        lengths: tuple[int, ...] | None = None, number: int = 0,
    ) -> tuple[Any, int]:  # fmt: skip
        """Forward and backward of one micro-batch; its loss and tokens."""
        model, masks = made
        own = lengths or self.lengths
        rows = [[5] * PREFIX + [(7 * i + j) % 900 + 6 for j in range(n)] for i, n in enumerate(own)]
        batch = pack(rows, PREFIX, last=2).to(self.device)
        targets = torch.full((2 * len(own),), 9, device=self.device)
        with masks.batch(number, range(len(own)), batch):
            with autocast(self.device, precision):
                logits = forward_selected(model, batch)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / 64
            (scaler.scale(loss) if scaler else loss).backward()
        return loss.detach(), len(batch.input_ids)

    def seconds(self, call: Callable[[], Any], times: int) -> tuple[float, float]:
        """Of one call: in all, and until the CPU had launched it."""
        call()
        self.sync()
        began = time.perf_counter()
        for _ in range(times):
            call()
        launched = time.perf_counter() - began
        self.sync()
        return (time.perf_counter() - began) / times, launched / times

    # --- the parts --------------------------------------------------------------------------

    def varlen_equals_padded(self) -> Any:
        """The variable-length kernel against padded rows in fp32: result, gradients, relative."""
        found: dict[str, Any] = {}
        for name in self.halves if self.cuda else ():
            for heads, groups, size in ((32, 2, 128), (32, 32, 128), (9, 3, 64)):
                kernel = varlen_kernel(self.device, size, DTYPES[name])
                for prefix in (PREFIX, 0):
                    layout = Layout(prefix, self.lengths, self.device)
                    torch.manual_seed(1)
                    shapes = [(layout.total, n, size) for n in (heads, groups, groups)]
                    half: dict[str, Any] = {"device": self.device, "dtype": DTYPES[name]}
                    states = [torch.randn(shape, **half) for shape in shapes]
                    weight = torch.randn(shapes[0], device=self.device)
                    results = []
                    for dtype in (DTYPES[name], torch.float32):
                        q, k, v = (s.detach().to(dtype).requires_grad_() for s in states)
                        out = attend(q, k, v, layout, size**-0.5)
                        slopes = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
                        results.append([out, *slopes])
                    key = f"{name} {heads}/{groups}x{size} prefix {prefix}"
                    errors = [_error(a, b) for a, b in zip(*results, strict=True)]
                    found[key] = {"kernel": kernel is not None, "errors": errors}
                    assert max(errors) < 0.02, (key, errors)
        return found or "no kernel on a CPU"

    def fused_equals_own(self) -> Any:
        """The fused forms against each model's own code: logits' loss and gradients, relative."""
        found = {}
        for kind in ("chatglm", "llama"):
            for precision in ("fp32", *self.halves):
                results = []
                for own in (True, False):
                    made = self.model(precision, kind=kind, own=own, sizes=TINY)
                    loss, _ = self.step(made, precision)
                    results.append([loss, *_gradients(made[0])])
                errors = [_error(b, a) for a, b in zip(*results, strict=True)]
                found[f"{kind} {precision}"] = max(errors)
                bound = 1e-3 if precision == "fp32" else 0.1
                assert max(errors) < bound, (kind, precision, max(errors))
        return found

    def precisions(self) -> Any:
        """Loss of a step in each precision, layers kept and computed twice; finite gradients."""
        found = {}
        for kind in ("chatglm", "llama"):
            for precision in ("fp32", *self.halves):
                losses = []
                for recompute in (False, True):
                    made = self.model(precision, kind=kind, recompute=recompute, sizes=TINY)
                    loss, _ = self.step(made, precision)
                    assert all(bool(g.isfinite().all()) for g in _gradients(made[0]))
                    losses.append(float(loss))
                assert losses[0] == losses[1]
                found[f"{kind} {precision}"] = losses[0]
        return found

    def masks(self) -> Any:
        """Dropout's masks are the CPU's, bit by bit."""
        keys = token_keys(torch.arange(900) * 977, torch.arange(900))
        digests = set()
        for device in (self.device, torch.device("cpu")):
            mask = keep_mask(keys.to(device), 12345, 4096, 0.08, torch.float32).cpu()
            digests.add(hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:16])
        assert len(digests) == 1, digests
        return digests.pop()

    def determinism(self) -> Any:
        """One step six times: different gradients and seconds, with torch's switch and without."""
        found = {}
        for strict in (False, True):
            torch.use_deterministic_algorithms(strict)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            try:
                made = self.model(self.halves[0], sizes={**self.sizes, "num_layers": 2})
                seen = set()
                for _ in range(6):
                    made[0].zero_grad(set_to_none=True)
                    self.step(made, self.halves[0])
                    joined = torch.cat([g.flatten() for g in _gradients(made[0])])
                    seen.add(joined.cpu().numpy().tobytes())
                seconds, _ = self.seconds(partial(self.step, made, self.halves[0]), 5)
            finally:
                torch.use_deterministic_algorithms(False)
            found["strict" if strict else "off"] = {"different of 6": len(seen), "s": seconds}
        assert found["strict"]["different of 6"] == 1, found
        return found

    def all_reduce(self) -> Any:
        """NCCL (gloo without a GPU) starts and adds."""
        command = [sys.executable, "-m", "yelp_hpc.ranks.allreduce", "--ranks", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        said = dict(json.loads(done.stdout.splitlines()[-1]))
        assert said.get("correct"), said
        return said

    def no_silent_cpu(self) -> Any:
        """GPUs that are given and cannot be used are an error, not a training on the CPU."""
        code = (
            "import torch; torch.cuda.is_available = lambda: False\n"
            "from yelp_hpc.errors import RequestError\n"
            "from yelp_hpc.ranks.device import usable_gpus\n"
            "try: print('computes on', usable_gpus(), 'GPUs')\n"
            "except RequestError as error: print('refused:', error)"
        )
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
            env=environment,
        )  # fmt: skip
        assert "refused:" in done.stdout, done.stdout + done.stderr[-500:]
        return done.stdout.strip()[:200]

    def whole_model(self) -> Any:
        """Steps at full size: seconds, MFU and memory, measured and as `plan` has them."""
        found = {}
        values = {**KNOWN[NAME], **{k: v for k, v in self.sizes.items() if k != "seq_length"}}
        shape = model_shape(values, NAME)
        long = (200,) * 40 if not self.small else (20,) * 8
        runs = [(p, False, self.lengths) for p in self.halves]
        runs += [(self.halves[-1], recompute, long) for recompute in (False, True)]
        for precision, recompute, lengths in runs:
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            made = self.model(precision, recompute=recompute)
            weights = torch.cuda.memory_allocated() if self.cuda else 0
            scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
            _, tokens = self.step(made, precision, scaler, lengths)
            call = partial(self.step, made, precision, scaler, lengths)
            seconds, launched = self.seconds(call, 2 if self.small else 6)
            target = {"target": ["query_key_value"]}
            settings = {**SETTINGS, "train": {"precision": precision}, "lora": target}
            plan = training_memory(shape, config_from_dict(settings), tokens, recompute, self.cuda)
            peak = torch.cuda.max_memory_allocated() if self.cuda else 0
            line = {
                "tokens": tokens, "s": seconds, "launched_s": launched,
                "tokens_s": round(tokens / seconds), "weights_gb": weights / 1e9,
                "kept_gb": (peak - weights) / 1e9, "planned_kept_gb": plan.activations / 1e9,
            }  # fmt: skip
            flops = flops_per_token(made[0]) * tokens  # forward and backward
            card = card_named(torch.cuda.get_device_name()) if self.cuda else None
            if rate := peak_flops(self.device, precision):
                line["mfu"] = flops / seconds / rate
            if card and (rate := card.rate(precision)):
                moved = traffic_bytes(shape, precision, train=True) * tokens * shape.layers
                again = 1.5 if recompute else 1
                line["planned_s"] = again * (
                    flops / (rate * EFFICIENCY) + moved / (MEMORY_EFFICIENCY * card.bandwidth)
                )
            how = "computed twice" if recompute else "kept"
            found[f"{precision} {how}, {tokens} tokens"] = line
            del made, call  # or the next model lies beside it
        return found

    def kernels(self) -> Any:
        """Where a step's time goes, and what makes the CPU wait."""
        made = self.model(self.halves[0])
        self.step(made, self.halves[0])
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.cuda else []
        with torch.profiler.profile(activities=kinds) as profile:
            self.step(made, self.halves[0])
            self.sync()
        which = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda e: -getattr(e, which))
        waits = {e.key: e.count for e in events if "Synchronize" in e.key or "Memcpy" in e.key}
        top = [(e.key[:70], round(getattr(e, which) / 1e3, 3), e.count) for e in events[:25]]
        return {"ms": top, "waits": waits}

    def scoring_and_generation(self) -> Any:
        """Prompts a second in both modes, at full size."""
        model, _ = self.model(self.halves[0])
        model.eval().requires_grad_(False)
        longest = 20 if self.small else 150
        prompts = [
            [5] * PREFIX + [(i + j) % 900 + 6 for j in range(longest + 3 * i)] for i in range(36)
        ]
        tree = answer_tree([[i] for i in range(1, 6)])
        tokens = PREFIX + sum(len(p) - PREFIX for p in prompts)
        score, _ = self.seconds(lambda: label_scores(model, prompts, PREFIX, tree, self.device), 3)
        decoder = GreedyDecoder(model, PREFIX, {2}, 8, lambda answer: False, self.device)
        write, _ = self.seconds(lambda: decoder.generate(prompts), 1)
        return {"score_s": score, "tokens_s": round(tokens / score), "generate_8_tokens_s": write}


def _chatglm(sizes: dict[str, Any]) -> Any:
    return ChatGLMForCausalLM(ChatGLMConfig(**sizes))


def _llama() -> Any:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1000,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _gradients(model: Any) -> list[Any]:
    return [p.grad for p in model.parameters() if p.requires_grad]


def _error(got: Any, wanted: Any) -> float:
    got, wanted = got.detach().float(), wanted.detach().float()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))


PARTS = [name for name, value in vars(Bench).items() if inspect.isfunction(value)]
PARTS = PARTS[PARTS.index("varlen_equals_padded") :]


def main() -> int:
    """Run the parts; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="NAME")
    args = parser.parse_args()
    bench = Bench(args.small)
    if not bench.cuda and not args.small:
        raise SystemExit("no GPU here: --small runs the parts on a CPU")
    results: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if bench.cuda else "CPU",
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "python": sys.version.split()[0],
    }  # fmt: skip
    failed = []
    for name in args.parts:
        began = time.perf_counter()
        try:
            found = getattr(bench, name)()
        except Exception as error:  # a part that fails must not hide the others
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:600]}
            failed.append(name)
        results[name] = {"seconds": round(time.perf_counter() - began, 1), "found": found}
        print(name, json.dumps(results[name], default=str)[:1500], flush=True)
        args.out.write_text(json.dumps(results, indent=1, default=str) + "\n")
        if bench.cuda:
            torch.cuda.empty_cache()
    print("failed: " + ", ".join(failed) if failed else "every part holds", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
