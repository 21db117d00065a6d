"""The configured model as a local folder: every later step reads the model from there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from yelp_hpc.cache import DEMO_MODEL, check_demo, hub_folder
from yelp_hpc.config import ModelConfig
from yelp_hpc.data import demo

TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json",
    "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "vocab.txt",
)  # fmt: skip
"""Every file of a tokenizer that a model folder may hold."""


def model_folder(model: ModelConfig) -> Path:
    """The local folder of the configured model, fetched or made on first use.

    A Hub model is looked for in the cache of the Hub's own client first.

    Raises:
        RequestError: the demo model's name is unknown, or the folder or Hub id cannot be used.
        StageError: it could not be fetched.
    """
    check_demo(model.path)
    if model.path == DEMO_MODEL:
        return demo.model_folder()
    local = Path(model.path).expanduser()
    if local.is_dir():  # before the slow import of what downloads
        return local
    from yelp_hpc.models.fetch import fetch_model, seen_model

    seen = seen_model(model.path, model.revision)
    return seen or fetch_model(model.path, model.revision, hub_folder())


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over the names, sizes and contents of a model folder's files, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "."):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {path.stat().st_size} {content}\n".encode())
    return digest.hexdigest()
