"""The Hub token: where it comes from, and how it is kept out of every text.

Reads `HF_TOKEN`, then the file of `publish.token_file` (mode 0600), then the Hub's own login
(`hf auth login`). Writes nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from yelp_hpc.cache import hub_home
from yelp_hpc.errors import RequestError
from yelp_hpc.runtime import TOKEN_VARIABLES

HIDDEN = "[token]"
# What a token of the Hub looks like, wherever it came from.
_SHAPE = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9._-]{8,}|(?<=Bearer )[^\s'\"]+")


@dataclass(frozen=True)
class Token:
    """A secret that neither prints nor pickles; `source` says where it was found."""

    secret: str = field(repr=False)
    source: str

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Hub token is not to be pickled")


def find_token(token_file: str | None = None) -> Token | None:
    """The token to use, None when there is none.

    Raises:
        RequestError: the token file is missing, readable by others or empty, or what was found
            cannot be a token (spaces, control or non-ASCII characters in it).
    """
    for name in TOKEN_VARIABLES:
        if value := os.environ.get(name, "").strip():
            return _checked(value, f"the environment variable {name}")
    if token_file is not None:
        return _checked(_read(Path(token_file).expanduser()), f"the file {token_file}")
    from huggingface_hub import get_token

    login = get_token()
    return _checked(login, "the Hub's login (hf auth login)") if login else None


def login_file(env: Mapping[str, str]) -> Path:
    """Where `hf auth login` keeps its token, as huggingface_hub decides it; read without it."""
    named = env.get("HF_TOKEN_PATH") or hub_home(env) / "token"
    return Path(os.path.expanduser(named))  # noqa: PTH111 - never raises


def hub_token(env: Mapping[str, str], token_file: str | None = None) -> str | None:
    """The Hub's token: from the environment, `publish.token_file` or `hf auth login`.

    Read here, on the host: neither file need be visible inside the image.

    Raises:
        RequestError: the token file cannot be used.
    """
    if token_file or any(env.get(name) for name in TOKEN_VARIABLES):
        token = find_token(token_file)
        return token.secret if token else None
    with suppress(OSError):
        return login_file(env).read_text(encoding="utf-8").strip() or None
    return None


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise RequestError(f"publish.token_file {path} cannot be read: {reason}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RequestError(
            f"publish.token_file {path} can be read by others (mode {stat.S_IMODE(mode):04o}); "
            f"close it first: chmod 600 {path}"
        )
    if not text:
        raise RequestError(f"publish.token_file {path} is empty")
    return text


def _checked(text: str, source: str) -> Token:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise RequestError(
            f"what {source} holds cannot be a Hub token: it has spaces, line ends or non-ASCII "
            "characters; copy the token again from the Hub's settings"
        )
    return Token(text, source)


def redact(text: Any, *secrets: str) -> str:
    """`text` without tokens: the given ones, the environment's, and all that look like one."""
    result = str(text)
    known = {*secrets, *(os.environ.get(name, "").strip() for name in TOKEN_VARIABLES)} - {""}
    for secret in sorted(known, key=len, reverse=True):
        for form in (secret, quote(secret, safe="")):
            result = result.replace(form, HIDDEN)
    return _SHAPE.sub(HIDDEN, result)
