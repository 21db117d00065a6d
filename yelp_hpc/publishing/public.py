"""What leaves the machine is a list: the public record of a run, and the files that may go.

Pure but for looking at where links lead. A field that is not named here stays here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from yelp_hpc.cache import cache_folder, repository
from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.evaluation.outcome import is_number
from yelp_hpc.models.local import TOKENIZER_FILES
from yelp_hpc.publishing.card import base_model_id, data_id

VOCABULARY = {*TOKENIZER_FILES} - {"chat_template.jinja", "tokenizer_config.json"}
"""Files in which every word of a language may stand beside every other."""
_PRIVATE = ("token_file", "where", "branch", "pull_request")
"""Of the section `publish`: how it was uploaded, which is nobody's business."""
_LOCAL_KEYS = ("name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file",
               "vocab_file", "cache_dir")  # fmt: skip
"""Keys in which the Hub's libraries write where a file lay."""


def public_record(record: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What of run.json goes up: enough to run it again; no path, no user, no diff.

    Local files are named, not located; uncommitted changes are given by their SHA-256.
    """
    model, image = _section(record, "model"), _section(record, "image")
    data = _section(record, "data")
    return {
        "created": _text(record.get("created")),
        "config": {"resolved": public_config(config)},
        "seed": config.seed,
        "code": _code(_section(record, "code")),
        "python": _text(record.get("python")),
        "packages": _texts(record.get("packages")),
        "lock_sha256": _texts(record.get("lock_sha256")),
        "image": {"sha256": _text(image.get("sha256"))} if image.get("sha256") else None,
        "model": {
            "path": base_model_id(config) or PurePath(config.model.path).name,
            "revision": config.model.revision,
            "fingerprint": _text(model.get("fingerprint")),
        },
        "data": {
            **{key: data[key] for key in ("truncated", "duplicates") if is_number(data.get(key))},
            **{
                key: {
                    name: n
                    for name, n in _section(data, key).items()
                    if is_number(n) and _text(name) is not None
                }
                for key in ("rows", "tokens")
            },
            "fingerprint": _text(data.get("fingerprint")),
        }
        if data
        else None,
    }


def public_config(config: Config) -> dict[str, Any]:
    """The configuration with local files by their names alone."""
    values = config.model_dump(mode="json")
    values["model"]["path"] = (
        config.model.path
        if config.model.path.startswith("demo:")
        else base_model_id(config) or PurePath(config.model.path).name
    )
    for key in ("train", "test"):
        if values["data"].get(key):
            values["data"][key] = PurePath(values["data"][key]).name
    for key in ("adapter", "from"):
        if _is_path(values["train"].get(key) or ""):
            values["train"][key] = PurePath(values["train"][key]).name
    if values["data"].get("path"):
        values["data"]["path"] = data_id(config) or PurePath(values["data"]["path"]).name
    for key in _PRIVATE:
        values["publish"].pop(key, None)
    return values


def without_local_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's or model's configuration without the paths that libraries leave in it."""
    return {
        key: value
        for key, value in values.items()
        if key not in _LOCAL_KEYS or not isinstance(value, str) or not _is_path(value)
    }


def leads_outside(path: Path, folders: Sequence[Path]) -> bool:
    """Whether `path`, links followed, is no regular file below one of `folders`."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return True
    roots = (folder.resolve() for folder in folders)
    return not real.is_file() or not any(real.is_relative_to(root) for root in roots)


def refuse_links(content: Mapping[str, Path | bytes], folders: Sequence[Path]) -> None:
    """Raises RequestError naming each file that a link puts elsewhere than in `folders`."""
    problems = [
        f"{name}: {path} leads to a file outside of the run, the model and the cache; put a copy "
        "in its place"
        for name, path in sorted(content.items())
        if isinstance(path, Path) and leads_outside(path, folders)
    ]
    if problems:
        raise RequestError(all_problems("these files cannot leave the machine:", problems))


def allowed_folders(run: Path, model: Path) -> list[Path]:
    """Where files that are uploaded may lie: the run, the base model and our cache."""
    folders = [run, model, cache_folder()]
    place = repository(model)  # links lead into its blobs
    if place and not (place / "blobs").is_symlink():
        folders.append(place / "blobs")
    return folders


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~", "./", "../")) or value.count("/") > 1


def _code(code: Mapping[str, Any]) -> dict[str, Any]:
    diff = code.get("diff")
    digest = hashlib.sha256(diff.encode(errors="surrogatepass")).hexdigest() if diff else None
    return {
        "version": _text(code.get("version")),
        "git_sha": _text(code.get("git_sha")),
        "dirty": bool(code.get("dirty")),
        "diff_sha256": digest,
    }


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _texts(values: Any) -> dict[str, str]:
    return dict(_text_items(values)) if isinstance(values, dict) else {}


def _text_items(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if (text := _text(value)) is not None and _text(key) is not None:
            yield key, text


def _text(value: Any) -> str | None:
    """A word such as a version or a digest; what holds more is no such word."""
    short = isinstance(value, str) and len(value) <= 100 and "/" not in value
    return value if short and value.isprintable() else None
