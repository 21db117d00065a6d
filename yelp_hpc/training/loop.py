"""The training loop: LoRA on the answer tokens, the same adapter for any world size and packing.

Every rank computes its share of a global batch, the gradients are summed over the ranks once a step
and divided by the batch's own number of supervised tokens. Requests to stop ride that sum, so the
ranks agree on the step at which they save. Writes checkpoints and `train/log.jsonl` (rank 0).
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yelp_hpc.config import Config
from yelp_hpc.data.answer_tree import AnswerTree
from yelp_hpc.data.packing import DataPlan, deal, plan_microbatches
from yelp_hpc.errors import SavedForRequeue, StageError
from yelp_hpc.models.packed.batch import forward_selected, pack
from yelp_hpc.models.packed.dropout import DropoutContext, derive_seed
from yelp_hpc.models.packed.tree import answer_scores
from yelp_hpc.ranks.rank import StopRequest
from yelp_hpc.ranks.world import World
from yelp_hpc.rundir.files import append_jsonl
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.training.checkpoint import (
    CheckpointStore,
    Snapshot,
    load_adapter,
    load_optimizer,
    optimizer_tensors,
)
from yelp_hpc.training.data import Rows, f1_macro
from yelp_hpc.training.log import progress_line
from yelp_hpc.training.throughput import Meter

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROGRESS_SECONDS = 5.0


@dataclass
class Progress:
    """Where the run stands after `step` steps."""

    step: int = 0
    evaluated: int = 0
    """The last step whose validation loss is known."""
    pending: dict[str, Any] | None = None
    """The log line of a step whose validation was interrupted."""
    best: dict[str, float] | None = None
    restarts: int = 0
    skipped: int = 0
    """Optimizer steps left out because the scaled gradients overflowed."""


@dataclass
class Training:
    """Everything that one rank trains with; `run` is the loop."""

    config: Config
    paths: RunPaths
    world: World
    model: Any
    dropout: DropoutContext
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    plan: DataPlan
    train: Rows
    validation: Rows
    store: CheckpointStore
    stop: StopRequest
    tree: AnswerTree
    """Of the answers, as scores count them."""
    adapter_config: dict[str, Any]
    fingerprint: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    board: Any = None
    """TensorBoard's writer, if any."""

    def __post_init__(self) -> None:
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.meter = Meter(self.model, self.world.device, self.config.train.precision)
        self.saved_step = -1
        self.saved_at = time.monotonic()
        self.said_at = 0.0

    # --- the loop ---------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end.

        Raises:
            SavedForRequeue: asked to stop; everything that was finished is saved.
            StageError: the loss or the gradient is not finite, or the loss explodes.
        """
        self.stop.ready = True
        try:
            if self.progress.pending is not None:
                self._evaluate_and_log(self.progress.pending)
            while self.progress.step < self.plan.steps:
                self._step()
            self._save()
        finally:
            self.store.wait()

    def _step(self) -> None:
        step, settings = self.progress.step, self.config.train
        rows = self.plan.batch(step)
        self.meter.start()
        # Whatever else the model draws (attention dropout, say) depends on the step alone too.
        torch.manual_seed(derive_seed(self.config.seed, step, self.world.rank))
        loss, tokens, stopping, incomplete = self._reduce(*self._accumulate(step, rows))
        if incomplete:  # some rank gave the step up: nobody applies it, the resumed run repeats it
            self._save_and_stop()
        self._check(step, loss)
        grad_norm, skipped = self._update()
        if not skipped and not math.isfinite(grad_norm):
            raise self._diverged(step, f"the gradient's norm is {grad_norm}")
        rate = self.optimizer.param_groups[0]["lr"]
        if skipped:
            self.progress.skipped += 1
        else:
            self.schedule.step()
        self.progress.step = step + 1
        line = {
            "step": step + 1,
            "epoch": round((step + 1) / self.plan.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": None if skipped else grad_norm,
            **self.meter.stop(int(tokens), len(rows), self.plan.steps - step - 1),
            "time": round(time.time(), 3),
            "restarts": self.progress.restarts,
        }
        if settings.precision == "fp16":
            line |= {"loss_scale": self.scaler.get_scale(), "skipped": self.progress.skipped}
        self.stop.margin = 5 + 3 * self.meter.slowest + 3 * self.store.seconds
        if self._evaluation_due():
            self._evaluate_and_log(line)
        elif (step + 1) % settings.log_every == 0 or step + 1 == self.plan.steps:
            self._log(line)
        if stopping:
            self._save_and_stop()
        minutes = (time.monotonic() - self.saved_at) / 60
        if (step + 1) % settings.save_every_steps == 0 or minutes > settings.save_every_minutes:
            self._save(background=True)

    def _accumulate(self, step: int, rows: tuple[int, ...]) -> tuple[float, int, bool]:
        """Gradients of this rank's share; `(loss sum, tokens computed, whether all was done)`.

        The summed loss is divided by the number of supervised tokens of the global batch.
        """
        loss_sum = torch.zeros((), device=self.world.device)
        tokens, supervised = 0, sum(self.train.supervised(rows))
        for parameter in self.parameters.values():
            parameter.grad = None
        for group in self._microbatches(self.train, rows):
            if self.stop.pending:
                return 0.0, tokens, False
            batch = pack(
                [self.train.sequence(row) for row in group],
                self.train.prefix_length,
                last=self.train.supervised(group),
            ).to(self.world.device)
            targets = self.train.targets(group).to(self.world.device)
            with self.dropout.batch(step, group, batch):
                with self._autocast():
                    logits = forward_selected(self.model, batch)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                loss = loss / supervised
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            tokens += len(batch.input_ids)
            self.meter.add(batch)
        return float(loss_sum), tokens, True

    def _microbatches(self, data: Rows, rows: tuple[int, ...]) -> list[list[int]]:
        """This rank's rows, grouped under the token budget."""
        mine = deal([data.own_length(row) for row in rows], self.world.size)[self.world.rank]
        groups = plan_microbatches(
            [data.own_length(rows[i]) for i in mine],
            self.config.train.max_tokens,
            data.prefix_length,
        )
        return [[rows[mine[i]] for i in group] for group in groups]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.config.train.precision)
        return torch.autocast(self.world.device.type, dtype) if dtype else nullcontext()

    def _reduce(self, loss: float, tokens: int, complete: bool) -> tuple[float, float, bool, bool]:
        """Sum gradients, loss, tokens and requests to stop over the ranks, in one message."""
        tail = [loss, float(tokens), float(self.stop.pending), float(not complete)]
        gradients = [
            (torch.zeros_like(p) if p.grad is None else p.grad).float().flatten()
            for p in self.parameters.values()
        ]
        flat = self.world.sum(torch.cat([*gradients, torch.tensor(tail, device=self.world.device)]))
        start = 0
        for parameter in self.parameters.values():
            end = start + parameter.numel()
            parameter.grad = flat[start:end].view_as(parameter).to(parameter.dtype, copy=True)
            start = end
        loss, tokens_sum, stopping, incomplete = flat[start:].tolist()
        return loss, tokens_sum, stopping > 0, incomplete > 0

    def _update(self) -> tuple[float, bool]:
        """One optimizer step; `(gradient norm before clipping, whether it was skipped)`."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(
            list(self.parameters.values()), self.config.train.max_grad_norm
        )
        before = self.scaler.get_scale()
        finite = math.isfinite(float(norm))
        if self.scaler.is_enabled() or finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(norm), self.scaler.is_enabled() and self.scaler.get_scale() < before

    # --- validation -------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        if not len(self.validation):
            return False
        every = self.config.train.evaluate_every or max(1, self.plan.steps // 10)
        return self.progress.step % every == 0 or self.progress.step == self.plan.steps

    def _evaluate_and_log(self, line: dict[str, Any]) -> None:
        result = self._evaluate()
        if result is None:
            self.progress.pending = line
            self._save_and_stop()
        else:
            self.progress.pending = None
            line |= result
            self._log(line)
            self.progress.evaluated = self.progress.step
            best = self.progress.best
            if best is None or result["validation_loss"] < best["validation_loss"]:
                self.progress.best = {"step": self.progress.step, **result}
                self.store.best_step = self.progress.step
                self._save(background=True)
        self.meter.forget()

    def _evaluate(self) -> dict[str, float] | None:
        """Loss, accuracy and macro F1 on the validation rows; None when asked to stop meanwhile."""
        device = self.world.device
        count = len(self.validation.answers)
        sums = torch.zeros(count * count + 2, dtype=torch.float64, device=device)
        self.model.eval()
        with torch.no_grad():
            for group in self._microbatches(self.validation, tuple(range(len(self.validation)))):
                if self.stop.pending:
                    sums[-1] = 1
                    break
                batch = pack(
                    [self.validation.sequence(row) for row in group],
                    self.validation.prefix_length,
                    last=self.validation.supervised(group),
                ).to(device)
                with self._autocast():
                    logits = forward_selected(self.model, batch).float()
                targets = self.validation.targets(group).to(device)
                sums[-2] += F.cross_entropy(logits, targets, reduction="sum").double()
                predicted = self._predicted(group, logits)
                truth = torch.tensor([self.validation.labels[row] for row in group], device=device)
                sums[: count * count] += torch.bincount(
                    truth * count + predicted, minlength=count * count
                )
        self.model.train()
        *counts, loss, interrupted = self.world.sum(sums).tolist()
        if interrupted:
            return None
        rows = len(self.validation)
        confusion = [counts[count * i : count * (i + 1)] for i in range(count)]
        return {
            "validation_loss": loss / sum(self.validation.supervised(range(rows))),
            "validation_accuracy": sum(confusion[i][i] for i in range(count)) / rows,
            "validation_f1_macro": f1_macro(confusion),
        }

    def _predicted(self, rows: list[int], logits: Tensor) -> Tensor:
        """The best label of each validation row, `[len(rows)]`.

        Answers of one token are compared where the supervised `logits` are; longer ones need a
        pass of their own, with every answer behind each prompt.
        """
        data = self.validation
        if not self.tree.tokens:
            tokens = [answer[0] for answer in data.answers]
            first = logits[:: data.supervised(rows)[0]]
            return first[:, torch.tensor(tokens, device=logits.device)].argmax(1)
        prompts = [data.prompt(row) for row in rows]
        with self._autocast():
            scores = answer_scores(
                self.model, prompts, data.prefix_length, self.tree, self.world.device
            )
        return scores.argmax(1)

    # --- faults -----------------------------------------------------------------------------

    def _check(self, step: int, loss: float) -> None:
        uniform = math.log(self.model.config.vocab_size)  # the loss of guessing blindly
        if not math.isfinite(loss):
            raise self._diverged(step, f"the loss is {loss}")
        if loss > 3 * uniform:
            raise self._diverged(step, f"the loss exploded to {loss:.3g}")

    def _diverged(self, step: int, what: str) -> StageError:
        self.store.wait()
        self.world.sum(torch.zeros(1, device=self.world.device))  # all look after the last write
        good, _ = self.store.newest()
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        return StageError(
            f"step {step + 1}: {what}; {kept}. A lower train.learning_rate, a longer "
            "train.warmup_steps or another train.precision may help (in a new run directory)."
        )

    # --- state ------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The state after `progress.step` steps."""
        names = list(self.parameters)
        tensors, groups = optimizer_tensors(self.optimizer, names)
        step, progress = self.progress.step, self.progress
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        state = {
            "step": step,
            "data": {"epoch": epoch, "batch": place, "seed": self.plan.seed},
            "random": {
                "seed": self.config.seed,
                "rule": "every rank seeds anew at each step from (seed, step, rank); dropout from "
                "(seed, step, module, row)",
            },
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "param_groups": groups,
            "progress": {
                "evaluated": progress.evaluated,
                "pending": progress.pending,
                "best": progress.best,
                "restarts": progress.restarts,
                "skipped": progress.skipped,
            },
            "world_size": self.world.size,
            "threads": torch.get_num_threads(),
            "fingerprint": self.fingerprint,
        }
        return Snapshot(step, self.adapter(), self.adapter_config, tensors, state)

    def adapter(self) -> dict[str, Tensor]:
        """The LoRA weights under the names of PEFT's files, copied to the CPU."""
        return {
            peft_name(name): parameter.detach().to("cpu", copy=True)
            for name, parameter in self.parameters.items()
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from `snapshot`.

        Raises:
            StageError: a tensor does not fit.
        """
        names = list(self.parameters)
        load_adapter(
            {peft_name(name): parameter for name, parameter in self.parameters.items()},
            snapshot.adapter,
        )
        state = snapshot.state
        load_optimizer(self.optimizer, names, snapshot.optimizer, state["param_groups"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(step=snapshot.step, **state["progress"])
        self.progress.restarts += 1
        self.store.best_step = int(self.progress.best["step"]) if self.progress.best else None
        self.saved_step = snapshot.step

    def _save(self, *, background: bool = False) -> None:
        """Rank 0 writes a checkpoint, unless this step's is there already."""
        self.saved_at = time.monotonic()
        if not self.world.first or self.saved_step == self.progress.step:
            return
        self.store.save(self.snapshot(), background=background)
        self.saved_step = self.progress.step

    def _save_and_stop(self) -> None:
        if self.progress.pending is not None:
            self.saved_step = -1  # the state changed after this step's periodic save
        if self.progress.step > 0:
            self._save()
        raise SavedForRequeue(
            f"saved at step {self.progress.step} of {self.plan.steps}; run the same command again"
        )

    def _log(self, line: dict[str, Any]) -> None:
        if not self.world.first:
            return
        append_jsonl(self.paths.train_log, line)
        if self.board is not None:
            for key, value in line.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(key, value, line["step"])
            self.board.flush()
        now, last = time.monotonic(), line["step"] == self.plan.steps
        if last or "validation_loss" in line or now - self.said_at > PROGRESS_SECONDS:
            self.said_at = now
            print(progress_line(line, self.plan.steps), file=sys.stderr, flush=True)


def peft_name(parameter: str) -> str:
    """`…lora_A.default.weight` → the key of an adapter file, `…lora_A.weight`."""
    return parameter.replace(".default.", ".")
