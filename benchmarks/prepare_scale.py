"""prepare of a whole yelp_review_full beside LLaMA-Factory's preprocessing of the same rows.

    python -m benchmarks.prepare_scale [--train 650000] [--test 50000] [--draw 160000]

Makes up csv files of reviews of Yelp's lengths (the demo's vocabulary) in a temporary folder, then
times, one after the other: `prepare` as a job runs it, and LLaMA-Factory 0.9.5 with the same rows
as records of its own form, in as many processes as there are processors and in 16, as its examples
and its board have it. All read all training rows, draw `--draw` of them and tokenise these and the
test rows with the demo's tokenizer, cutoff 1,024; start-up of Python included, caches empty. Memory
is the largest sum of the proportional set sizes (PSS) of the command's processes, looked at four
times a second; processor time is that of all of them. Needs 3 GB of disk.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_setup import GIVEN, INSTRUCTION, install_peer


def main() -> None:
    if sys.argv[1:2] == ["--peer-worker"]:
        return peer_worker(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=int, default=650_000)
    parser.add_argument("--test", type=int, default=50_000)
    parser.add_argument("--draw", type=int, default=160_000)
    default = Path.home() / ".cache/yelp_hpc/llamafactory"
    parser.add_argument("--peer-venv", type=Path, default=default)
    args = parser.parse_args()
    python = install_peer(args.peer_venv)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed, (name, rows) in enumerate({"train": args.train, "test": args.test}.items()):
            write_reviews(work / name, rows, seed)
        size = sum((work / f"{name}.csv").stat().st_size for name in ("train", "test"))
        print(f"{args.train:,} + {args.test:,} rows of csv, {size / 1e6:.0f} MB", flush=True)
        own = measure(*ours(work, args))
        say("yelp_hpc", own, own)
        for processes in dict.fromkeys((os.cpu_count() or 1, 16)):
            peer = measure(*peers(work, args, python, processes))
            say(f"LLaMA-Factory in {processes} processes", peer, own)


def say(who: str, measured: tuple[float, float, int], own: tuple[float, float, int]) -> None:
    """A line of the table: the figures, and in times of ours."""
    seconds, busy, memory = measured
    times = "  ".join(f"{a / b:5.2f}" for a, b in zip(measured, own, strict=True))
    line = f"{who:29} {seconds:7.1f} s {busy:7.1f} CPU s {memory / 2**20:6.0f} MiB   {times}"
    print(line, flush=True)


def write_reviews(base: Path, rows: int, seed: int) -> None:
    """`BASE.csv` for us, `BASE.jsonl` for the peer: the same texts."""
    from yelp_hpc.data.demo import rated_snippets  # the peer's Python lacks what it needs

    snippets, draw = [text for text, _ in rated_snippets()], random.Random(seed)
    with (
        base.with_suffix(".csv").open("w", newline="") as table,
        base.with_suffix(".jsonl").open("w") as records,
    ):
        writer = csv.writer(table)
        writer.writerow(["label", "text"])
        for _ in range(rows):
            wanted = min(5000, max(10, draw.lognormvariate(6.2, 0.8)))  # characters
            text = " ".join(draw.choices(snippets, k=8))
            while len(text) < wanted:
                text += " " + " ".join(draw.choices(snippets, k=8))
            text, label = text[: int(wanted)], draw.randrange(5)
            writer.writerow([label, text])
            record = {"instruction": INSTRUCTION, "input": text, "output": str(label)}
            records.write(json.dumps(record) + "\n")


def ours(work: Path, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    from yelp_hpc.data.demo import model_folder

    settings = {
        "model.path": "demo:smollm2-135m",
        "data.source": "file",
        "data.train": str(work / "train.csv"),
        "data.test": str(work / "test.csv"),
        "data.train_rows": args.draw,
        "data.test_rows": args.test,
        "data.cutoff": 1024,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    config = work / "config.yaml"
    config.write_text("name: scale\nmodel: {path: demo:smollm2-135m}\ndata: {source: demo}\n")
    command = [sys.executable, "-m", "yelp_hpc", "submit", "prepare", "--executor", "local"]
    command += ["--config", str(config), "--run", str(work / "run"), *sets]
    model_folder()  # downloads are nobody's preprocessing
    return command, {**os.environ}


def peers(
    work: Path, args: argparse.Namespace, python: Path, processes: int
) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    from yelp_hpc.data.demo import model_folder

    info = {name: {"file_name": f"{name}.jsonl"} for name in ("train", "test")}
    (work / "dataset_info.json").write_text(json.dumps(info))
    flags = {
        **{"model_name_or_path": str(model_folder()), "stage": "sft", "do_train": True},
        **{"finetuning_type": "lora", "template": "default", "cutoff_len": 1024},
        **{"dataset": "train", "eval_dataset": "test", "dataset_dir": str(work)},
        **{"max_samples": args.draw, "preprocessing_num_workers": processes},
        **{"output_dir": str(work / "peer"), "use_cpu": True, "report_to": "none"},
    }
    environment = {**GIVEN, "HF_HOME": str(work / f"hf{processes}"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    return [str(python), __file__, "--peer-worker", json.dumps(flags)], environment


def peer_worker(flags: dict[str, Any]) -> None:
    """Runs under the peer's Python: what its training does before it loads the model."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model, data, training, *_ = get_train_args(flags)
    module = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data)
    sets = get_dataset(template, model, data, training, stage="sft", **module)
    print({name: len(rows) for name, rows in sets.items()})


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak bytes of a command with all its children."""
    peak, ended = 0, threading.Event()
    with tempfile.TemporaryFile("w+") as log:
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.25):
                peak = max(peak, sum(map(proportional, family(process.pid))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        ended.set()
        watcher.join()
        if code:
            log.seek(0)
            raise SystemExit(f"{command[:4]} ended with {code}:\n{log.read()[-3000:]}")
    return seconds, busy, peak


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, thread.read_text().split())
            except OSError:
                continue  # ended meanwhile
    return found


def proportional(pid: int) -> int:
    """Bytes of a process, pages that several map divided among them."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in text.splitlines() if x.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
