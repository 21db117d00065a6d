"""A stage that counts: stands in for the real ones where a test is about the jobs around them.

Called as the real command is (STAGE --run DIR [--model M --shard 0-2]); does its shards one after
the other, as that does. Works in steps of a tenth of a second, keeps each step in a checkpoint
file, saves on SIGUSR2 and SIGTERM and then exits 75. How it shall behave stands in RUN/fake.json:
{"steps": N, "fail": ["infer-base-3"], "code": 2} (what fails exits so), {"stuck": true} (no step is
ever finished), {"deaf": true} (no signal is heard), {"ill": true} (the hardware fails of the node
on which train starts first, there and ever after), {"full": 2} (for the first two starts of each
the disk is full; with {"at_save": true} only where they save). In a study the file stands beside
study.json, and its `fail` names RUN/STAGE.
"""

import errno
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

stage, _, run = sys.argv[1:4]
options = dict(zip(sys.argv[4::2], sys.argv[5::2], strict=True))
model = options.get("--model", "")
ranges = [part.partition("-") for part in options.get("--shard", "").split(",") if part]
shards = [shard for a, _, b in ranges for shard in range(int(a), int(b or a) + 1)]
root = Path(run)
study = root if (root / "study.json").exists() else root.parent
plan = json.loads(((root if (root / "fake.json").exists() else study) / "fake.json").read_text())
stop: list[int] = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda signum, frame: stop.append(signum))
record = json.loads((root / "run.json").read_text()) if (root / "run.json").exists() else {}
config = record.get("shards") or (record and record["config"]["resolved"]["infer"]["shards"])


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.rename(path)


def no_room() -> None:
    print(f"cannot write {root}: {os.strerror(errno.ENOSPC)}.", flush=True)
    sys.exit(1)


def play(shard: int | None) -> None:
    name = "-".join(str(part) for part in (stage, model, shard) if part not in ("", None))
    with (root / "trace.jsonl").open("a") as trace:
        place = {
            key: os.environ.get(key)
            for key in (
                *("YELP_HPC_NNODES", "YELP_HPC_NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
                "CUDA_VISIBLE_DEVICES",
            )
        }
        line = {"name": name, "began": time.time(), "pid": os.getpid(), **place}
        trace.write(json.dumps(line) + "\n")
    print(f"{name} begins", flush=True)
    node, faults = os.environ.get("SLURMD_NODENAME", ""), root / "logs" / "node-faults.jsonl"
    another = faults.exists() and node not in faults.read_text()
    if plan.get("ill") and stage == "train" and not another:
        with faults.open("a") as file:
            file.write(json.dumps({"node": node, "time": time.time(), "what": "ECC error"}) + "\n")
        sys.exit(75)
    starts = (root / "trace.jsonl").read_text().count(f'"name": "{name}"')
    full = starts <= plan.get("full", 0)
    if full and not plan.get("at_save"):
        no_room()
    if {name, f"{root.name}/{name}"} & {*plan.get("fail", [])}:
        print("the data is rotten", flush=True)
        sys.exit(plan.get("code", 1))
    kept = root / "train" / "checkpoints" / "step.json" if stage == "train" else None
    if stage == "infer":
        kept = root / "infer" / model / f"shard-{shard:04d}.partial"
    step = json.loads(kept.read_text()) if kept and kept.exists() else 0
    steps = plan.get("steps", 1) if stage in ("train", "infer") else 1
    while step < steps:
        time.sleep(0.1)
        if not plan.get("stuck"):
            step += 1
        if stop and full:
            no_room()
        if stop and not plan.get("deaf"):
            if kept and not plan.get("stuck"):
                put(kept, step)
            print(f"{name} saved step {step}", flush=True)
            sys.exit(75)
        if kept and step % 10 == 0 and not plan.get("stuck"):
            put(kept, step)
    if stage in ("prepare", "train"):
        put(
            {"prepare": root / "prepare", "train": root / "train" / "adapter"}[stage]
            / "complete.json",
            {"files": {}},
        )
    elif stage == "infer":
        put(root / "infer" / model / f"shard-{shard:04d}-of-{config:04d}.parquet", step)
    elif stage == "collect" and not record:  # of a study
        put(root / "report.html", 0)
        made = {path.parent.name: path.read_bytes() for path in root.glob("*/metrics.json")}
        made_of = {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}
        put(root / "leaderboard.json", {"made_of": made_of, "trials": []})
    elif stage == "collect":
        put(root / "report.html", 0)
        put(root / "metrics.json", sorted(p.name for p in root.glob("infer/*/*.parquet")))
    else:
        put(root / "published.json", 1)
    print(f"{name} ends", flush=True)


for each in shards:
    play(each)
if not shards:
    play(None)
