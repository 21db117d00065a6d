"""Validation rows that overflow half precision are computed again, in fp32."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.inference.test_scoring import TREES, overflowing
from tests.models.test_packed import sequences
from yelp_hpc.models.packed.batch import prepare_model
from yelp_hpc.ranks.rank import StopRequest
from yelp_hpc.ranks.world import World
from yelp_hpc.training.data import Rows
from yelp_hpc.training.validation import Validation

ANSWERS = {"one token": [[5], [9], [11], [30], [31]], "several": [[5, 6], [5, 9], [11]]}


@pytest.mark.parametrize("tree", TREES)
def test_a_validation_that_overflows_is_that_of_fp32(tree: str) -> None:
    half = overflowing("llama")
    exact = copy.deepcopy(half).float()
    prompts = sequences(4)
    ends = np.cumsum([0, *map(len, prompts)])
    answers = ANSWERS[tree]
    labels = [i % len(answers) for i in range(len(prompts))]
    rows = Rows(np.concatenate(prompts).astype(np.int32), ends, labels, answers, 2, 4)
    world = World(0, 1, torch.device("cpu"))
    found = []
    for model, precision in ((half, "fp16"), (exact, "fp32")):
        stop = StopRequest()
        checks = Validation(prepare_model(model), rows, TREES[tree], precision, world, stop)
        found.append(checks.sums(range(len(prompts)), 64))
    again, wanted = found
    assert wanted and wanted[-2] > 1 and again == pytest.approx(wanted, rel=2e-3)
