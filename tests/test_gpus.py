"""The table of GPUs: every way to write a card's name, and nothing that only looks like one."""

from __future__ import annotations

import random
import string
import subprocess
import sys

import pytest
import torch

from yelp_hpc.errors import RequestError
from yelp_hpc.gpus import CARDS, auto_precision, card_named, find_card
from yelp_hpc.training import throughput

WRITTEN = {
    "RTX 3090": "rtx3090 rtx_3090 3090 geforce_rtx_3090 NVIDIA-GeForce-RTX-3090",
    "RTX A4000": "rtx_a4000 RTXA4000 a4000 NVIDIA_RTX_A4000",
    "RTX A6000": "rtx_a6000 a6000",
    "RTX 6000 Ada": "NVIDIA_RTX_6000_Ada_Generation rtx6000ada rtx_6000_ada",
    "Quadro RTX 6000": "quadro_rtx_6000 Quadro-RTX-6000",
    "RTX 2080 Ti": "rtx2080ti NVIDIA_GeForce_RTX_2080_Ti 2080ti",
    "A100": "a100 NVIDIA_A100-SXM4-40GB NVIDIA_A100-PCIE-40GB a100_sxm4",
    "A100 80GB": "a100_80gb NVIDIA_A100-SXM4-80GB NVIDIA_A100_80GB_PCIe a100_80g",
    "H100": "h100 NVIDIA_H100_80GB_HBM3 gpu:h100",
    "H100 PCIe": "NVIDIA_H100_PCIe h100_pcie",
    "V100": "v100 Tesla_V100-SXM2-16GB",
    "V100 32GB": "v100_32gb Tesla_V100-SXM2-32GB",
    "V100 PCIe": "Tesla_V100-PCIE-16GB",
    "L4": "l4 NVIDIA_L4",
    "L40": "l40 NVIDIA_L40",
    "L40S": "l40s NVIDIA_L40S",
    "T4": "t4 Tesla_T4",
}
# Real GPUs, slices and parts of names that are not in the table, whatever they hold.
ABSENT = """
t400 t4g t1000 t2000 quadro_t400 l20 l2 l4s l40g rtx_3090_ti rtx3080 rtx3080ti rtx3060
rtx4080 rtx_4090_d rtx4090_laptop_gpu rtx_a400 rtx_a1000 rtx_a2000 rtx_a4500 rtx_a5500
rtx4000 rtx_4000_ada rtx_5000_ada rtx6000 rtx_6000 quadro_rtx_4000 quadro_rtx_5000
rtx_pro_6000 a10g a10m a16 a2 a800 a100x a1000 a30x a40-8q h100_nvl h100_96gb h800 h20
h200_nvl gh200 gb200 b200 b100 v100s v100s-pcie-32gb p100 p40 p4 k80 m40 gtx1080ti gtx_1650
titan_v titan_rtx mi250 mi300x a100_1g.5gb a100_3g.20gb a100_80gb_mig_1g.10gb h100_1g.10gb
1g.5gb mig gpu nvidia sxm4 pcie 80gb 100 a h rtx ada 6000 ti a100_20gb v100_80gb
t4_pcie_32gb a40_sxm4
"""


def test_every_card_is_found_by_the_names_that_people_slurm_and_cuda_give_it() -> None:
    for card in CARDS:
        assert find_card(card.name) is card
    for name, written in WRITTEN.items():
        for form in written.split():
            assert find_card(form.replace("_", " ")).name == name
            assert find_card(form).name == name


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [("T4", 15360), ("L4", 23034), ("A10", 23028), ("A40", 46068), ("L40S", 46068),
     ("RTX 3090", 24576), ("A100", 40960), ("RTX A6000", 49140)],
)  # fmt: skip
def test_a_cards_memory_is_what_nvidia_smi_shows_of_it(name: str, mebibytes: int) -> None:
    """Error correction takes a sixteenth of GDDR6 where it is on as delivered."""
    assert find_card(name).memory == pytest.approx(mebibytes * 2**20, rel=0.001)


@pytest.mark.parametrize("name", ["", *ABSENT.split()])
def test_no_absent_card_is_taken_for_one_of_the_table(name: str) -> None:
    assert card_named(name) is None
    with pytest.raises(RequestError, match="no GPU"):
        find_card(name)


def test_a_name_with_another_letter_is_another_card() -> None:
    """Whatever is added to, taken from or changed in a name, no part of it is enough."""
    draw = random.Random(3)
    # memory and form are words of their own
    whole = [card.name for card in CARDS if not card.name.endswith(("GB", "PCIe"))]
    plain = {"".join(c for c in name.lower() if c.isalnum()): name for name in whole}
    letters = string.ascii_lowercase + string.digits
    for name in 60 * sorted(plain):
        at, letter = draw.randrange(len(name) + 1), draw.choice(letters)
        other = draw.choice([name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :]])
        found = card_named(other)
        bare = {key.removeprefix("rtx"): value for key, value in plain.items()}
        assert (found.name if found else None) == {**bare, **plain}.get(other), other


def test_a_refusal_names_the_nearest_and_all() -> None:
    with pytest.raises(RequestError, match="did you mean RTX 3090") as raised:
        find_card("rtx3909")
    assert all(card.name in str(raised.value) for card in CARDS)


def test_bf16_came_with_compute_capability_8() -> None:
    for card in CARDS:
        assert (card.bf16 is not None) == (card.capability >= (8, 0))
    assert find_card("quadro_rtx_6000").bf16 is None
    assert find_card("rtx_a4000").memory == 16 * 2**30


@pytest.mark.parametrize(
    ("device", "peak"), [("NVIDIA L40", 181e12), ("NVIDIA T400 4GB", None), ("NVIDIA L4", 121e12)]
)
def test_training_measures_itself_against_the_card_of_the_table(
    device: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YELP_HPC_PEAK_TFLOPS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert throughput.peak_flops(torch.device("cuda"), "bf16") == peak


def test_the_plan_says_what_a_small_card_holds() -> None:
    argv = [sys.executable, "-m", "yelp_hpc", "plan", "--config", "configs/yelp_chatglm3.yaml"]
    for name, code, words in (
        ("rtx_a4000", 0, "4 × RTX A4000 (16 GB)"),
        ("t400", 2, "no GPU 't400' in the table"),
    ):
        done = subprocess.run([*argv, "--gpu", name], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert words in done.stdout + done.stderr


def test_precision_auto_is_bf16_on_the_cards_that_have_it() -> None:
    assert auto_precision(None) == "fp32"
    for card in CARDS:
        assert auto_precision(card.capability) == ("bf16" if card.bf16 else "fp16")
