"""A thin probe of the Hub: whether it can be reached, and whether it takes the token."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from contextlib import suppress

from yelp_hpc.data.hub import endpoint
from yelp_hpc.errors import RequestError
from yelp_hpc.jobs.doctor.facts import Hub
from yelp_hpc.publishing.token import find_token, login_file
from yelp_hpc.runtime import TOKEN_VARIABLES


def hub(token_file: str | None, timeout: float = 8) -> Hub:
    """Reach the Hub with the token that a publication would use."""
    secret, facts = _token(token_file)
    facts |= {"endpoint": endpoint()}
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Hub.model_validate({**facts, "offline": True})
    path = "/api/whoami-v2" if secret else "/api/models?limit=1"
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    accepted = None
    try:
        request = urllib.request.Request(endpoint() + path, headers=headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout):
            accepted = True if secret else None
    except urllib.error.HTTPError as error:
        accepted = False if secret and error.code in (401, 403) else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Hub.model_validate({**facts, "problem": str(reason)})
    return Hub.model_validate({**facts, "accepted": accepted})


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer; followed, it would take the token to another host."""

    def redirect_request(self, *arguments: object) -> None:
        return None


def _token(token_file: str | None) -> tuple[str, dict[str, object]]:
    facts: dict[str, object] = {}
    if token_file or any(os.environ.get(name, "").strip() for name in TOKEN_VARIABLES):
        try:
            token = find_token(token_file)
        except RequestError as error:
            return "", {"token_problem": str(error), "token_path": token_file or ""}
        if token:
            return token.secret, {"token": token.source}
    # huggingface_hub's login, read without it: the login node need not have it
    path = login_file(os.environ)
    secret = ""
    with suppress(OSError):
        secret = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode & 0o777
        facts = {"token": "the Hub's login", "token_path": str(path), "token_mode": mode}
    return secret, facts if secret else {}
