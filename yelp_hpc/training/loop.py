"""The training loop: LoRA on the answer tokens, the same bytes for any number of ranks.

A global batch is cut into micro-batches that do not depend on the ranks; each rank computes some,
their gradients are gathered once a step and added in a fixed tree, and the loss is divided by the
batch's own number of supervised tokens. Requests to stop and faults ride that message, so the
ranks agree on the step at which they save or try again. Writes checkpoints, `train/log.jsonl` and
`train/budgets.json` (rank 0).
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from yelp_hpc.config import Config
from yelp_hpc.data.answer_tree import AnswerTree
from yelp_hpc.data.packing import DataPlan, epoch_order
from yelp_hpc.errors import SavedForRequeue, StageError
from yelp_hpc.models.packed.dropout import DropoutContext
from yelp_hpc.models.packed.proof import vocabulary_of
from yelp_hpc.ranks.rank import StopRequest
from yelp_hpc.ranks.world import World
from yelp_hpc.rundir.files import append_jsonl
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.training.budget import Budget, budget_at, smaller, write_budgets
from yelp_hpc.training.checkpoint import (
    CheckpointStore,
    Snapshot,
    load_adapter,
    load_optimizer,
    optimizer_tensors,
)
from yelp_hpc.training.data import Rows, f1_macro
from yelp_hpc.training.gradients import Gradients
from yelp_hpc.training.log import progress_line
from yelp_hpc.training.throughput import Meter
from yelp_hpc.training.validation import Validation

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
    budgets: list[Budget]
    progress: Progress = field(default_factory=Progress)
    board: Any = None
    """TensorBoard's writer, if any."""

    def __post_init__(self) -> None:
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.meter = Meter(self.model, self.world.device, self.config.train.precision)
        self.gradients = Gradients(
            self.config.train.precision,
            self.config.seed,
            self.world,
            self.model,
            self.dropout,
            self.scaler,
            self.train,
            self.stop,
            self.meter,
            self.parameters,
        )
        self.checks = Validation(
            self.model,
            self.validation,
            self.tree,
            self.config.train.precision,
            self.world,
            self.stop,
        )
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
        while True:  # again with a smaller budget where the memory was too small
            budget = budget_at(self.budgets, step)
            summed = self.gradients.of(step, rows, budget)
            if summed.too_large is None:
                break
            self._lower(budget, step, *summed.too_large)
        if not summed.complete:  # some rank gave the step up: nobody applies it, it is repeated
            self._save_and_stop()
        self._check(step, summed.loss)
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
            "loss": summed.loss,
            "learning_rate": rate,
            "grad_norm": None if skipped else grad_norm,
            **self.meter.stop(summed.tokens, len(rows), self.plan.steps - step - 1),
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
        if summed.stopping:
            self._save_and_stop()
        minutes = (time.monotonic() - self.saved_at) / 60
        if (step + 1) % settings.save_every_steps == 0 or minutes > settings.save_every_minutes:
            self._save(background=True)

    def _lower(self, budget: Budget, step: int, tokens: int, alone: bool) -> None:
        """Go on with a smaller budget, from this step to the end of the run, and record it.

        Raises:
            StageError: there is no smaller one.
        """
        lower = smaller(budget, step, tokens, alone)
        if lower is None:
            raise StageError(
                f"step {step + 1}: a sequence of {tokens} tokens alone does not fit the memory of "
                f"{self.world.device}, although its layers are computed twice: lower data.cutoff, "
                "or take a larger GPU"
            )
        self.budgets.append(lower)
        if lower.recompute and not budget.recompute:
            recompute_layers(self.model)
        if self.world.first:
            write_budgets(self.paths, self.budgets)
            how = "layers computed twice" if alone else f"max_tokens {lower.max_tokens}"
            print(
                f"train: step {step + 1} did not fit the memory; again, and on from here, with "
                f"{how} (recorded in {self.paths.budgets})",
                file=sys.stderr,
                flush=True,
            )

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
            found, comparable = result
            self._log(line | found)
            self.progress.evaluated = self.progress.step
            best = self.progress.best
            if best is None or comparable < best["compared_loss"]:
                self.progress.best = {
                    "step": self.progress.step,
                    **found,
                    "compared_loss": comparable,
                }
                self.store.best_step = self.progress.step
                self._save(background=True)
        self.meter.forget()

    def _evaluate(self) -> tuple[dict[str, float], float] | None:
        """Loss, accuracy and macro F1 on validation rows, and the loss on those of every check.

        The rows are a fixed sample; at the end of the run, all. None when asked to stop meanwhile.
        """
        budget = budget_at(self.budgets, self.progress.step).max_tokens
        count, most = len(self.validation), self.config.train.evaluate_rows
        order = epoch_order(count, self.config.seed, 0)
        sample, rest = sorted(order[:most]), sorted(order[most:])
        sums = self.checks.sums(sample, budget)
        if sums is None:
            return None
        comparable, compared = sums[-2], sum(self.validation.supervised(sample))
        if rest and self.progress.step == self.plan.steps:
            others = self.checks.sums(rest, budget)
            if others is None:
                return None
            sums = [a + b for a, b in zip(sums, others, strict=True)]
            sample = list(order)
        *counts, loss, _ = sums
        if not math.isfinite(loss):
            raise self._diverged(self.progress.step - 1, f"the validation loss is {loss}")
        labels = len(self.validation.answers)
        positions = sum(self.validation.supervised(sample))
        confusion = [counts[labels * i : labels * (i + 1)] for i in range(labels)]
        result = {
            "validation_loss": loss / positions,
            "validation_accuracy": sum(confusion[i][i] for i in range(labels)) / len(sample),
            "validation_f1_macro": f1_macro(confusion),
            "validation_rows": len(sample),
        }
        return result, comparable / compared

    # --- faults -----------------------------------------------------------------------------

    def _check(self, step: int, loss: float) -> None:
        uniform = math.log(vocabulary_of(self.model))  # the loss of guessing blindly
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
                "rule": "seeded anew for each micro-batch from (seed, step, its number); dropout "
                "from (seed, step, row, position, module)",
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


def recompute_layers(model: Any) -> None:
    """Have the backward pass compute each layer again instead of keeping its activations."""
    # transformers 5.6 has the old name alone
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
