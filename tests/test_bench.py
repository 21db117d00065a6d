"""`make bench`: every benchmark of the folder is run by it, or it says what that one needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "benchmarks"
# Parts of others, and what makes data.
PARTS = {
    "bench",
    "faults_commands",
    "faults_small",
    "faults_stages",
    "faults_units",
    "peer_setup",
    "topics",
}


def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench", FOLDER / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_benchmark_is_forgotten_and_their_options_exist() -> None:
    module = bench()
    there = {path.stem for path in FOLDER.glob("*.py")} - PARTS
    assert there == {*module.COMMANDS, *module.ELSEWHERE}
    for name, options in module.COMMANDS.items():
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        for option in options:
            assert not option.startswith("--") or f'"{option}"' in text, (name, option)
