"""Interrupted in ten ways, the training ends with the very bytes of an uninterrupted one."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.tiny import make_model, prepare_run, tiny_config
from yelp_hpc.config import Config
from yelp_hpc.rundir.files import damaged_files, read_jsonl
from yelp_hpc.rundir.paths import RunPaths, step_of

LAUNCHER = """
import json, sys
from yelp_hpc.config import config_from_dict
from yelp_hpc.errors import YelpHpcError
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages.train import run
try:
    run(RunPaths(sys.argv[1]), config_from_dict(json.loads(sys.argv[2])))
except YelpHpcError as error:
    print(f"verdict: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
STEPS = 100
WAIT = 400  # seconds, on a machine with much else to do
LAUNCHED: list[Launch] = []


class Launch:
    """A training in processes of its own."""

    def __init__(self, run: RunPaths, config: Config, **environ: str) -> None:
        self.run = run
        LAUNCHED.append(self)
        self.output = run.root / f"output-{time.monotonic_ns()}"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, str(run.root), config.model_dump_json()],
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
            )

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def until_step(self, step: int) -> int:
        """Wait until the log holds `step`; returns the last step there."""
        self._until(lambda: last_step(self.run) >= step)
        return last_step(self.run)

    def until_writing(self) -> None:
        """Wait until a checkpoint is being written."""
        self._until(lambda: any(self.run.checkpoints.glob(".step-*.tmp/state.json")), 2e-4)

    def _until(self, condition: Callable[[], bool], pause: float = 0.01) -> None:
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if condition():
                return
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(pause)  # the ranks want the cores
        pytest.fail(f"waited too long:\n{self.output.read_text()}")

    def kill(self) -> None:
        """SIGKILL to the launcher alone; its ranks must follow it."""
        ranks = self.ranks()
        assert len(ranks) == 2
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + 10
        while any(alive(pid) for pid in ranks):
            assert time.monotonic() < end, "a rank outlived its launcher"
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """The exit code and what was said."""
        code = self.process.wait(timeout=WAIT)
        return code, self.output.read_text()


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    while LAUNCHED:
        launch = LAUNCHED.pop()
        if launch.process.poll() is None:
            launch.process.kill()
            launch.process.wait()


def alive(pid: int) -> bool:
    with suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def last_step(run: RunPaths) -> int:
    return max((line["step"] for line in read_jsonl(run.train_log)), default=0)


def newest(run: RunPaths) -> Path:
    """The newest checkpoint that is whole."""
    found = [p for p in run.checkpoints.glob("step-*") if not damaged_files(p)]
    return max(found, key=lambda path: step_of(path) or 0)


def digest(run: RunPaths) -> str:
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.timeout(1800)
def test_ten_interruptions_change_no_byte(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    calm, rough = prepare_run(tmp_path / "calm", model), RunPaths(tmp_path / "rough")
    shutil.copytree(calm.root, rough.root)
    config = tiny_config(
        model, train={"nproc": 2, "epochs": 20, "max_steps": STEPS, "save_every_steps": 5}
    )
    code, said = Launch(calm, config).end()
    assert code == 0, said

    def interrupted(launch: Launch) -> None:
        """It says that it saved, and no finished step is lost."""
        code, said = launch.end()
        assert code == 75, said
        if last := last_step(rough):
            assert step_of(newest(rough)) == last

    launch = Launch(rough, config)  # 1: before anything was done
    while len(launch.ranks()) != 2:
        time.sleep(0.01)
    launch.process.send_signal(signal.SIGUSR2)
    interrupted(launch)

    launch = Launch(rough, config)  # 2: SIGUSR2 at some step
    launch.until_step(7)
    launch.process.send_signal(signal.SIGUSR2)
    interrupted(launch)

    launch = Launch(rough, config)  # 3: SIGTERM
    launch.until_step(16)
    launch.process.send_signal(signal.SIGTERM)
    interrupted(launch)

    launch = Launch(rough, config)  # 4: SIGKILL of the launcher: nothing left behind
    launch.until_step(25)
    launch.kill()

    launch = Launch(rough, config)  # 5: SIGKILL of one rank: the job ends at once and says who
    launch.until_step(34)
    os.kill(launch.ranks()[1], signal.SIGKILL)
    code, said = launch.end()
    assert code == 1
    assert "verdict: rank 1 was killed by SIGKILL" in said

    torn = False
    launch = Launch(rough, config)  # 6: SIGKILL in the middle of writing a checkpoint
    launch.until_step(43)
    launch.until_writing()
    os.kill(launch.ranks()[0], signal.SIGKILL)
    torn = any(rough.checkpoints.glob(".step-*.tmp"))
    assert launch.end()[0] == 1

    launch = Launch(rough, config)  # 7: the newest checkpoint cut in half afterwards
    launch.until_step(52)
    launch.kill()
    cut = newest(rough)
    weights = cut / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)

    launch = Launch(rough, config)  # 8: the signal reaches one rank only
    launch.until_step(63)
    os.kill(launch.ranks()[1], signal.SIGUSR2)
    interrupted(launch)
    assert f"checkpoint {cut} is damaged and skipped" in launch.output.read_text()

    launch = Launch(rough, config)  # 9: two signals, one after the other
    launch.until_step(74)
    launch.process.send_signal(signal.SIGUSR2)
    launch.process.send_signal(signal.SIGTERM)
    interrupted(launch)

    # 10: the time is nearly up
    interrupted(Launch(rough, config, YELP_HPC_DEADLINE=str(time.time() + 9)))

    code, said = Launch(rough, config).end()
    assert code == 0, said
    assert torn, "the kill did not hit a write"
    assert digest(rough) == digest(calm)
    lines, undisturbed = read_jsonl(rough.train_log), read_jsonl(calm.train_log)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        assert [x.get(key) for x in lines] == [x.get(key) for x in undisturbed]
    assert lines[-1]["restarts"] >= 8
    assert not list(rough.checkpoints.glob(".*"))


SHARED = {"epochs": 2, "save_every_steps": 2, "evaluate_every": 6, "micro_batches": 4}


def ended(run: RunPaths, config: Config, **environ: str) -> str:
    """What a training said that ended well."""
    code, said = Launch(run, config, **environ).end()
    assert code == 0, said
    return said


@pytest.mark.parametrize("ranks", [(4,), pytest.param((2, 3, 4, 8), marks=pytest.mark.slow)])
def test_any_number_of_ranks_trains_the_same_bytes(tmp_path: Path, ranks: Sequence[int]) -> None:
    """Dropout is on; the last batch of an epoch is small; a requeue meets another number."""
    model = make_model(tmp_path / "model")
    calm = prepare_run(tmp_path / "ranks-1", model, train=21)
    ended(calm, tiny_config(model, train=SHARED))
    log = read_jsonl(calm.train_log)
    assert len(log) == 6
    for nproc in ranks:
        run = prepare_run(tmp_path / f"ranks-{nproc}", model, train=21)
        ended(run, tiny_config(model, train={**SHARED, "nproc": nproc}))
        assert digest(run) == digest(calm), nproc
        assert len(list(run.logs.glob("train-rank-*.log"))) == nproc
        for key in ("loss", "grad_norm", "validation_loss"):
            assert [x.get(key) for x in read_jsonl(run.train_log)] == [x.get(key) for x in log]

    moved = prepare_run(tmp_path / "moved", model, train=21)
    shutil.copytree(tmp_path / "ranks-4" / "train", moved.train)
    for step, nproc in ((4, 1), (5, 3)):
        shutil.rmtree(moved.adapter)
        for later in range(step + 1, 7):
            shutil.rmtree(moved.checkpoint(later), ignore_errors=True)
        settings = {**SHARED, "nproc": nproc, "save_every_steps": 1}
        assert f"going on from step {step}" in ended(moved, tiny_config(model, train=settings))
    assert digest(moved) == digest(calm)


def test_other_micro_batches_train_the_same_adapter_but_for_rounding(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = make_model(tmp_path / "model")
    adapters = []
    for pieces, max_tokens in ((1, 4096), (2, 100), (4, 64)):
        run = prepare_run(tmp_path / f"pieces-{pieces}", model, train=21)
        settings = {"epochs": 2, "micro_batches": pieces, "max_tokens": max_tokens}
        ended(run, tiny_config(model, train=settings))
        adapters.append(load_file(run.adapter / "adapter_model.safetensors"))
    for other in adapters[1:]:
        for name, tensor in adapters[0].items():
            assert abs(other[name] - tensor).max() < 1e-5, name
    assert any(abs(tensor).max() > 1e-3 for name, tensor in adapters[0].items() if "lora_B" in name)
