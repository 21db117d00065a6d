"""The sum over the ranks: what goes wrong is told, and nothing is left running."""

from __future__ import annotations

from pathlib import Path

import pytest

from yelp_hpc.ranks.allreduce import all_reduce


def test_two_processes_add_up() -> None:
    found = all_reduce(2)
    assert found["correct"]
    assert (found["ranks"], len(found["devices"])) == (2, 2)
    assert found["gb_per_s"] > 0


def test_a_rank_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    # behind the package's own folder, before the installed torch
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = all_reduce(2)
    assert found["problem"].startswith("rank ")
    assert "ImportError: libcudart.so.12: no such file" in found["problem"]


def test_a_sum_that_never_comes_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "no sum within 1 s" in all_reduce(2, limit=1.0)["problem"]
