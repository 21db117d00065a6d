"""What a configuration asks for that is legal but senseless: a warning each, with what mends it."""

from __future__ import annotations

from collections.abc import Iterator

from yelp_hpc.config import Config
from yelp_hpc.data.packing import DataPlan

FEW_TEST_ROWS = 50
"""Below it the 95 % interval of an accuracy of one half is over ±0.14 wide."""


def warnings(
    config: Config, train_rows: int | None, test_rows: int | None, limit: int | None = None
) -> Iterator[str]:
    """What makes no sense for so many rows.

    Args:
        train_rows: rows that are trained on; None: not known yet.
        test_rows: likewise.
        limit: time limit of the training's job, minutes.
    """
    train, data = config.train, config.data
    if data.balanced and data.train_rows is None:
        yield (
            "data.balanced balances rows that are drawn, and without data.train_rows all are taken "
            "for training: set data.train_rows"
        )
    if "tuned" in config.infer.models and train_rows:
        plan = DataPlan(train_rows, train.global_batch, train.epochs, config.seed, train.max_steps)
        warm = train.warmup(plan.steps)
        if warm >= plan.steps and warm:
            yield (
                f"train.warmup_steps {warm} is as long as the training ({plan.steps} steps): the "
                f"learning rate never falls again: --set train.warmup_steps={plan.steps // 10}"
            )
        if train.global_batch > train_rows:
            yield (
                f"train.global_batch {train.global_batch} is more than the {train_rows} training "
                f"rows: --set train.global_batch={max(1, train_rows // 10)}"
            )
    if test_rows and test_rows < FEW_TEST_ROWS:
        yield (
            f"only {test_rows} test rows: an accuracy of 0.5 is known to ±"
            f"{0.98 / test_rows**0.5:.2f}: give data.test_rows or data.test more"
        )
    if config.infer.fp16_accumulation and config.infer.precision not in ("fp16", "auto"):
        yield (
            f"infer.fp16_accumulation does nothing with infer.precision {config.infer.precision}: "
            "--set infer.precision=fp16"
        )
    if limit is not None and limit <= train.save_every_minutes:
        yield (
            f"train.save_every_minutes {train.save_every_minutes:g} is no shorter than the time "
            f"limit of train, {limit} minutes: --set train.save_every_minutes={max(1, limit // 5)}"
        )
