"""What the Hub answers is said as what it is, with the page to visit or the command to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import serving
from tests.hub.state import Fault, Hub
from yelp_hpc.errors import RequestError, StageError, YelpHpcError
from yelp_hpc.models.fetch import fetch_model


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
