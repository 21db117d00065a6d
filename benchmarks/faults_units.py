"""What faults.py strikes: the small units that write files, and the stages and commands on them.

Models are the tests' tiny ones, the Hub is the tests' local server, Slurm is four scripts that keep
their queue in a folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.faults import Files, Unit, files_of
from yelp_hpc.rundir.paths import RunPaths

RECORDS = [{"n": 1, "text": "one " * 9}, {"n": 2, "text": "two " * 9}]
SLURM = {
    "sbatch": """
script=${!#}
n=$(($(cat $S/next) + 1)); echo $n >$S/next
name=$(sed -n 's/^#SBATCH --job-name=//p' $script | tr -d \\'\\")
echo "$n|$name|$script" >$S/jobs/$n
echo $n""",
    "squeue": """
echo "JOBID|STATE|REASON|NODELIST|TIME|TIME_LIMIT|RESTARTS|SUBMIT|USER|NAME|COMMAND|"
wanted=,$(echo "$*" | sed -n 's/.*--jobs=//p'),
for job in $S/jobs/*; do [ -e $job ] || continue
  IFS='|' read n name script <$job
  case "$*" in *--jobs=*) case $wanted in *,$n,*) ;; *) continue;; esac;; esac
  echo "$n|PENDING|None||0:00|1:00|0|1700000000|$(id -un)|$name|$script|"
done""",
    "scancel": 'for n in "$@"; do rm -f $S/jobs/$n; done',
    "scontrol": "exit 1",
    "sacct": "exit 1",
    "srun": "exit 1",
}


# Small units


def _nothing(folder: Path) -> None:
    folder.mkdir(parents=True)


def _two_records(folder: Path) -> None:
    from yelp_hpc.rundir.files import append_jsonl

    for record in RECORDS:
        append_jsonl(folder / "log.jsonl", record)


def _torn_tail(folder: Path) -> None:
    _two_records(folder)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"n": 9, "text": "to')


def _append(number: int) -> Any:
    def append(folder: Path) -> None:
        from yelp_hpc.rundir.files import append_jsonl

        append_jsonl(folder / "log.jsonl", {"n": number, "text": "more " * 40})

    return append


def _numbers(folder: Path) -> set[int]:
    from yelp_hpc.rundir.files import read_jsonl

    known = {json.dumps(record) for record in RECORDS}
    known |= {json.dumps({"n": n, "text": "more " * 40}) for n in (3, 4)}
    found = read_jsonl(folder / "log.jsonl")
    assert all(json.dumps(record) in known for record in found), found
    return {record["n"] for record in found}


def _records_lost(expected: set[int]) -> Any:
    def lost(folder: Path, done: bool) -> int:
        return len((expected | ({3} if done else set())) - _numbers(folder))

    return lost


def _known_records(folder: Path) -> Files:
    return {"records": json.dumps(sorted(_numbers(folder) - {3})).encode()}


def _old_json(folder: Path) -> None:
    from yelp_hpc.rundir.files import write_json

    write_json(folder / "a.json", {"old": "content " * 50})


def _write_json(name: str) -> Any:
    def write(folder: Path) -> None:
        from yelp_hpc.rundir.files import sweep, write_json

        sweep((folder / name).parent)
        write_json(folder / name, {"new": "content " * 60})

    return write


def _three_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / name).write_text(name * 100)


def _mark(folder: Path) -> None:
    from yelp_hpc.rundir.files import sweep, write_marker

    sweep(folder)
    write_marker(folder, ["a", "b", "c"], step=3)


def _config_file(folder: Path) -> Path:
    path = folder.parent / "config.json"  # JSON is YAML
    content = {
        "model": {"path": "none"},
        "data": {"source": "file", "train": "none.csv", "test_rows": 10},
        "infer": {"shards": 3},
    }
    path.write_text(json.dumps(content))
    return path


def _record_run(folder: Path) -> None:
    from yelp_hpc.config import load_config
    from yelp_hpc.rundir import manifest

    manifest.code_state = lambda: {"version": "0", "git_sha": None, "dirty": False}
    file = folder.parent / "config.json"
    manifest.record_run(folder, load_config(file), str(file), [])


def _submitted_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    _config_file(folder)
    _record_run(folder)


def _unsubmitted(folder: Path) -> None:
    folder.mkdir(parents=True)
    _config_file(folder)


def _update(folder: Path) -> None:
    from yelp_hpc.rundir.files import sweep
    from yelp_hpc.rundir.manifest import update_run

    sweep(folder)
    update_run(RunPaths(folder), data={"rows": {"train": 3}}, image={"sha256": "0" * 64})


def _without_created(folder: Path) -> Files:
    found = files_of(folder)
    record = json.loads(found["run.json"])
    return {**found, "run.json": json.dumps({**record, "created": ""}).encode()}


def _small_package() -> None:
    """Let a snapshot hold three files: what is struck is the way, not their number."""
    from yelp_hpc.jobs import snapshot

    names = ("yelp_hpc/__init__.py", "yelp_hpc/errors.py", "yelp_hpc/rundir/__init__.py")
    setattr(snapshot, "package_files", lambda: [Path(name) for name in names])  # noqa: B010


def _freeze(folder: Path) -> None:
    from yelp_hpc.jobs.snapshot import freeze

    _small_package()
    freeze(RunPaths(folder))


def _planted(folder: Path) -> None:
    folder.mkdir(parents=True)
    _freeze(folder)
    for path in folder.rglob("errors.py"):
        path.write_text("planted")


def _settings(folder: Path) -> None:
    from yelp_hpc.jobs.snapshot import freeze_settings
    from yelp_hpc.rundir.files import sweep

    sweep(RunPaths(folder).logs)
    freeze_settings(RunPaths(folder), {"cluster": {"array_parallelism": 3}, "image_sha256": None})


def _attempt(folder: Path) -> None:
    from yelp_hpc.rundir import attempts
    from yelp_hpc.rundir.files import sweep

    sweep(RunPaths(folder).attempts / "train")
    attempt = attempts.Attempt("train", "7", 0, started=1.0, node="n")
    attempts.write(RunPaths(folder), attempt)
    attempt.ended, attempt.verdict = 2.0, "done"
    attempts.write(RunPaths(folder), attempt)


def _collected(folder: Path) -> None:
    from yelp_hpc.rundir.collected import collected, write_collected
    from yelp_hpc.rundir.files import sweep

    paths = RunPaths(folder)
    sweep(folder)
    content = {"models": {"base": {"rows": 3}}}
    if not collected(paths) or json.loads(paths.metrics.read_text()) != content:
        write_collected(paths, content, "<html>new</html>")


def _old_metrics(folder: Path) -> None:
    from yelp_hpc.rundir.collected import write_collected

    write_collected(RunPaths(folder), {"models": {}}, "<html>old</html>")


def _snapshot(step: int) -> Any:
    import torch

    from yelp_hpc.training.checkpoint import Snapshot

    tensors = {"a": torch.full((4, 4), float(step))}
    return Snapshot(step, tensors, {"r": 4}, {"a/exp_avg": torch.zeros(4, 4)}, {"step": step})


def _checkpoint(step: int) -> Any:
    def save(folder: Path) -> None:
        from yelp_hpc.training.checkpoint import CheckpointStore

        store = CheckpointStore(RunPaths(folder).checkpoints, keep=1)
        store.sweep()
        store.newest()
        store.save(_snapshot(step))

    return save


def _adapter(folder: Path) -> None:
    import torch

    from yelp_hpc.rundir.files import sweep
    from yelp_hpc.training.checkpoint import write_adapter

    sweep(RunPaths(folder).adapter)
    write_adapter(RunPaths(folder).adapter, {"a": torch.ones(4, 4)}, {"r": 4}, step=3, best=None)


def _shard(folder: Path) -> None:
    from yelp_hpc.inference.provenance import Provenance
    from yelp_hpc.inference.shard_files import (
        predictions_table,
        read_parts,
        write_part,
        write_shard,
    )
    from yelp_hpc.rundir.files import sweep

    parts, path = folder / "partial", folder / "shard-0000-of-0001.parquet"
    sweep(folder, parts)
    provenance = Provenance("base", "score", "fp32", None, "0", "", "0")
    table = predictions_table([1, 2, 3], [0, 1, 2], [0, 1, 1], [[0.5] * 5] * 3, None)
    part = write_part(parts, 0, 0, table, provenance.identity)
    write_shard(path, iter([read_parts([part])]), provenance)


# Stages


def _tiny_model(top: Path) -> Path:
    from tests.tiny import make_model

    folder = top / "model"
    if not folder.exists():
        make_model(folder)
    return folder


class Stages:
    """The stages on a tiny model, everything that they share made once below `top`."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.model = top / "model"
        self.reviews = top / "reviews.csv"

    def make(self) -> None:
        """Make the model and the data; in a process of its own, for it starts threads."""
        import csv

        from tests.tiny import reviews

        _tiny_model(self.top)
        with self.reviews.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", "text"])
            rows.writerows((label, f"{text} {i}") for i, (text, label) in enumerate(reviews(60)))

    def config(self) -> Any:
        """The configuration of every stage."""
        from tests.tiny import tiny_config

        return tiny_config(
            self.model,
            data={"train": str(self.reviews)},
            train={"max_steps": 6, "save_every_steps": 2, "keep_checkpoints": 1, "nproc": 1},
            infer={"shards": 2, "max_tokens": 256},
            collect={"bootstrap": 100},
        )

    def recorded(self, folder: Path) -> None:
        """A run directory before prepare."""
        from yelp_hpc.rundir.files import write_json

        values = self.config().model_dump(mode="json")
        write_json(folder / "run.json", {"config": {"resolved": values}, "data": None})

    def prepare(self, folder: Path) -> None:
        """The stage prepare."""
        from yelp_hpc.stages import prepare

        prepare.run(RunPaths(folder), self.config())

    def prepared(self, folder: Path) -> None:
        """A run directory after prepare."""
        self.recorded(folder)
        self.prepare(folder)

    def train(self, folder: Path) -> None:
        """A rank of the stage train, in this process."""
        from yelp_hpc.ranks.rank import StopRequest
        from yelp_hpc.rundir.files import is_complete, sweep
        from yelp_hpc.stages.train import train_rank, training_fingerprint

        paths, config = RunPaths(folder), self.config()
        sweep(paths.root, paths.train, paths.adapter, paths.checkpoints)
        if is_complete(paths.adapter):
            return
        payload = {
            "run": str(folder),
            "config": config.model_dump(mode="json"),
            "model": str(self.model),
            "fingerprint": training_fingerprint(paths, config),
        }
        train_rank(payload, StopRequest())

    def infer(self, folder: Path) -> None:
        """The stage infer, the base model's two shards."""
        from yelp_hpc.stages import infer

        infer.PROGRESS_SECONDS = infer.PART_SECONDS = 0.0
        infer.run(RunPaths(folder), self.config(), "base")


def _training(folder: Path) -> Files:
    from yelp_hpc.rundir.files import read_jsonl

    paths = RunPaths(folder)
    losses = [(x["step"], x["loss"]) for x in read_jsonl(paths.train_log)]
    kept = {name: b"" for name in files_of(folder) if not name.startswith("train/adapter/")}
    return {**kept, **files_of(paths.adapter), "losses": json.dumps(losses).encode()}


def _predictions(folder: Path) -> Files:
    found = files_of(folder)
    return {k: v if k.endswith(".parquet") else b"" for k, v in found.items()}


def _fabricated(folder: Path) -> None:
    from tests.fabricated import make_run

    make_run(folder, rows=60, shards=2)


def _collect(folder: Path) -> None:
    from tests.fabricated import config_of
    from yelp_hpc.stages import collect

    collect.collect(RunPaths(folder), config_of(shards=2, models=["base", "tuned"]))


# Commands


class Slurm:
    """Scripts that stand for Slurm's; their queue is a folder outside of what is struck."""

    def __init__(self, top: Path) -> None:
        self.state, self.queued = top / "state", top / "queued"
        self.programs = top / "bin"
        self.programs.mkdir(parents=True)
        for name, text in SLURM.items():
            path = self.programs / name
            path.write_text(f"#!/bin/bash\nS={self.state}\n{text}\n")
            path.chmod(0o755)
        self.reset()

    def bring_back(self) -> None:
        """Let the queue hold what `submitted` queued."""
        shutil.rmtree(self.state, ignore_errors=True)
        shutil.copytree(self.queued, self.state)
        for job in (self.state / "jobs").iterdir():  # queued from where the run was made
            job.write_text(job.read_text().replace("/template/", "/run/"))

    def reset(self) -> None:
        """Empty the queue."""
        shutil.rmtree(self.state, ignore_errors=True)
        (self.state / "jobs").mkdir(parents=True)
        (self.state / "next").write_text("100\n")

    def jobs(self) -> dict[str, str]:
        """Job id → name of what is queued."""
        return {p.name: p.read_text().split("|")[1] for p in (self.state / "jobs").iterdir()}

    def submit(self, folder: Path) -> None:
        """`submit all` to it; the model and the data, which are not there, are not looked at."""
        from yelp_hpc.config import load_config
        from yelp_hpc.jobs import chain
        from yelp_hpc.jobs.cluster import ClusterConfig

        setattr(chain, "require_sound_request", lambda *_: None)  # noqa: B010

        os.environ["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        _small_package()
        _record_run(folder)
        config = load_config(folder.parent / "config.json").config
        chain.submit("all", folder, config, ClusterConfig(), "slurm", say=lambda text: None)

    def submit_again(self, folder: Path) -> None:
        """What a user does: the same, and where jobs are queued already, cancel first."""
        from yelp_hpc.errors import RequestError

        try:
            self.submit(folder)
        except RequestError as error:
            if "already submitted" not in str(error):
                raise
            self.cancel(folder)
            self.submit(folder)

    def cancel(self, folder: Path) -> None:
        """`cancel` of the run."""
        from yelp_hpc.jobs.chain import cancel

        os.environ["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        cancel(folder)

    def submitted(self, folder: Path) -> None:
        """A run whose chain is queued, by a submission that was killed before it kept a record."""
        self.reset()
        _unsubmitted(folder)
        self.submit(folder)
        RunPaths(folder).submissions.unlink()
        shutil.copytree(self.state, self.queued)

    def lost(self, folder: Path, done: bool) -> int:
        """Queued jobs that `status`, `cancel` and the next submission would not know of."""
        from yelp_hpc.jobs.submission import living

        os.environ["PATH"] = f"{self.programs}:{os.environ['PATH']}"
        return len(self.jobs().keys() - {item.job for item in living(RunPaths(folder))})

    def content(self, folder: Path) -> Files:
        """What is queued, each name once, and the kinds of files."""
        # whether a cancel was needed depends on how far the struck submission came
        names = files_of(folder).keys() - {"logs/cancelled"}
        kinds = {re.sub(r"[0-9a-f]{12,}|\d+", "#", name): b"" for name in names}
        return {**kinds, "queue": json.dumps(sorted(self.jobs().values())).encode()}


class Publishing:
    """A finished run, and a local Hub in a process of its own."""

    def __init__(self, top: Path) -> None:
        self.top, self.hub = top, top / "hub"
        self.pid = 0

    def start(self) -> None:
        """Serve the Hub until the process ends."""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            import time

            from tests.hub.server import serving
            from tests.hub.state import Hub

            hub = Hub(self.hub)
            hub.tokens = {"good-token": {"user": "me", "write": True}}
            with serving(hub):
                os.write(writing, hub.url.encode())
                while os.getppid() != 1:
                    time.sleep(0.5)
            os._exit(0)
        os.environ["HF_ENDPOINT"] = os.read(reading, 200).decode()
        os.environ["HF_TOKEN"] = "good-token"

    def reset(self) -> None:
        """Empty the Hub."""
        for path in (self.hub / "repos").glob("*"):
            path.unlink()

    def finished(self, folder: Path) -> None:
        """A run that is collected."""
        from tests.hub.finished import finish_run

        finish_run(folder, self.top / "published-model")

    def publish(self, folder: Path) -> None:
        """The stage publish."""
        from tests.hub.finished import settings
        from yelp_hpc.publishing.hub import Backoff
        from yelp_hpc.stages import publish

        config = settings(self.top / "published-model")
        publish.run(RunPaths(folder), config, backoff=Backoff(2, 0.01, 0.02))

    def content(self, folder: Path) -> Files:
        """The run's files, without the time of publication, and the Hub's."""
        found = files_of(folder)
        record = json.loads(found["published.json"])
        found["published.json"] = json.dumps({**record, "published": "", "commit": ""}).encode()
        for path in (self.hub / "repos").glob("*.json"):
            state = json.loads(path.read_text())
            head = state["commits"][state["refs"]["refs/heads/main"]]["files"]
            found["hub"] = json.dumps([sorted(head.items()), len(state["commits"])]).encode()
        return found


def _supervised(folder: Path) -> None:
    """A run whose stages are played by tests/jobs/fake_stage.py."""
    from yelp_hpc.jobs.cluster import ClusterConfig
    from yelp_hpc.jobs.snapshot import freeze_settings

    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"shards": 1}))
    (folder / "fake.json").write_text(json.dumps({"steps": 1}))
    fake = Path(__file__).resolve().parent.parent / "tests" / "jobs" / "fake_stage.py"
    cluster = ClusterConfig.model_validate({"command": [sys.executable, str(fake)]})
    content = {"cluster": cluster.model_dump(mode="json"), "image_sha256": None}
    freeze_settings(RunPaths(folder), content)


def _supervise(folder: Path) -> None:
    from yelp_hpc.jobs.supervisor import supervise

    settings = next(RunPaths(folder).logs.glob("cluster-*.json"))
    supervise("prepare", str(folder), str(settings))


def _supervised_files(folder: Path) -> Files:
    kept = {k: v for k, v in files_of(folder).items() if not k.startswith(("logs/att", "trace"))}
    return {k: b"" if k.endswith(".log") else v for k, v in kept.items()}


def _import_everything() -> None:
    """Import once what every injected process would import anew; nothing here starts a thread."""
    import peft
    import submitit
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from yelp_hpc.evaluation import charts, confusion_plot, report
    from yelp_hpc.jobs import chain, executor, supervisor
    from yelp_hpc.models import load
    from yelp_hpc.models.packed import batch, fused, linear
    from yelp_hpc.stages import collect, infer, prepare, publish, train
    from yelp_hpc.training import adapter, checkpoint, loop

    known: list[object] = [peft, submitit, LlamaForCausalLM, PreTrainedTokenizerFast, charts]
    known += [confusion_plot, report, chain, executor, supervisor, load, batch, fused, linear]
    known += [collect, infer, prepare, publish, train, adapter, checkpoint, loop]
    assert all(known)


def light_units() -> list[Unit]:
    """The units that need no torch, so that a fork is cheap."""
    append: dict[str, Any] = {"act": _append(3), "again": _append(4), "content": _known_records}
    return [
        Unit("append_jsonl", _two_records, lost=_records_lost({1, 2, 4}), **append),
        Unit("append_torn", _torn_tail, lost=_records_lost({1, 2, 4}), **append),
        Unit("append_new", _nothing, lost=_records_lost({4}), **append),
        Unit("write_json", _old_json, _write_json("a.json")),
        Unit("atomic_path", _nothing, _write_json("deep/er/a.json")),
        Unit("marker", _three_files, _mark),
        Unit("record_run", _unsubmitted, _record_run, content=_without_created),
        Unit("update_run", _submitted_run, _update),
        Unit("freeze", _nothing, _freeze),
        Unit("freeze_planted", _planted, _freeze),
        Unit("settings", _nothing, _settings),
        Unit("attempt", _nothing, _attempt),
        Unit("collected", _nothing, _collected),
        Unit("collected_anew", _old_metrics, _collected),
    ]


@contextmanager
def heavy_units(top: Path) -> Iterator[list[Unit]]:
    """Every other unit; what they share lies in `top`."""
    stages, slurm = Stages(top / "stages"), Slurm(top / "slurm")
    publishing = Publishing(top / "publishing")
    for folder in (stages.top, publishing.top):
        folder.mkdir(parents=True)
    _import_everything()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            stages.make()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the tiny model cannot be made")
    publishing.start()
    try:
        yield [
            Unit("checkpoint", _checkpoint(2), _checkpoint(4)),
            Unit("adapter", _nothing, _adapter),
            Unit("shard", _nothing, _shard),
            Unit("prepare", stages.recorded, stages.prepare, small=False),
            Unit("train", stages.prepared, stages.train, content=_training, small=False),
            Unit("infer", stages.prepared, stages.infer, content=_predictions, small=False),
            Unit("collect", _fabricated, _collect, small=False),
            Unit(
                "publish",
                publishing.finished,
                publishing.publish,
                content=publishing.content,
                small=False,
                reset=publishing.reset,
            ),
            Unit(
                "submit",
                _unsubmitted,
                slurm.submit,
                slurm.submit_again,
                slurm.content,
                slurm.lost,
                small=False,
                reset=slurm.reset,
            ),
            Unit(
                "cancel",
                slurm.submitted,
                slurm.cancel,
                content=slurm.content,
                lost=slurm.lost,
                small=False,
                reset=slurm.bring_back,
            ),
            Unit("supervise", _supervised, _supervise, content=_supervised_files, small=False),
        ]
    finally:
        if publishing.pid:
            os.kill(publishing.pid, 9)
            os.waitpid(publishing.pid, 0)
