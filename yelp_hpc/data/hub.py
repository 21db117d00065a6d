"""What the Hub's answers mean: gated, private, renamed, disabled, refused, too often, out of reach.

Turns the client's exceptions into our errors, with the page to visit or the command to type. Asks
nothing of the network itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from yelp_hpc.errors import RequestError, StageError, YelpHpcError, first_line
from yelp_hpc.own_files import pip_install

Kind = Literal["model", "data set"]
LOGIN = "`hf auth login` (or set HF_TOKEN)"
FETCH = "run `python -m yelp_hpc fetch --config FILE` where the network is, e.g. on the login node"


def page(kind: Kind, name: str) -> str:
    """The address at which a person sees it."""
    return f"{endpoint()}/{'datasets/' if kind == 'data set' else ''}{name}"


def endpoint() -> str:
    """The Hub's address."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def hub_error(kind: Kind, name: str, revision: str | None, error: BaseException) -> YelpHpcError:
    """What to raise instead of an exception of huggingface_hub or datasets."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_causes(error))
    if problem := shell_problem(error):
        return RequestError(problem)
    where, what = page(kind, name), f"{kind} {name}"
    for cause in chain:
        if isinstance(cause, GatedRepoError):
            return RequestError(
                f"{what} is gated: its owners ask you to accept their terms. Log in and accept "
                f"them on {where}, then {LOGIN} with an account that has access"
            )
        if isinstance(cause, DisabledRepoError):
            return RequestError(f"{what} is disabled by the Hub: {where} says why; use another")
        if isinstance(cause, RevisionNotFoundError):
            return RequestError(
                f"{what} has no revision {revision or 'main'}: {where}/commits/main lists them"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return RequestError(
                f"the Hub has no {what}, or it is private: look whether {where} is there; if it is "
                f"private, {LOGIN} with an account that may read it"
            )
        if isinstance(cause, HFValidationError):
            return RequestError(f"{what}: no such name is possible on the Hub: {first_line(cause)}")
        if isinstance(cause, OfflineModeIsEnabled):
            return StageError(
                f"{what} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or {FETCH}"
            )
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, HfHubHTTPError) and status is not None:
            return _by_status(what, where, int(status), cause)
    if any(_unreachable(cause) for cause in chain):
        return StageError(
            f"{what} is not in the cache and cannot be downloaded: {endpoint()} cannot be reached "
            f"from here ({first_line(chain[-1])}); {FETCH}"
        )
    return StageError(f"{what} could not be downloaded: {first_line(error)}; run it again")


def shell_problem(error: BaseException) -> str:
    """What of the shell's settings of the network keeps the client from asking; "" if nothing."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        place = os.environ.get(name)
        if place and not os.path.exists(place):  # noqa: PTH110 - never raises
            return f"{name} of your shell names {place}, which is not there: unset {name}"
    if not endpoint().startswith(("http://", "https://")):
        return f"HF_ENDPOINT of your shell is {endpoint()}, without a scheme: write https:// first"
    for cause in _causes(error):
        if isinstance(cause, ImportError) and "SOCKS" in str(cause):
            return (
                "a proxy of your shell speaks SOCKS, for which a package is missing: "
                f"{pip_install('socksio')}, or name an http proxy (ALL_PROXY)"
            )
        if type(cause).__name__ == "InvalidURL" or "proxy URL" in str(cause):
            return (
                f"a proxy of your shell cannot be one ({first_line(cause)}): write "
                "http://HOST:PORT into https_proxy, http_proxy and ALL_PROXY, or unset them"
            )
        if isinstance(cause, UnicodeEncodeError):
            return f"HF_TOKEN of your shell, or the login, is no token: {LOGIN}"
    return ""


def _by_status(what: str, where: str, status: int, error: BaseException) -> YelpHpcError:
    tokens = f"{endpoint()}/settings/tokens"
    if status == 401:
        return RequestError(
            f"the Hub refuses your token (401): it is wrong or expired. Make a new one on {tokens} "
            f"and {LOGIN}; {what} may need none: `hf auth logout`, or unset HF_TOKEN"
        )
    if status == 403:
        return RequestError(
            f"your token may not read {what} (403): give it that permission on {tokens}, and see "
            f"whether {where} asks you to accept its terms"
        )
    if status == 429:
        wait = getattr(error, "response").headers.get("Retry-After")  # noqa: B009
        when = f"wait {wait} s" if wait else "wait some minutes"
        return StageError(
            f"the Hub's rate limit is reached (429): {when} and run it again, it goes on where it "
            f"stopped; with a login the limit is higher: {LOGIN}"
        )
    if status >= 500:
        return StageError(
            f"the Hub has a fault of its own ({status}) with {what}: run it again later, it goes "
            "on where it stopped"
        )
    return StageError(f"the Hub refuses {what} ({status}): {first_line(error)}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on to the first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _unreachable(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    known = {"ConnectError", "ConnectTimeout", "ProxyError", "NetworkError", "TimeoutException"}
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & known)
