"""The names inside a run directory, spelled here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STAGES = ("prepare", "train", "infer", "collect", "publish")
MODELS = ("base", "tuned")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
SPLITS = ("train", "validation", "test")
ADAPTER_CONFIG, WEIGHTS = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

Task = tuple[int, ...]
"""The shards of one array task; () for a job without shards."""

_SHARD_NAME = re.compile(r"shard-(\d+)-of-(\d+)\.parquet")
_CHECKPOINT_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run directory; building them touches no file."""

    root: Path

    def __init__(self, root: str | Path) -> None:
        object.__setattr__(self, "root", Path(root))

    @property
    def run_json(self) -> Path:
        """What was asked for and with what."""
        return self.root / "run.json"

    @property
    def submissions(self) -> Path:
        """A line for every submission."""
        return self.root / "submissions.jsonl"

    @property
    def plan(self) -> Path:
        """The forecast that was made for this run."""
        return self.root / "plan.json"

    @property
    def logs(self) -> Path:
        """Everything that can say why something died, Slurm's own output included."""
        return self.root / "logs"

    def lock(self, name: str) -> Path:
        """The lock file of what only one process may change at a time."""
        return self.logs / f".{name}.lock"

    @property
    def attempts(self) -> Path:
        """A file for each start of a job: when, where, how it ended."""
        return self.logs / "attempts"

    @property
    def node_faults(self) -> Path:
        """A line for each fault of a node's hardware."""
        return self.logs / "node-faults.jsonl"

    @property
    def code(self) -> Path:
        """Snapshots of the code that jobs were submitted with."""
        return self.root / "code"

    def stage_log(self, name: str, task: Task = ()) -> Path:
        """The log of a job's task, named after its first shard."""
        return self.logs / (f"{name}-{task[0]:04d}.log" if task else f"{name}.log")

    def tracker(self, name: str) -> Path:
        """What an experiment tracker reads, made from the training's log."""
        return self.root / "trackers" / name

    # prepare
    @property
    def prepare(self) -> Path:
        """The tokenised sets and what LLaMA-Factory reads."""
        return self.root / "prepare"

    def split(self, name: str) -> Path:
        """The tokenised rows of `train`, `validation` or `test`."""
        return self.prepare / f"{name}.parquet"

    def alpaca(self, name: str) -> Path:
        """The same rows in LLaMA-Factory's alpaca format."""
        return self.prepare / f"alpaca_{name}.json"

    @property
    def dataset_info(self) -> Path:
        """LLaMA-Factory's index of the alpaca files."""
        return self.prepare / "dataset_info.json"

    @property
    def tokens(self) -> Path:
        """The shared prefix and the ids of the labels."""
        return self.prepare / "tokens.json"

    # train
    @property
    def train(self) -> Path:
        """Checkpoints, the adapter, log and loss curve."""
        return self.root / "train"

    @property
    def checkpoints(self) -> Path:
        """Folders that training can go on from."""
        return self.train / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The state after `step` steps."""
        return self.checkpoints / f"step-{step:06d}"

    @property
    def adapter(self) -> Path:
        """The finished adapter, in peft's format."""
        return self.train / "adapter"

    @property
    def start(self) -> Path:
        """The adapter that training began with, where it was not a fresh one."""
        return self.train / "from"

    @property
    def train_log(self) -> Path:
        """A line for every step and every evaluation."""
        return self.train / "log.jsonl"

    @property
    def budgets(self) -> Path:
        """How the global batches were cut into micro-batches, from which step on."""
        return self.train / "budgets.json"

    @property
    def loss_png(self) -> Path:
        """The loss curve."""
        return self.train / "loss.png"

    # infer
    def predictions(self, model: str) -> Path:
        """The model's shards and nothing else: pandas reads the folder."""
        return self.root / "infer" / model

    def shard(self, model: str, shard: int, shards: int) -> Path:
        """Predictions of one shard of `shards`, counted from 0."""
        return self.predictions(model) / f"shard-{shard:04d}-of-{shards:04d}.parquet"

    def partials(self, model: str) -> Path:
        """The parts of the model's unfinished shards, where no reader of shards looks."""
        return self.root / "infer" / ".partial" / model

    def partial(self, model: str, shard: int, shards: int) -> Path:
        """Folder of the parts of an unfinished shard; gone when the shard is whole."""
        return self.partials(model) / f"shard-{shard:04d}-of-{shards:04d}"

    def progress(self, model: str) -> Path:
        """How far each of the model's shards is."""
        return self.root / "infer" / ".progress" / model

    def shard_progress(self, model: str, shard: int, shards: int) -> Path:
        """How far a shard is, for `status`."""
        return self.progress(model) / f"shard-{shard:04d}-of-{shards:04d}.json"

    # predict
    @property
    def predict(self) -> Path:
        """A folder, itself a run directory, for each request for predictions."""
        return self.root / "predict"

    @property
    def request(self) -> Path:
        """In such a folder: what is asked for."""
        return self.root / "request.json"

    @property
    def answered(self) -> Path:
        """In such a folder: what was written, and from what."""
        return self.root / "answered.json"

    # collect and publish
    @property
    def metrics(self) -> Path:
        """Figures of both models."""
        return self.root / "metrics.json"

    @property
    def report(self) -> Path:
        """The report, one page that needs nothing but itself."""
        return self.root / "report.html"

    @property
    def published(self) -> Path:
        """What was uploaded, and where it lies."""
        return self.root / "published.json"


def shard_of(path: Path) -> tuple[int, int] | None:
    """`(shard, shards)` of a shard's file name, or None for any other file."""
    match = _SHARD_NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else None


def step_of(path: Path) -> int | None:
    """The step of a checkpoint directory's name, or None for any other name."""
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else None
