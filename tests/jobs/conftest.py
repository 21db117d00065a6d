"""Makes run directories whose stages are played by fake_stage.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fake_run import FakeRun


@pytest.fixture(autouse=True)
def a_login_node_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are judged by their files alone: no child is started."""
    monkeypatch.setattr("yelp_hpc.models.door.NEEDED", ("no_such_package",))


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., FakeRun]:
    def make(name: str = "run", shards: int = 3, cluster: Any = None, **plan: Any) -> FakeRun:
        return FakeRun(tmp_path / name, shards, cluster or {}, **{"steps": 3, **plan})

    return make
