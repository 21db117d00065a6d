"""A GPU that was given and cannot be used is an error, never a slow CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import make_model, prepare_run, tiny_config
from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.ranks.device import given_gpus, precision_here, usable_gpus
from yelp_hpc.stages import train


@pytest.mark.parametrize(
    ("environ", "given"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_JOB_GPUS": "0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8a1"}, "CUDA_VISIBLE_DEVICES=GPU-8a1"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE=4"),
    ],
)
def test_what_says_that_gpus_were_given(environ: dict[str, str], given: str | None) -> None:
    assert given_gpus(environ) == given


def test_four_ranks_whose_driver_counts_gpus_that_cuda_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    run = prepare_run(tmp_path / "run", model)
    before = sorted(run.root.rglob("*"))

    def broken() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", broken)
    with pytest.raises(RequestError, match=r"counts 4 GPUs.*driver on your system is too old"):
        train.run(run, tiny_config(model, train={"nproc": 4}))
    assert sorted(run.root.rglob("*")) == before
    monkeypatch.setenv("YELP_HPC_CPU", "1")
    assert usable_gpus() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU can be used")
def test_a_rank_that_was_given_a_gpu_does_not_take_the_cpu() -> None:
    code = "from yelp_hpc.ranks.world import join_world; join_world()"
    hidden = ("SLURM_JOB_ID", "YELP_HPC_CPU")
    environ = {k: v for k, v in os.environ.items() if k not in hidden}
    environ |= {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ
    )
    assert done.returncode and "CUDA_VISIBLE_DEVICES=0" in done.stderr


@pytest.mark.parametrize(
    ("cards", "found"),
    [
        ('[["NVIDIA GeForce RTX 3090", 8, 6]]', ("bf16", "NVIDIA GeForce RTX 3090")),
        ('[["NVIDIA H100", 9, 0], ["Tesla T4", 7, 5]]', ("fp16", "Tesla T4")),
        ('[["NVIDIA B200", 10, 0], ["NVIDIA H100", 9, 0]]', ("bf16", "NVIDIA H100")),
    ],
)
def test_precision_auto_is_that_of_the_oldest_card(
    monkeypatch: pytest.MonkeyPatch, cards: str, found: tuple[str, str]
) -> None:
    monkeypatch.setattr("yelp_hpc.ranks.device.usable_gpus", lambda: 2)
    monkeypatch.setattr("yelp_hpc.ranks.device._NAME_CARDS", f"print('noise'); print({cards!r})")
    assert precision_here() == found
    monkeypatch.setattr("yelp_hpc.ranks.device._NAME_CARDS", "raise RuntimeError('no driver')")
    with pytest.raises(StageError, match="RuntimeError: no driver"):
        precision_here()


def test_precision_auto_is_fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YELP_HPC_CPU", "1")
    chosen, machine = precision_here()
    assert chosen == "fp32" and machine.startswith("CPU ")


def test_this_torch_names_its_cards() -> None:
    from yelp_hpc.ranks.device import _NAME_CARDS

    done = subprocess.run([sys.executable, "-c", _NAME_CARDS], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("]"), done.stderr
