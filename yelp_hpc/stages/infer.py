"""infer: the predictions of one model on the test set, shard by shard.

Reads `prepare/test.parquet`, `prepare/tokens.json`, the model's folder and, for the tuned model,
`train/adapter`. Writes `infer/MODEL/shard-KKKK-of-NNNN.parquet`; while a shard runs, its parts in
`infer/.partial/MODEL/` and its progress in `infer/.progress/MODEL/`. A shard that was killed goes
on from its parts with the same batches, so its file is the one of an undisturbed run.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch

from yelp_hpc.config import Config
from yelp_hpc.data.answer_tree import answers_of
from yelp_hpc.errors import (
    NodeFault,
    RequestError,
    SavedForRequeue,
    StageError,
    first_line,
    in_shell,
)
from yelp_hpc.inference.predictor import Predictor, load_predictor
from yelp_hpc.inference.provenance import Provenance, wanted
from yelp_hpc.inference.shard_files import (
    damage_of_part,
    damage_of_shard,
    parts_of,
    predictions_table,
    read_lengths,
    read_parts,
    read_windows,
    row_ids_of,
    write_part,
    write_shard,
)
from yelp_hpc.inference.shards import plan_shards, plan_windows, spans
from yelp_hpc.progress import say, track
from yelp_hpc.ranks.device import precision_here
from yelp_hpc.ranks.rank import Flag, is_node_fault
from yelp_hpc.rundir import earlier
from yelp_hpc.rundir.files import (
    damaged_files,
    read_json,
    read_marker,
    read_object,
    sha256_file,
    sweep,
    write_json,
)
from yelp_hpc.rundir.manifest import settle_precision
from yelp_hpc.rundir.node_faults import recorded_faults, this_node
from yelp_hpc.rundir.origin import require_own_adapter
from yelp_hpc.rundir.paths import RunPaths, Task, shard_of
from yelp_hpc.stages.door import take_the_way

ModelName = Literal["base", "tuned"]

# A window is sorted by length before it is batched: the larger, the less padding; it bounds memory.
WINDOW_BATCHES = 32
# The most work, in seconds, that a kill without warning can cost (and a batch).
PART_SECONDS = 15.0
PROGRESS_SECONDS = 2.0


def run(
    paths: RunPaths, config: Config, model: ModelName = "base", shard: int | Task | None = None
) -> None:
    """Predict one shard, some or all of them, one after the other with the model loaded once.

    Raises:
        RequestError: there is no such shard.
        StageError: prepare or train is not complete, the memory of the device is too small.
        SavedForRequeue: SIGTERM or SIGUSR2 came, or (`NodeFault`) this node's hardware failed; what
            was predicted is kept.
    """
    shards = config.infer.shards
    asked = range(shards) if shard is None else [shard] if isinstance(shard, int) else shard
    if absent := [k for k in asked if not 0 <= k < shards]:
        raise RequestError(
            f"there is no shard {spans(absent)}: this run has shards 0 to {shards - 1}"
        )
    check_inputs(paths, config, model)
    config = settle_precision(paths, config, "infer", precision_here)
    provenance = wanted(paths, config, model)
    tokens = read_json(paths.tokens)
    lengths = read_lengths(paths.split("test"))
    plan = plan_shards(lengths, shards)
    earlier.move_in(paths)
    sweep(paths.predictions(model), paths.progress(model))
    shards_asked = [_Shard(paths, config, model, k, plan[k], provenance) for k in asked]
    unfinished = [job for job in shards_asked if not job.finished()]
    if not unfinished:
        what = "all shards are" if shard is None else f"shard {spans(asked)} is"
        say(f"infer {model}: {what} done, nothing to do")
        remove_other_divisions(paths, model, shards)
        return

    @cache
    def predictor() -> Predictor:
        adapter = paths.adapter if model == "tuned" else None
        longest = max(lengths) + max(map(len, answers_of(tokens)))
        return load_predictor(
            config,
            adapter,
            tokens,
            lambda m, folder: take_the_way(m, config, folder, longest).generate,
        )

    with stop_signals() as stop, recorded_faults(paths), _hardware():
        for job in unfinished:
            if stop.is_set() and job is not unfinished[0]:
                raise SavedForRequeue(
                    f"{job.label}: stopped by a signal before it began; the same command goes on"
                )
            job.finish(lengths, predictor, stop)
    remove_other_divisions(paths, model, shards)


@contextmanager
def _hardware() -> Iterator[None]:
    """Raise NodeFault where CUDA tells of a fault of this node."""
    try:
        yield
    except RuntimeError as error:
        if not is_node_fault(str(error)):
            raise
        raise NodeFault(
            f"node {this_node()}: {first_line(error)}\n"
            "  a fault of that node: what is predicted is kept; run it again elsewhere"
        ) from error


def check_inputs(paths: RunPaths, config: Config, model: ModelName) -> None:
    """Check that the stages before are complete and whole.

    Raises:
        StageError: names what is missing, torn or altered and the command that makes it.
    """
    marker = read_marker(paths.prepare)
    files = {} if marker is None else marker["files"]
    needed = (paths.split("test"), paths.tokens)
    for path in needed:
        if not path.is_file() or files.get(path.name) != sha256_file(path):
            raise StageError(
                f"{path} is missing, torn or altered; run prepare first: "
                f"python -m yelp_hpc run prepare --run {in_shell(paths.root)}"
            )
    if model == "tuned":
        problems = damaged_files(paths.adapter)
        if problems:
            raise StageError(
                f"there is no complete adapter ({'; '.join(problems)}); run train first: "
                f"python -m yelp_hpc run train --run {in_shell(paths.root)}"
            )
        require_own_adapter(paths, config)


def remove_other_divisions(paths: RunPaths, model: str, shards: int) -> None:
    """Once every shard of this division is there, remove those of another number of shards.

    They hold the same rows: whoever reads the folder would count them twice.
    """
    folder = paths.predictions(model)
    found = {path: named for path in folder.glob("*.parquet") if (named := shard_of(path))}
    others = sorted(path for path, named in found.items() if named[1] != shards)
    if not others or sum(named[1] == shards for named in found.values()) < shards:
        return
    for path in others:
        path.unlink(missing_ok=True)  # another task may be at it too
        shard, count = found[path]
        paths.shard_progress(model, shard, count).unlink(missing_ok=True)
    say(f"infer {model}: removed {len(others)} shards of another division, now there are {shards}")


@contextmanager
def stop_signals() -> Iterator[Flag]:
    """A flag that SIGTERM or SIGUSR2 sets, so that the loop can stop between two batches.

    Handlers are set in the main thread only (elsewhere Python refuses) and put back at the end.
    """
    stop = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Shard:
    """One shard on its way from its parts to its file."""

    def __init__(
        self,
        paths: RunPaths,
        config: Config,
        model: str,
        shard: int,
        rows: range,
        provenance: Provenance,
    ) -> None:
        self.test = paths.split("test")
        self.path = paths.shard(model, shard, config.infer.shards)
        self.folder = paths.partial(model, shard, config.infer.shards)
        self.progress = paths.shard_progress(model, shard, config.infer.shards)
        self.label = f"infer {model} shard {shard} of {config.infer.shards}"
        self.rows = rows
        self.window_tokens = WINDOW_BATCHES * config.infer.max_tokens
        self.provenance = provenance
        self.stop = Flag()
        self.done = 0
        self.started = self.progress_written = time.monotonic()

    def finished(self) -> bool:
        """Whether its file is there and whole; says why one that is there is made again."""
        if not self.path.is_file():
            return False
        if damage := self._damage():
            say(f"{self.label}: {self.path.name} is made again: {damage}")
        else:  # a kill may have come between the shard and the end of its parts
            self._settle(0)
        return damage is None

    def finish(
        self, lengths: Sequence[int], predictor: Callable[[], Predictor], stop: Flag
    ) -> None:
        """Predict what is not predicted yet and write the shard's file.

        A requeued task may start before the old one has ended: whoever is second finds the parts
        gone and the shard whole.
        """
        self.stop, self.started = stop, time.monotonic()
        try:
            self._finish(lengths, predictor)
        except (OSError, StageError):
            if self._damage():
                raise
            say(f"{self.label}: another process finished it meanwhile")
            self._settle(0)

    def _damage(self) -> str | None:
        row_ids = row_ids_of(self.test, self.rows)
        return damage_of_shard(self.path, row_ids, self.provenance.identity)

    def _settle(self, computed: int) -> None:
        """Once the shard's file is whole: say so, and remove its parts."""
        said = None
        with suppress(StageError):
            said = read_object(self.progress).get("identity")
        if said != self.provenance.identity:
            self._report("complete", computed)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _finish(self, lengths: Sequence[int], predictor: Callable[[], Predictor]) -> None:
        windows = plan_windows(lengths, self.rows, self.window_tokens)
        sweep(self.folder)
        found = self._usable_parts()
        counts = [read_parts(found.get(w, [])).num_rows for w in range(len(windows))]
        pending = [w for w, rows in enumerate(windows) if counts[w] < len(rows)]
        self.done = before = sum(counts)
        if before:
            say(f"{self.label}: goes on after {before} of {len(self.rows)} rows")
        if pending:
            work = self._predict_windows(windows, pending, found, predictor())
            for _ in track(work, total=len(self.rows) - before, label=self.label):
                pass
        parts = parts_of(self.folder)
        tables = (self._in_order(rows, parts.get(w, [])) for w, rows in enumerate(windows))
        if any(len(rows) > read_parts(parts.get(w, [])).num_rows for w, rows in enumerate(windows)):
            raise StageError(f"{self.label}: its parts vanished; run the same command again")
        write_shard(self.path, tables, self.provenance)
        self._settle(len(self.rows) - before)

    def _usable_parts(self) -> dict[int, list[Path]]:
        """The whole parts by window; a damaged one is said and removed."""
        usable: dict[int, list[Path]] = {}
        for window, paths in parts_of(self.folder).items():
            for path in paths:
                if damage := damage_of_part(path, self.provenance.identity):
                    say(f"{self.label}: {path.name} is made again: {damage}")
                    path.unlink()
                else:
                    usable.setdefault(window, []).append(path)
        return usable

    def _predict_windows(
        self,
        windows: list[range],
        pending: list[int],
        found: dict[int, list[Path]],
        predictor: Predictor,
    ) -> Iterator[int]:
        """Predict and write the windows that are not whole; yields each row that is done."""
        self._report("running", 0)
        before = self.done
        tables = read_windows(self.test, [windows[w] for w in pending])
        for w, table in zip(pending, tables, strict=True):
            rows, labels = table["row"].to_pylist(), table["label"].to_pylist()
            prompts = table["input_ids"].to_pylist()
            known = set(read_parts(found.get(w, []))["row"].to_pylist())
            batches = predictor.plan([len(prompt) for prompt in prompts])
            held: list[pa.Table] = []
            first, part_started = 0, time.monotonic()
            for b, batch in enumerate(batches):
                if all(rows[i] in known for i in batch):
                    continue
                try:
                    predicted = predictor.predict([prompts[i] for i in batch])
                except torch.OutOfMemoryError as error:
                    raise StageError(
                        f"{self.label}: the GPU's memory is too small for a batch; "
                        "lower infer.max_tokens (what is done is kept)"
                    ) from error
                first = first if held else b
                ids, stars = [rows[i] for i in batch], [labels[i] for i in batch]
                held.append(predictions_table(ids, stars, *predicted))
                stopping = self.stop.is_set()
                if stopping or time.monotonic() - part_started > PART_SECONDS:
                    self._write_part(w, first, held)
                    held, part_started = [], time.monotonic()
                self.done += len(batch)
                if time.monotonic() - self.progress_written > PROGRESS_SECONDS:
                    self._report("running", self.done - before)
                yield from ids
                if stopping:
                    self._report("saved", self.done - before)
                    raise SavedForRequeue(
                        f"{self.label}: stopped by a signal, {self.done} of {len(self.rows)} rows "
                        "are saved; the same command goes on from there"
                    )
            if held:
                self._write_part(w, first, held)

    def _write_part(self, window: int, batch: int, tables: list[pa.Table]) -> None:
        table = pa.concat_tables(tables)
        write_part(self.folder, window, batch, table, self.provenance.identity)

    def _in_order(self, rows: range, parts: list[Path]) -> pa.Table:
        """A window's predictions in the order of the test set."""
        table = read_parts(parts)
        place = {row: i for i, row in enumerate(table["row"].to_pylist())}
        order = [place[row] for row in row_ids_of(self.test, rows) if row in place]
        return table.take(pa.array(order, type=pa.int64()))

    def _report(self, state: str, computed: int) -> None:
        """Write how far the shard is; `computed`: rows predicted by this process."""
        self.progress_written = time.monotonic()
        seconds = self.progress_written - self.started
        record = {
            "state": state,
            "rows": len(self.rows),
            "done": self.done if state != "complete" else len(self.rows),
            "rows_per_second": round(computed / seconds, 3) if computed and seconds else None,
            "updated": time.time(),
            # of the file: one of another make may stand there until this one is whole
            "identity": self.provenance.identity if state == "complete" else "",
        }
        write_json(self.progress, record)
