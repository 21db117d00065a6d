"""What jobs run is what was submitted: code and settings against digests, pickles, folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.fake_run import FakeRun
from yelp_hpc.errors import StageError
from yelp_hpc.jobs.chain import submit
from yelp_hpc.jobs.cluster import ClusterConfig, Container
from yelp_hpc.jobs.executor import freeze_cluster
from yelp_hpc.jobs.image import check_image
from yelp_hpc.jobs.snapshot import check_line, exposed, freeze, require_frozen
from yelp_hpc.rundir.paths import RunPaths

Damage = Callable[[Path, Path], object]


def plant_file(code: Path, settings: Path) -> None:
    (code / "sitecustomize.py").write_text("print('planted')")


def plant_link(code: Path, settings: Path) -> None:
    (code / "torch").symlink_to("/tmp")


def plant_bytecode(code: Path, settings: Path) -> None:
    (code / "yelp_hpc" / "__pycache__").mkdir()
    (code / "yelp_hpc" / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"planted")


def tear(code: Path, settings: Path) -> None:
    path = code / "yelp_hpc" / "errors.py"
    path.write_bytes(path.read_bytes()[:100])


def lose(code: Path, settings: Path) -> None:
    (code / "yelp_hpc" / "errors.py").unlink()


def change_settings(code: Path, settings: Path) -> None:
    content = json.loads(settings.read_text())
    content["cluster"]["command"] = ["/tmp/planted"]
    settings.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage", [plant_file, plant_link, plant_bytecode, tear, lose, change_settings]
)
def test_what_was_planted_or_torn_is_not_run_and_is_made_again(
    tmp_path: Path, damage: Damage
) -> None:
    paths = RunPaths(tmp_path / "a run")
    code, settings = freeze(paths), freeze_cluster(paths, ClusterConfig())
    line = check_line(sys.executable, code, settings)
    require_frozen(code, settings)
    assert subprocess.run(["bash", "-c", line]).returncode == 0

    damage(code, settings)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 1 and "submit again" in done.stderr
    with pytest.raises(StageError, match="is not what was submitted"):
        require_frozen(code, settings)

    assert (freeze(paths), freeze_cluster(paths, ClusterConfig())) == (code, settings)
    require_frozen(code, settings)
    assert subprocess.run(["bash", "-c", line]).returncode == 0
    assert [path.name for path in paths.code.iterdir()] == [code.name]


def test_a_snapshot_that_was_planted_before_the_submission_is_replaced(
    fake_run: Callable[..., FakeRun],
) -> None:
    run = fake_run(shards=1, fail=["prepare"])
    code = freeze(RunPaths(run.root))
    (code / "yelp_hpc" / "jobs" / "supervisor.py").write_text("raise SystemExit('planted')")
    with pytest.raises(StageError, match="prepare failed"):
        submit("prepare", run.root, run.config, run.cluster, "local", say=lambda text: None)
    assert [line["name"] for line in run.trace()] == ["prepare"]
    pickles = list((run.root / "logs" / "local").glob("*.pkl"))
    assert len(pickles) == 2 and all(path.stat().st_mode & 0o077 == 0 for path in pickles)
    log = run.root / "logs" / "prepare.log"
    assert log.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_log_that_is_a_link_is_not_followed(
    fake_run: Callable[..., FakeRun], tmp_path: Path
) -> None:
    run, target = fake_run(shards=1), tmp_path / "target"
    (run.root / "logs").mkdir()
    (run.root / "logs" / "prepare.log").symlink_to(target)
    with pytest.raises(StageError, match=r"cannot write the log .*prepare\.log"):
        submit("prepare", run.root, run.config, run.cluster, "local", say=lambda text: None)
    assert not target.exists()


def test_folders_that_others_may_change_are_named(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.code.mkdir(parents=True)
    paths.logs.mkdir()
    assert exposed(paths) == []
    paths.code.chmod(0o777)
    paths.logs.chmod(0o1777)
    assert [text.split()[0] for text in exposed(paths)] == [str(paths.code), str(paths.logs)]
    paths.code.chmod(0o755)
    paths.logs.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(paths.root, 12345, -1)
        assert "belongs to 12345" in exposed(paths)[0]


def test_the_token_reaches_no_local_process_but_publishs(
    fake_run: Callable[..., FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(shards=1, steps=10)
    monkeypatch.setenv("HF_TOKEN", "hf_sentinelSENTINELsentinel")
    seen: set[str] = set()

    def look(text: str) -> None:
        if ": started" in text:
            for folder in Path("/proc").glob("[0-9]*"):
                if folder.name == str(os.getpid()):
                    continue
                try:
                    command = (folder / "cmdline").read_bytes()
                    environment = (folder / "environ").read_bytes()
                except OSError:
                    continue
                if str(run.root).encode() in command and b"hf_sentinel" in environment:
                    seen.add(command.decode())

    submit("all", run.root, run.config, run.cluster, "local", say=look)
    assert not seen
    assert os.environ["HF_TOKEN"] == "hf_sentinelSENTINELsentinel"


def test_an_image_that_cannot_be_looked_at_is_one_message(tmp_path: Path) -> None:
    container = Container(image=str(tmp_path / ("a" * 300)), cache=str(tmp_path))
    with pytest.raises(StageError, match="cannot be read: File name too long"):
        check_image(container, None)
