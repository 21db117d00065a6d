"""The ecosystem's folders: the Hub's own cache is looked at first and left as it is."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_model
from yelp_hpc.cache import cache_folder, cached_folders, seen_hub
from yelp_hpc.config import ModelConfig, config_from_dict
from yelp_hpc.data import demo
from yelp_hpc.errors import StageError
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import inside, with_inputs
from yelp_hpc.jobs.doctor import probes
from yelp_hpc.models.local import model_folder
from yelp_hpc.publishing.token import login_file
from yelp_hpc.rundir.files import atomic_folder, damaged_files, write_marker

ROOT = Path(__file__).parents[2]
COMMITS = ("a" * 40, "b" * 40)
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}


def downloaded(hub: Path, commit: str, files: dict[str, bytes] = FILES) -> Path:
    """A model as the Hub's client leaves it: links to blobs that are named after their hash."""
    repo = hub / "models--some--model"
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", snapshot, repo / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    (repo / "refs" / "main").write_text(commit)
    return snapshot


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("YELP_HPC_HUB", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_secret")
    return tmp_path / "hf"


def test_the_hubs_own_cache_is_taken_first_and_left_as_it_is(home: Path) -> None:
    ours = downloaded(cache_folder() / "hub", COMMITS[0])
    assert model_folder(ModelConfig(path="some/model")) == ours
    old, new = (downloaded(home / "hub", commit) for commit in COMMITS)
    before = everything(home)
    assert model_folder(ModelConfig(path="some/model")) == new  # refs/main names it
    assert model_folder(ModelConfig(path="some/model", revision=COMMITS[0][:7])) == old
    assert cached_folders("some/model") == [new, old, ours]
    assert everything(home) == before


def test_what_is_partial_or_damaged_there_is_not_taken_and_not_touched(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = downloaded(home / "hub", COMMITS[0], {"config.json": FILES["config.json"]})
    assert cached_folders("some/model") == []
    with pytest.raises(StageError, match="not in the cache"):
        model_folder(ModelConfig(path="some/model"))
    damaged = downloaded(home / "hub", COMMITS[1])
    (damaged / "model.safetensors").resolve().write_bytes(b"altered")
    before = everything(home)
    ours = downloaded(cache_folder() / "hub", COMMITS[1])
    assert model_folder(ModelConfig(path="some/model")) == ours
    assert "checksum of model.safetensors is wrong; left as it is" in capsys.readouterr().err
    assert everything(home) == before and partial.is_dir()


def test_the_image_sees_the_model_in_it_read_only_and_not_the_token(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded(home / "hub", COMMITS[0])
    settings = {"container": {"image": "i.sif", "cache": str(tmp_path / "room")}}
    cluster = ClusterConfig.model_validate(settings)
    config = config_from_dict({"model": {"path": "some/model"}, "data": {"source": "demo"}})
    container = with_inputs(cluster, config, tmp_path / "run").container
    assert container is not None
    repo = home / "hub" / "models--some--model"
    assert container.binds == (f"{repo}:{repo}:ro",)
    argv = inside(container, tmp_path / "run", ["true"], {"HF_HOME": str(home)})
    assert f"YELP_HPC_HUB={home / 'hub'}" in argv and "token" not in shlex.join(argv)
    # in the image HF_HOME is another folder: the variable leads to the same snapshot
    values = dict(word.split("=", 1) for word in argv if "=" in word)
    for name in ("HF_HOME", "YELP_HPC_HUB", "YELP_HPC_CACHE"):
        monkeypatch.setenv(name, values[name])
    assert values["HF_HOME"] != str(home)
    assert model_folder(ModelConfig(path="some/model")).is_relative_to(repo)


def test_where_the_folders_are(tmp_path: Path) -> None:
    assert seen_hub({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert seen_hub({"HF_HOME": "/b"}) == Path("/b/hub")
    assert seen_hub({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert seen_hub({"XDG_CACHE_HOME": "c"}) == Path.home() / ".cache/huggingface/hub"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YELP_HPC_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", "/c")
        assert cache_folder() == Path("/c/yelp_hpc")
        patch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == Path.home() / ".cache" / "yelp_hpc"


@pytest.mark.parametrize(
    "theirs",
    [{"HF_HOME": "~/hub"}, {"XDG_CACHE_HOME": "/caches"}, {"HF_TOKEN_PATH": "~/t"}, {}],
    ids=str,
)
def test_the_hubs_login_is_where_its_client_keeps_it(theirs: dict[str, str]) -> None:
    code = "from huggingface_hub.constants import HF_TOKEN_PATH; print(HF_TOKEN_PATH)"
    env = {"HOME": str(Path.home()), **theirs}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert login_file(theirs) == Path(done.stdout.strip())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_may_be_read_as_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    import torch
    from safetensors.torch import save_file

    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps({}))
            write_marker(folder, ["model.safetensors", "config.json"])
    finally:
        os.umask(before)
    made = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()}
    assert made == dict.fromkeys(("model.safetensors", "config.json", "complete.json"), mode)
    assert damaged_files(tmp_path / "model") == []


def test_a_cache_that_cannot_be_one_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(demo, "download", lambda *_: pytest.fail("fetched"))
    for use in (demo.model_folder, demo.rated_snippets):
        with pytest.raises(StageError, match=r"cannot be made: .*export YELP_HPC_CACHE=DIR"):
            use()
    assert probes.folder(probes.disk(tmp_path / "file" / "models")).problem == "it is no folder"
    assert probes.folder(probes.disk(tmp_path / "new" / "models")).problem == ""


@pytest.mark.parametrize("command", ["fetch", "plan"])
def test_with_a_cluster_file_the_models_of_its_cache_are_those_of_a_command(
    tmp_path: Path, command: str
) -> None:
    """On the login node as in the image: what lies in `container.cache` is there."""
    made = make_model(tmp_path / "made")
    files = {path.name: path.read_bytes() for path in made.iterdir() if path.is_file()}
    snapshot = downloaded(tmp_path / "roomy" / "hub", COMMITS[0], files)
    (tmp_path / "cluster.yaml").write_text("container: {image: x.sif, cache: roomy}\n")
    rows = "source: file, train: rows.csv, test_rows: 1"
    (tmp_path / "c.yaml").write_text(f"model: {{path: some/model}}\ndata: {{{rows}}}\n")
    (tmp_path / "rows.csv").write_text("label,text\n1,good\n2,bad\n3,fine\n")
    argv = [sys.executable, "-m", "yelp_hpc", command, "--config", "c.yaml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env |= {"YELP_HPC_CACHE": str(tmp_path / "small")}
    where = ["--cluster", "cluster.yaml"]
    done, without = (
        subprocess.run([*argv, *more], cwd=tmp_path, env=env, capture_output=True, text=True)
        for more in (where, [])
    )
    assert done.returncode == 0, done.stderr
    assert without.returncode != 0
    if command == "fetch":
        assert done.stdout.splitlines() == [f"model: {snapshot}"]
