"""Stage publish: the adapter (or merged model), its card and its record in one commit to the Hub.

Reads `train/adapter/`, `metrics.json`, `run.json`, the pictures and the base model's
tokenizer files; writes `published.json`. The token never leaves this process's memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.data.hub import endpoint
from yelp_hpc.errors import RequestError, StageError, all_problems, in_shell
from yelp_hpc.evaluation.confusion_plot import draw_confusion
from yelp_hpc.models.checkpoint import LONGEST_HEADER
from yelp_hpc.models.local import TOKENIZER_FILES
from yelp_hpc.progress import plain, say
from yelp_hpc.publishing.card import base_model_id, model_card
from yelp_hpc.publishing.hub import Backoff, HubFile, Published, Target, publish_files
from yelp_hpc.publishing.public import (
    VOCABULARY,
    allowed_folders,
    public_record,
    refuse_links,
    without_local_keys,
)
from yelp_hpc.publishing.secrets import find_secrets
from yelp_hpc.publishing.token import Token, find_token, redact
from yelp_hpc.rundir import attempts
from yelp_hpc.rundir.changes import settings_of
from yelp_hpc.rundir.collected import as_written
from yelp_hpc.rundir.files import (
    MARKER,
    damaged_files,
    json_bytes,
    read_json,
    read_marker,
    read_object,
    remove,
    sweep,
    temporary_name,
    write_json,
)
from yelp_hpc.rundir.paths import ADAPTER_CONFIG, ADAPTER_FILES, RunPaths


def run(
    paths: RunPaths, config: Config, dry_run: bool = False, backoff: Backoff | None = None
) -> None:
    """Publish the run, or do nothing when it is published already.

    Without publish.repo_id it says so, records it and ends well, so that a chain does too.

    Args:
        dry_run: print the card and the files with their sizes; no network, nothing written.

    Raises:
        RequestError: no token, or the token, the name or the visibility is refused.
        StageError: an earlier stage is not done, or the Hub keeps failing.
    """
    publish = config.publish
    if not dry_run:
        sweep(paths.root)
    if publish.repo_id is None and not dry_run:
        say("publish: publish.repo_id is not set, so nothing is published")
        if not paths.published.exists():
            write_json(paths.published, {"repo_id": None, "skipped": "publish.repo_id is not set"})
        return
    if publish.branch and publish.pull_request:
        raise RequestError(
            "publish.branch and publish.pull_request exclude each other: a pull request is opened "
            "against the main branch; set one of them"
        )
    check_finished(paths)
    with ExitStack() as stack:
        files = collect_files(paths, config, stack)
        refuse_secrets(files)
        if dry_run:
            print(plain(preview(config, files)), flush=True)
            return
        assert publish.repo_id is not None
        target = Target(publish.repo_id, publish.private, publish.branch, publish.pull_request)
        before = _read_published(paths)
        settings = settings_of(config, "publish")
        if before.get("files") == describe_files(files) and before.get("target") == vars(target):
            write_json(
                paths.published, {**before, "settings": settings}
            )  # the launcher looks at it
            say(
                f"publish: already done, {before.get('url')} (commit {before.get('commit')}); "
                f"delete {paths.published} to look at the Hub again"
            )
            return
        token = find_token(publish.token_file)
        if token is None:
            raise RequestError(
                "there is no Hub token: set HF_TOKEN, name a file of mode 0600 in "
                "publish.token_file, or log in with `hf auth login`"
            )
        refuse_token(paths, files, token)
        obsolete = _obsolete(before, files, publish.repo_id)
        message = f"{config.name}: {'merged model' if publish.merged else 'LoRA adapter'}, metrics"
        try:
            done = publish_files(files, target, token, message, obsolete=obsolete, backoff=backoff)
        except OSError as error:
            # A fault outside the Hub's own errors; its text could quote a request.
            raise StageError(f"publish failed: {redact(error, token.secret)}") from None
        write_json(paths.published, {**record(done, target, files), "settings": settings})
    where = done.pull_request or f"{done.url} (commit {done.commit})"
    say(f"publish: {'done' if done.committed else 'the Hub has all of it already'}, {where}")


def check_finished(paths: RunPaths) -> None:
    """Refuse a run that is not done.

    Raises:
        StageError: lists what earlier stages still owe.
    """
    if "taken" in (read_marker(paths.adapter) or {}):
        raise StageError(
            f"{paths.root} evaluated an adapter that was trained elsewhere (train.adapter): "
            "publish the run that trained it"
        )
    problems = damaged_files(paths.adapter)
    problems += [
        f"{path} is missing" for path in (paths.metrics, paths.run_json) if not path.is_file()
    ]
    if problems:
        raise StageError(
            all_problems("publish needs a finished run:", problems)
            + f"\nSee `python -m yelp_hpc status --run {in_shell(paths.root)}` "
            "for the stage to run first."
        )


def collect_files(paths: RunPaths, config: Config, stack: ExitStack) -> list[HubFile]:
    """Everything that is uploaded, by name; `stack` holds temporary folders open."""
    content: dict[str, Path | bytes] = {}
    record = read_object(paths.run_json)
    folder = base_folder(record, config)
    content |= {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if config.publish.merged:
        from yelp_hpc.publishing.export import export_merged

        # Beside the run: as large as the base model, and node-local disks often are not.
        scratch = temporary_name(paths.root / "merged")
        stack.callback(remove, scratch)
        scratch.mkdir()
        merged = scratch / "model"
        export_merged(paths, config, merged)
        content |= {p.name: p for p in merged.iterdir() if p.is_file() and p.name != MARKER}
    else:
        content |= {name: paths.adapter / name for name in ADAPTER_FILES}
        content[ADAPTER_CONFIG] = portable_adapter_config(paths, config)
    content["metrics.json"] = paths.metrics
    content["run.json"] = json_bytes(public_record(record, config))
    diff = (record.get("code") or {}).get("diff")
    if config.publish.include_diff and isinstance(diff, str):
        content["changes.diff"] = diff.encode(errors="surrogatepass")
    metrics = read_object(paths.metrics)
    pictures: dict[str, Path | bytes] = {}
    if paths.loss_png.is_file():
        pictures["loss.png"] = paths.loss_png
    remedy = f"make it again: python -m yelp_hpc collect --run {in_shell(paths.root)}"
    with as_written(paths.metrics, remedy):
        if tuned := metrics["models"].get("tuned"):
            pictures["confusion.png"] = draw_confusion(
                tuned["confusion"], tuned["confusion_columns"]
            )
        content |= pictures
        card = model_card(
            config,
            metrics,
            record,
            pictures=sorted(pictures),
            gpu_hours=gpu_hours(paths),
            native=_model_type(folder) == "chatglm",
        )
    content["README.md"] = card.encode()
    refuse_links(content, allowed_folders(paths.root, folder))
    for name in ("config.json", "tokenizer_config.json"):
        if isinstance(path := content.get(name), Path):
            values = read_object(path)
            if (kept := without_local_keys(values)) != values:
                content[name] = json_bytes(kept)
    return [HubFile.of(name, content[name]) for name in sorted(content)]


def base_folder(record: Mapping[str, Any], config: Config) -> Path:
    """The base model's folder: where prepare found it, else wherever it is found now."""
    recorded = (record.get("model") or {}).get("folder")
    if isinstance(recorded, str) and Path(recorded).is_dir():
        return Path(recorded)
    from yelp_hpc.models.local import model_folder

    return model_folder(config.model)


def portable_adapter_config(paths: RunPaths, config: Config) -> bytes:
    """adapter_config.json with the base model's Hub id in place of a path of this machine."""
    values = read_json(paths.adapter / ADAPTER_CONFIG)
    path = config.model.path
    values["base_model_name_or_path"] = base_model_id(config) or Path(path).name
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def gpu_hours(paths: RunPaths) -> attempts.GpuHours | None:
    """GPU-hours of the run, without this very stage: None without a GPU."""
    found = attempts.gpu_hours(a for a in attempts.of_run(paths) if a.name != "publish")
    return found if found.used else None


def refuse_secrets(files: Sequence[HubFile]) -> None:
    """Search every text that would be uploaded.

    Raises:
        RequestError: with the file, the line and the kind of everything that looks secret.
    """
    problems = [
        f"{file.name} line {line}: {kind}"
        for file in files
        for line, kind in find_secrets(_text_of(file), file.name not in _UNREAD)
    ]
    if problems:
        raise RequestError(
            all_problems("what would be uploaded holds what looks like secrets:", problems)
            + "\nNothing was uploaded. Remove each there and make it invalid where it was issued."
        )


def refuse_token(paths: RunPaths, files: Sequence[HubFile], token: Token) -> None:
    """Look for the token in everything that would be uploaded, and in run.json.

    Raises:
        RequestError: a file holds it.
    """
    contents = [(file.name, _bytes_of(file)) for file in files if file.size < 50_000_000]
    for name, content in [*contents, (paths.run_json.name, paths.run_json.read_bytes())]:
        if token.secret.encode() in content:
            raise RequestError(
                f"{name} holds the Hub token of {token.source}; nothing was uploaded. "
                "Remove it there and make a new token, for this one has been written to disk"
            )


_UNREAD = VOCABULARY | {"loss.png", "confusion.png"}
"""Where a name beside a random value says nothing: known shapes alone are searched."""


def _text_of(file: HubFile) -> bytes:
    """What of a file can hold text: of tensors their header."""
    if file.name.endswith(".safetensors") and isinstance(file.content, Path):
        with file.content.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            return opened.read(min(length, LONGEST_HEADER))
    return _bytes_of(file)


def _bytes_of(file: HubFile) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def describe_files(files: Sequence[HubFile]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each, for `published.json`."""
    return [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in files]


def record(done: Published, target: Target, files: Sequence[HubFile]) -> dict[str, Any]:
    """The content of published.json."""
    return {
        "repo_id": target.repo_id,
        "url": done.url,
        "commit": done.commit,
        "pull_request": done.pull_request,
        "target": vars(target),
        "published": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": describe_files(files),
    }


def preview(config: Config, files: Sequence[HubFile]) -> str:
    """The card and every other text made for the upload; each file's name, size and SHA-256."""
    publish = config.publish
    card = next(f.content for f in files if f.name == "README.md")
    assert isinstance(card, bytes)
    where = publish.repo_id or "nowhere (publish.repo_id is not set)"
    kind = "private" if publish.private else "public"
    how = "a pull request" if publish.pull_request else f"branch {publish.branch or 'main'}"
    width = max(len(f.name) for f in files)
    lines = [f"  {f.name:<{width}}  {f.size:>14,} bytes  sha256:{f.sha256}" for f in files]
    made = [
        f"--- {f.name}\n{f.content.decode(errors='replace').rstrip()}\n"
        for f in files
        if isinstance(f.content, bytes) and f.name.endswith((".json", ".diff"))
    ]
    total = sum(f.size for f in files)
    return "\n".join(
        [
            card.decode().rstrip(),
            "",
            *made,
            f"{len(files)} files to {where} at {endpoint()} ({kind}, {how}):",
            *lines,
            f"  {'total':<{width}}  {total:>14,} bytes",
        ]
    )


def _read_published(paths: RunPaths) -> dict[str, Any]:
    """published.json, {} when it is missing, torn or not ours (it is then made again)."""
    try:
        found = read_object(paths.published)
        names = [file["name"] for file in found.get("files", [])]
    except (StageError, TypeError, KeyError):
        return {}
    return found if all(isinstance(name, str) for name in names) else {}


def _obsolete(before: dict[str, Any], files: Sequence[HubFile], repo_id: str) -> list[str]:
    """Files that an earlier publication of this run put there and that this one does not have."""
    if before.get("repo_id") != repo_id:
        return []
    names = {file.name for file in files}
    return [f["name"] for f in before.get("files", []) if f["name"] not in names]


def _model_type(folder: Path) -> str | None:
    try:
        return str(read_object(folder / "config.json").get("model_type"))
    except StageError:
        return None
