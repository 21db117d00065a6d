"""Fetching: a folder is taken as it is, what cannot be a name is refused, hashes are checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from yelp_hpc.errors import RequestError, StageError
from yelp_hpc.models.fetch import fetch_model

CONTENT = b'{"model_type": "llama"}'


def cached(cache: Path, content: bytes) -> Path:
    """The Hub's cache of one file whose blob is named after CONTENT's sha256."""
    repo = cache / "models--some--model"
    blob = repo / "blobs" / hashlib.sha256(CONTENT).hexdigest()
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (blob.parent, snapshot, repo / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(content)
    (snapshot / "config.json").symlink_to(Path("../..") / "blobs" / blob.name)
    (repo / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_local_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert fetch_model(str(tmp_path)) == tmp_path


def test_a_path_that_does_not_exist_is_no_hub_model() -> None:
    with pytest.raises(RequestError, match="neither a folder"):
        fetch_model("./models/missing")


def test_a_cached_model_is_found_by_its_commit(tmp_path: Path, offline: None) -> None:
    snapshot = cached(tmp_path, CONTENT)
    assert fetch_model("some/model", "0" * 40, tmp_path) == snapshot


def test_a_model_not_in_the_cache_is_named(tmp_path: Path, offline: None) -> None:
    with pytest.raises(StageError, match=r"some/other.*not in the cache"):
        fetch_model("some/other", "0" * 40, tmp_path)


def test_a_file_with_another_hash_is_named_and_removed(tmp_path: Path, offline: None) -> None:
    snapshot = cached(tmp_path, CONTENT + b" ")
    with pytest.raises(StageError, match=r"checksum of config\.json"):
        fetch_model("some/model", "0" * 40, tmp_path)
    assert not (snapshot / "config.json").exists()
    assert list((snapshot.parents[1] / "blobs").iterdir()) == []
