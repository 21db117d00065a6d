"""How long collect takes and how much memory: 50,000 rows, and 10 million rows in 10,000 shards.

    python benchmarks/collect_scale.py                 # both sizes
    python benchmarks/collect_scale.py --only small    # 50,000 rows in 8 shards, seconds

Makes up a run directory (score mode, both models) in a temporary folder, then times
`python -m yelp_hpc collect` as a user runs it, start-up of Python included. Peak memory is the
process's largest resident set. The large run needs about 600 MB of disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from yelp_hpc.config import Config
from yelp_hpc.inference.shard_files import SCHEMA
from yelp_hpc.rundir.paths import MODELS, RunPaths

SIZES = {"small": (50_000, 8), "large": (10_000_000, 10_000)}
_GROUP = 100_000


def make_run(folder: Path, rows: int, shards: int) -> RunPaths:
    """A run directory whose predictions favour the true label."""
    run = RunPaths(folder)
    config = Config.model_validate(
        {"model": {"path": "m"}, "data": {"source": "demo"}, "infer": {"shards": shards}}
    )
    folder.mkdir(parents=True, exist_ok=True)
    run.run_json.write_text(json.dumps({"config": {"resolved": config.model_dump(mode="json")}}))
    labels = np.random.default_rng(0).integers(0, 5, rows).astype(np.int8)
    run.prepare.mkdir()
    text = pa.array(["The food was good, the waiter was not; we may come again."])
    schema = pa.schema([("row", pa.int64()), ("label", pa.int8()), ("text", pa.string())])
    with pq.ParquetWriter(run.split("test"), schema) as writer:
        for start in range(0, rows, _GROUP):
            ids = np.arange(start, min(start + _GROUP, rows))
            texts = text.take(pa.array(np.zeros(len(ids), dtype=np.int64)))
            writer.write_table(pa.table([ids, labels[ids], texts], schema=schema))
    cuts = np.linspace(0, rows, shards + 1).astype(np.int64)
    for seed, (model, strength) in enumerate(zip(MODELS, (0.4, 2.0), strict=True)):
        run.predictions(model).mkdir(parents=True)
        generator = np.random.default_rng(seed)
        for shard in range(shards):
            ids = np.arange(cuts[shard], cuts[shard + 1])
            scores = generator.standard_normal((len(ids), 5), dtype=np.float32)
            scores[np.arange(len(ids)), labels[ids]] += strength
            offsets = pa.array(np.arange(0, 5 * len(ids) + 1, 5, dtype=np.int32))
            columns = [
                pa.array(ids),
                pa.array(labels[ids]),
                pa.array(scores.argmax(axis=1).astype(np.int8)),
                pa.ListArray.from_arrays(offsets, pa.array(scores.reshape(-1))),
                pa.nulls(len(ids), pa.string()),
            ]
            path = run.shard(model, shard, shards)
            pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), path)
    return run


def measure(run: RunPaths) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak resident bytes of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-m", "yelp_hpc", "collect", "--run", str(run.root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, used.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SIZES)
    names = [parser.parse_args().only] if parser.parse_args().only else list(SIZES)
    for name in names:
        rows, shards = SIZES[name]
        with tempfile.TemporaryDirectory() as folder:
            run = make_run(Path(folder) / "run", rows, shards)
            seconds, processor, memory = measure(run)
        print(
            f"{rows:>10,} rows, {shards:>6,} shards, two models: {seconds:6.1f} s "
            f"({processor:.1f} s of processor), {memory / 2**20:5.0f} MiB peak, "
            f"{2 * rows / seconds:,.0f} predictions/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
