"""prepare: reviews → tokenised train, validation and test sets.

Reads the configured source and the model's tokenizer. Writes into `prepare/`: one parquet file a
set (`row` int64, `label` int16, `text`, `input_ids` list<int32> up to the answer, `length`
int32), `tokens.json` (the ids that later stages share), and what LLaMA-Factory reads
(`dataset_info.json` and alpaca records). The marker `complete.json` comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yelp_hpc.config import Config
from yelp_hpc.data.encoding import Encoder
from yelp_hpc.data.prepared import Chunk, PreparedSets
from yelp_hpc.data.prompt import Prompt
from yelp_hpc.data.sampling import conflicting, duplicates, split_rows, text_keys
from yelp_hpc.data.sense import warnings
from yelp_hpc.data.sources import Table, read_source
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
    if paths.request.is_file():  # rows to be answered, not sets to be drawn
        from yelp_hpc.stages import predict

        predict.prepare(paths, config)
        return
    sweep(paths.prepare, paths.root)
    if paths.prepare.exists():
        problems = damaged_files(paths.prepare)
        if not problems:
            say("prepare: done already, nothing to do")
            return
        if read_marker(paths.prepare) is not None:
            say("prepare: made again, because " + "; ".join(problems))

    train_rows, test_rows = read_source(config)
    tested = train_rows if test_rows is None else test_rows
    splits = split_rows(
        train_rows.labels.tolist(),
        None if test_rows is None else test_rows.labels.tolist(),
        config.data,
        config.seed,
        config.task.labels,
        unusable=_unusable(train_rows, tested) if config.data.drop_duplicates else None,
    )

    # Imported here: a faulty source is reported before the slow imports.
    from yelp_hpc.models.load import check_tokenizer, load_tokenizer
    from yelp_hpc.models.local import folder_fingerprint, model_folder

    folder = model_folder(config.model)
    from yelp_hpc.stages.door import check_lengths, examine

    for note in examine(config, folder).notes:
        say(f"prepare: {note}")
    tokenizer = load_tokenizer(folder)
    end = check_tokenizer(tokenizer, folder)
    prompt = bind_prompt(config, tokenizer)

    sets = PreparedSets(paths, config, prompt)
    encode = Encoder(tokenizer, config.prompt.template)
    spelled: list[list[str]] = []
    keys: dict[str, list[NDArray[np.uint64]]] = {name: [] for name in SPLITS}

    def chunks(name: str) -> Iterator[Chunk]:
        table, rows = tested if name == "test" else train_rows, getattr(splits, name)
        starts = range(0, len(rows), CHUNK)
        for start in track(starts, len(starts), f"tokenise {name}"):
            ids = rows[start : start + CHUNK]
            texts = list(table.texts(ids))
            spelled.extend(found for found in map(encode.spelled, texts) if found)
            keys[name].append(text_keys(texts))
            yield ids, table.labels[ids].tolist(), texts

    for name in SPLITS:
        with sets.writing(name) as part:
            part.add(chunks(name))
    trained = np.concatenate([*keys["train"], *keys["validation"]])
    twins = duplicates(trained, np.concatenate(keys["test"]))
    labels = train_rows.labels[[*splits.train, *splits.validation]]
    conflicts = int(conflicting(trained, labels).sum())
    check_lengths(config, folder, sets.longest + prompt.longest_answer)
    sets.write_info()
    prefix = sets.prefix()
    write_json(paths.tokens, tokens_of(config, prompt, tokenizer, end, prefix))
    names = [paths.split(n).name for n in SPLITS] + [paths.alpaca(n).name for n in SPLITS]
    summary: dict[str, Any] = {
        "rows": sets.rows,
        "tokens": sets.tokens,
        "truncated": sets.truncated,
        "duplicates": twins,
        "conflicts": conflicts,
        "classes": sets.classes,
        **({"class_names": train_rows.names} if train_rows.names else {}),
        "fingerprint": sets.fingerprint,
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
    for warning in warnings(config, summary["rows"]["train"], summary["rows"]["test"]):
        say(f"prepare: warning: {warning}")
    longest, most = prompt.longest_answer, config.infer.max_new_tokens
    if config.infer.mode == "generate" and longest > most:
        say(
            f"prepare: warning: the longest label has {longest} tokens, but a model may write "
            f"{most}: --set infer.max_new_tokens={longest + 8}"
        )
    noun = config.task.noun
    if sets.truncated:
        say(f"prepare: {sets.truncated} {noun}s over {config.data.cutoff} tokens lost their end")
    if spelled:
        named = ", ".join(sorted({token for found in spelled for token in found}))
        say(f"prepare: {len(spelled)} {noun}s spell special tokens ({named}): kept as text")
    remedy = "data.drop_duplicates=true leaves them out of training"
    if twins:
        say(f"prepare: warning: {twins} test {noun}s also stand in the training data; {remedy}")
    if conflicts:
        say(
            f"prepare: warning: {conflicts} training {noun}s have another label elsewhere; {remedy}"
        )
    for name in ("train", "test"):
        absent = [i for i, rows in enumerate(sets.classes[name]) if not rows]
        if absent:
            shown = ", ".join(config.task.shown[i] for i in absent[:10])
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            say(f"prepare: warning: no {name} row has the label {shown}{more}")


def _unusable(train: Table, tested: Table) -> Callable[[list[int]], NDArray[np.bool_]]:
    """Given the test rows, the training rows that repeat one or contradict another."""

    def found(test: list[int]) -> NDArray[np.bool_]:
        keys = text_keys(train.texts(range(len(train))))
        repeated = np.isin(keys, text_keys(tested.texts(test)))
        out: NDArray[np.bool_] = repeated | conflicting(keys, train.labels)
        return out

    return found


def tokens_of(
    config: Config, prompt: Prompt, tokenizer: Any, end: int, prefix: list[int]
) -> dict[str, Any]:
    """The content of tokens.json: the ids that later stages share.

    `end`: what ends a sequence; `prefix`: what every prompt begins with.
    """
    return {
        "prefix": prefix,
        "label_ids": prompt.label_ids,
        **({"end_scored": True} if prompt.end_scored else {}),
        **({"lead": prompt.lead} if prompt.lead else {}),
        "eos_id": end,
        "pad_id": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "labels": list(config.task.labels),
        "cutoff": config.data.cutoff,
    }


def bind_prompt(config: Config, tokenizer: Any) -> Prompt:
    """The configured prompt, tokenised by `tokenizer`.

    Raises:
        RequestError: as `Prompt` does, or a label holds a special token.
    """
    encode = Encoder(tokenizer, config.prompt.template)
    prompt = Prompt(config.prompt.template, config.task.labels, encode, config.data.cutoff)
    encode.check_answers(prompt.labels, prompt.whole)
    return prompt
