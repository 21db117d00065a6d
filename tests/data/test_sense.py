"""Legal but senseless settings are warned of; the shipped ones are not."""

from __future__ import annotations

import pytest

from yelp_hpc.config import Config, TrainConfig, load_config
from yelp_hpc.data.sense import warnings


def config(**train: object) -> Config:
    values = {"model": {"path": "m"}, "data": {"source": "demo"}, "train": train}
    return Config.model_validate(values)


@pytest.mark.parametrize(
    ("train", "rows", "limit", "expected"),
    [
        ({"warmup_steps": 20, "global_batch": 16}, (192, 500), None, "as long as the training"),
        ({"warmup_steps": 8, "max_steps": 8}, (900, 500), None, "--set train.warmup_steps=0"),
        ({"global_batch": 64}, (40, 500), None, "more than the 40 training rows"),
        ({}, (900, 20), None, "only 20 test rows"),
        ({"save_every_minutes": 30}, (900, 500), 30, "--set train.save_every_minutes=6"),
    ],
)
def test_what_makes_no_sense_is_said(
    train: dict[str, object], rows: tuple[int, int], limit: int | None, expected: str
) -> None:
    (said,) = warnings(config(**train), *rows, limit)
    assert expected in said


def test_balance_of_rows_that_are_not_drawn_is_said() -> None:
    values = {"model": {"path": "m"}, "data": {"source": "demo", "balanced": True}}
    (said,) = warnings(Config.model_validate(values), 900, 500)
    assert "set data.train_rows" in said


def test_the_default_warm_up_is_a_tenth_of_the_steps_at_most() -> None:
    assert [TrainConfig().warmup(steps) for steps in (1, 9, 10, 95, 200, 5000)] == [
        0,
        0,
        1,
        9,
        20,
        20,
    ]
    assert TrainConfig(warmup_steps=20).warmup(12) == 20  # given is given
    assert list(warnings(config(), 900, 500, 60)) == []


def test_the_shipped_configs_are_sound() -> None:
    for name, rows in (("demo", (1504, 500)), ("yelp_chatglm3", (150_400, 50_000))):
        loaded = load_config(name).config
        assert loaded.train.warmup_steps == 20
        assert list(warnings(loaded, *rows, 720)) == []


def test_sums_in_fp16_of_another_format_are_said() -> None:
    values = {"model": {"path": "m"}, "data": {"source": "demo"}}
    infer = {"precision": "bf16", "fp16_accumulation": True}
    (said,) = warnings(Config.model_validate({**values, "infer": infer}), 900, 500, None)
    assert "--set infer.precision=fp16" in said
