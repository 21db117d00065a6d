"""What the Hub answers is said as what it is, with the page to visit or the command to type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import serving
from tests.hub.state import Fault, Hub
from yelp_hpc.errors import RequestError, StageError, YelpHpcError
from yelp_hpc.models.fetch import fetch_model
from yelp_hpc.own_files import IMPORT_ROOT


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(tmp_path / "hub")) as made:
        made.create("me/model", private=False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield made


def refused(status: int, code: str = "", message: str = "no", **headers: str) -> Fault:
    named = {"X-Error-Code": code} if code else {}
    return Fault("/api/models/", status, 99, {**named, **headers}, message)


CASES = [
    (refused(401, "GatedRepo"), RequestError, r"is gated.*accept.*/me/model.*hf auth login"),
    (refused(403, "GatedRepo"), RequestError, r"is gated.*accept.*/me/model.*hf auth login"),
    (
        refused(401, message="Invalid credentials in Authorization header"),
        RequestError,
        r"refuses your token.*settings/tokens.*hf auth login",
    ),
    (
        refused(401, "RepoNotFound"),
        RequestError,
        r"has no model me/model, or it is private: .*/me/model.*hf auth login",
    ),
    (refused(404, "RepoNotFound"), RequestError, "has no model me/model"),
    (refused(404, "RevisionNotFound"), RequestError, r"no revision main.*/commits/main"),
    (
        refused(403, message="Access to this resource is disabled."),
        RequestError,
        "is disabled by the Hub",
    ),
    (refused(403, message="not yours"), RequestError, r"may not read.*settings/tokens"),
    (refused(429, **{"Retry-After": "0"}), StageError, r"rate limit.*wait 0 s.*hf auth login"),
    (refused(500), StageError, r"fault of its own \(500\)"),
]


@pytest.mark.parametrize(("fault", "kind", "says"), CASES, ids=lambda v: getattr(v, "status", ""))
def test_each_refusal_of_the_hub_is_said_as_what_it_is(
    fault: Fault, kind: type[YelpHpcError], says: str, hub: Hub, tmp_path: Path
) -> None:
    hub.faults.append(fault)
    with pytest.raises(kind) as error:
        fetch_model("me/model", cache_dir=tmp_path / "cache")
    assert re.search(says, str(error.value)), error.value
    assert error.value.__cause__ is not None


def test_no_network_is_no_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(StageError, match=r"127.0.0.1:9 cannot be reached.*yelp_hpc fetch"):
        fetch_model("me/model", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", "SOCKS.*pip install socksio"),
        ("https_proxy", "http://me:secret@proxy:port", "Invalid port.*write http://HOST:PORT"),
        ("https_proxy", "foo://me:secret@proxy:1", "Unknown scheme.*write http://HOST:PORT"),
        ("HF_TOKEN", "hf_ä", "is no token"),
        ("SSL_CERT_FILE", "/nowhere.pem", "SSL_CERT_FILE of your shell names /nowhere.pem"),
        ("HF_ENDPOINT", "hf-mirror.com", "HF_ENDPOINT of your shell is hf-mirror.com"),
    ],
)
def test_what_the_shell_says_of_the_network_and_cannot_be_is_named(
    name: str, value: str, says: str, tmp_path: Path
) -> None:
    code = "import sys; from yelp_hpc.models.fetch import fetch_model as f; f('a/b', cache_dir='x')"
    env = {**os.environ, name: value, "PYTHONPATH": str(IMPORT_ROOT), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(f"RequestError: .*{says}", last), done.stderr
    assert "secret" not in last
