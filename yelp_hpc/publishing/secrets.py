"""Secrets in what is about to leave the machine: which kind, in which line; never the secret.

The kinds and their shapes are those that gitleaks and detect-secrets look for, each as its issuer
documents it. A value of no known shape counts when it is assigned to a name that speaks of a secret
and looks random.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = {
    "Hugging Face token": rb"\b(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9]{16,}",
    "AWS access key": rb"\b(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16}\b",
    "GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,})",
    "GitLab token": rb"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat)-[\w-]{20,}",
    "private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    rb"|PuTTY-User-Key-File-\d|\bAGE-SECRET-KEY-1[A-Z0-9]{58}",
    "Slack token": rb"\bxox[a-z](?:\.[a-z]+)?-[\w-]{10,}|\bxapp-\d-[\w-]{10,}"
    rb"|hooks\.slack\.com/(?:services|workflows)/[\w/+-]{20,}",
    "OpenAI or Anthropic key": rb"\bsk-(?!learn)(?:(?:proj|svcacct|admin|ant)-)?[A-Za-z0-9]"
    rb"[\w-]{19,}",
    "Google key": rb"\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}",
    "Stripe key": rb"\b[rs]k_(?:live|test|prod)_[A-Za-z0-9]{10,}",
    "SendGrid key": rb"\bSG\.[\w-]{16,}\.[\w-]{16,}",
    "Twilio key": rb"\bSK[0-9a-f]{32}\b",
    "npm token": rb"\bnpm_[A-Za-z0-9]{36}",
    "PyPI token": rb"\bpypi-[\w-]{50,}",
    "Databricks token": rb"\bdapi[0-9a-f]{32}",
    "Telegram token": rb"\b\d{8,10}:AA[\w-]{32,}",
    "Azure storage key": rb"AccountKey=[A-Za-z0-9+/]{40,}={0,2}",
    "Weights & Biases key": rb"\bwandb_v\d_\w{20,}|(?i:wandb)[^@/]{0,60}?\b[0-9a-f]{40}\b",
    "registry login": rb"\"auth\"\s*:\s*\"[A-Za-z0-9+/]{8,}={0,2}\"",
    "Kaggle key": rb"\"key\"\s*:\s*\"[0-9a-f]{32}\"",
    "netrc password": rb"\bmachine\s+\S+\s+(?:login\s+\S+\s+)?password\s+\S+",
    "JSON web token": rb"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "password in a URL": rb"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"<>{}$]*:[^\s/@'\"<>{}$]+@[\w.-]",
    "authorization header": rb"(?i)\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)"
    rb"\s+[\w.~+/=-]{8,}",
}  # fmt: skip
_SHAPES = {kind: re.compile(shape) for kind, shape in KINDS.items()}
_ASSIGNED = re.compile(
    rb"(?i)(?:pass(?:word|wd|phrase)?|pwd|secret|(?:api|access|private|secret|auth|account)[_.-]?key"
    rb"|token|credentials?)[\"']?\s*(?::=|=>|[:=])\s*[\"']?([^\s\"',;<>\[\](){}$\\]{8,})"
)
_NETRC = re.compile(rb"^[+-]?\s*password\s+(\S{8,})\s*$")
"""A line of a .netrc, where nothing stands between the name and the value."""
_BITS = 2.7
"""Entropy of a character (Shannon) from which a value counts as random: `abcabc123` has 2.6."""


def find_secrets(content: bytes, assignments: bool = True) -> Iterator[tuple[int, str]]:
    """`(line, kind)` of everything in `content` that looks like a secret; lines count from 1.

    Args:
        assignments: also look at `password = …`; a tokenizer's vocabulary is full of such words.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        for kind, shape in _SHAPES.items():
            if shape.search(line):
                yield number, kind
        if assignments:
            given = [*_ASSIGNED.findall(line), *_NETRC.findall(line)]
            if any(map(_is_random, given)):
                yield number, "assigned secret"


def _is_random(value: bytes) -> bool:
    """Whether a value looks drawn, not written: letters and digits, hardly any of them twice."""
    if not (re.search(rb"[A-Za-z]", value) and re.search(rb"[0-9]", value)):
        return False
    counts = Counter(value).values()
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts)
    return bits >= _BITS
