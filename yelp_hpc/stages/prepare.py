"""prepare: reviews → tokenised train, validation and test sets.

Reads the configured source and the model's tokenizer. Writes into `prepare/`: one parquet file a
set (`row` int64, `label` int16, `text`, `input_ids` list<int32> up to the answer, `length`
int32), `tokens.json` (the ids that later stages share), and what LLaMA-Factory reads
(`dataset_info.json` and alpaca records). The marker `complete.json` comes last.
"""

from __future__ import annotations

import hashlib
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.data.prompt import Prompt, common_prefix
from yelp_hpc.data.sampling import duplicates, split_rows
from yelp_hpc.data.sources import Row, read_source
from yelp_hpc.progress import say, track
from yelp_hpc.rundir.files import damaged_files, read_marker, sweep, write_json, write_marker
from yelp_hpc.rundir.manifest import update_run
from yelp_hpc.rundir.paths import SPLITS, RunPaths

CHUNK = 500  # reviews a call of the tokenizer


def run(paths: RunPaths, config: Config) -> None:
    """Make the prepared sets, unless they are there and whole.

    Raises:
        RequestError: the source or the prompt cannot be used; every faulty row is named.
        StageError: a download or a write failed.
    """
    sweep(paths.prepare, paths.root)
    if paths.prepare.exists():
        problems = damaged_files(paths.prepare)
        if not problems:
            say("prepare: done already, nothing to do")
            return
        if read_marker(paths.prepare) is not None:
            say("prepare: made again, because " + "; ".join(problems))

    train_rows, test_rows = read_source(config)
    splits = split_rows(
        [label for _, label in train_rows],
        None if test_rows is None else [label for _, label in test_rows],
        config.data,
        config.seed,
        config.task.labels,
    )
    if test_rows is None:
        test_rows = train_rows
    chosen: dict[str, list[tuple[int, Row]]] = {
        "train": [(i, train_rows[i]) for i in splits.train],
        "validation": [(i, train_rows[i]) for i in splits.validation],
        "test": [(i, test_rows[i]) for i in splits.test],
    }
    twins = duplicates(
        [text for name in ("train", "validation") for _, (text, _) in chosen[name]],
        [text for _, (text, _) in chosen["test"]],
    )

    # Imported here: a faulty source is reported before the slow imports.
    from yelp_hpc.models.load import load_tokenizer
    from yelp_hpc.models.local import folder_fingerprint, model_folder

    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    prompt = bind_prompt(config, tokenizer)

    tables, truncated = {}, 0
    for name in SPLITS:
        tables[name], cut = _tokenise(prompt, name, chosen[name])
        truncated += cut
    prefix = _shared_prefix(prompt, tables)
    _write(paths, config, prompt, tables)
    tokens = {
        "prefix": prefix,
        "label_ids": prompt.label_ids,
        **({"end_scored": True} if prompt.end_scored else {}),
        **({"lead": prompt.lead} if prompt.lead else {}),
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id,
        "labels": list(config.task.labels),
        "cutoff": config.data.cutoff,
    }
    write_json(paths.tokens, tokens)
    names = [paths.split(n).name for n in SPLITS] + [paths.alpaca(n).name for n in SPLITS]
    summary: dict[str, Any] = {
        "rows": {name: len(tables[name]["row"]) for name in SPLITS},
        "tokens": {name: sum(tables[name]["length"]) for name in SPLITS},
        "truncated": truncated,
        "duplicates": twins,
        "fingerprint": _fingerprint(tables),
    }
    update_run(
        paths,
        data=summary,
        model={
            "path": config.model.path,
            "revision": config.model.revision,
            "folder": str(folder),
            "fingerprint": folder_fingerprint(folder),
        },
    )
    # last: who finds it finds run.json filled in too
    covered = [*names, paths.dataset_info.name, paths.tokens.name]
    write_marker(paths.prepare, covered, summary=summary)
    counts = ", ".join(f"{count} {name}" for name, count in summary["rows"].items())
    mean = sum(summary["tokens"].values()) / sum(summary["rows"].values())
    say(f"prepare: {counts} rows, {mean:.0f} tokens each, {len(prefix)} of them shared by all")
    if truncated:
        say(f"prepare: {truncated} reviews over {config.data.cutoff} tokens lost their end")
    if twins:
        say(f"prepare: warning: {twins} test reviews also stand in the training data")


def bind_prompt(config: Config, tokenizer: Any) -> Prompt:
    """The configured prompt, tokenised by `tokenizer`. Raises as `Prompt` does."""

    def encode(texts: list[str]) -> list[list[int]]:
        ids = tokenizer(texts)["input_ids"]
        return [list(one) for one in ids]

    return Prompt(config.prompt.template, config.task.labels, encode, config.data.cutoff)


def _tokenise(
    prompt: Prompt, name: str, rows: list[tuple[int, Row]]
) -> tuple[dict[str, list[Any]], int]:
    """Columns of one set, and how many of its reviews were cut."""
    columns: dict[str, list[Any]] = {
        key: [] for key in ("row", "label", "text", "input_ids", "length")
    }
    truncated = 0
    starts = range(0, len(rows), CHUNK)
    for start in track(starts, len(starts), f"tokenise {name}"):
        part = rows[start : start + CHUNK]
        reviews = [text for _, (text, _) in part]
        ids, used = prompt.fit(reviews)
        truncated += sum(a != b for a, b in zip(reviews, used, strict=True))
        columns["row"] += [row for row, _ in part]
        columns["label"] += [label for _, (_, label) in part]
        columns["text"] += used
        columns["input_ids"] += ids
        columns["length"] += [len(one) for one in ids]
    return columns, truncated


def _shared_prefix(prompt: Prompt, tables: dict[str, dict[str, list[Any]]]) -> list[int]:
    """The token ids that every prompt of the run begins with: never a token of a review."""
    head = common_prefix(prompt.encode([prompt.text(review) for review in ("a", "Z", "0", "é")]))
    sequences = [ids for table in tables.values() for ids in table["input_ids"]]
    shared = min(head, common_prefix(sequences), min(map(len, sequences)) - 1)
    return list(sequences[0][:shared])


def _write(
    paths: RunPaths, config: Config, prompt: Prompt, tables: dict[str, dict[str, list[Any]]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from yelp_hpc.rundir.files import atomic_path

    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("label", pa.int16()),
            ("text", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("length", pa.int32()),
        ]
    )
    head, tail = config.prompt.template.split("{review}")
    instruction, _, before = head.rpartition("\n")
    after = tail.removesuffix("{label}").rstrip()
    for name, columns in tables.items():
        with atomic_path(paths.split(name)) as path:
            pq.write_table(pa.table(columns, schema=schema), path)
        records = [
            {
                "instruction": instruction,
                "input": before + text + after,
                "output": config.task.labels[label],
            }
            for text, label in zip(columns["text"], columns["label"], strict=True)
        ]
        write_json(paths.alpaca(name), records)
    write_json(
        paths.dataset_info,
        {
            f"yelp_{name}": {
                "file_name": paths.alpaca(name).name,
                "columns": {"prompt": "instruction", "query": "input", "response": "output"},
            }
            for name in SPLITS
        },
    )


def _fingerprint(tables: dict[str, dict[str, list[Any]]]) -> str:
    """SHA-256 over row ids, labels and token ids of all sets."""
    digest = hashlib.sha256()
    for name in SPLITS:
        table = tables[name]
        for row, label, ids in zip(table["row"], table["label"], table["input_ids"], strict=True):
            digest.update(f"{name} {row} {label} {ids}\n".encode())
    return digest.hexdigest()
