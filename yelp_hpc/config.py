"""The configuration of a run: YAML in, one frozen object out, every problem reported at once.

Reads a YAML file and `--set a.b=c` overrides. The types below are the documentation of the keys;
`load_config` also remembers where each value came from, for `config show`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from yelp_hpc.errors import RequestError
from yelp_hpc.own_files import expanded, shipped
from yelp_hpc.settings import SEVERAL_LINES, Section, read_settings
from yelp_hpc.synonyms import CONFIG, NO_KEY, OF_A_SITE
from yelp_hpc.task import YELP, TaskConfig

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision → torch's name of it."""
Auto = Literal["auto"]
AutoPrecision = Literal["auto", "fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Beta = Annotated[float, Field(ge=0, lt=1)]


Name = Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v), SEVERAL_LINES]


def _of_a_user(value: str) -> str:
    expanded(value)
    return value


Place = Annotated[str, AfterValidator(_of_a_user)]
OnOff = Annotated[
    Literal["auto", "on", "off"],  # YAML reads a bare on and off as truth values
    BeforeValidator(lambda v: ("off", "on")[v] if isinstance(v, bool) else v),
]


class ModelConfig(Section):
    """The base model."""

    path: Place = Field(
        description="local folder, Hub id, or demo:smollm2-135m (the packaged demo model)"
    )
    revision: str | None = Field(None, description="Hub revision (commit) of the model")
    precision: Precision = Field(
        "fp32", description="number format of the published weights; a stage casts them to its own"
    )


class DataConfig(Section):
    """Where the reviews come from and how they are sampled."""

    source: Literal["hub", "file", "demo"] = Field(description="kind of source")
    path: str | None = Field(None, description="hub: data set id")
    revision: str | None = Field(None, description="hub: revision (commit) of the data set")
    configuration: str | None = Field(None, description="hub: configuration of the data set")
    train_split: str = Field("train", description="hub: the split of the training rows")
    test_split: str | None = Field(
        "test", description="hub: the split of the test rows; null: test_rows are drawn from train"
    )
    train: Place | None = Field(
        None,
        description="file: the training rows: csv, tsv, jsonl, json, parquet or arrow (text also "
        "in gz, zst, zip), a folder of them, a glob or a folder of `save_to_disk`",
    )
    test: Place | None = Field(
        None, description="file: the test reviews; without it test_rows are drawn from train"
    )
    text_column: Name = Field("text", description="column of the text")
    label_column: Name = Field("label", description="column of the label; see task.values")
    header: bool = Field(
        True, description="csv: its first line names the columns; without, they are 0, 1, …"
    )
    escaped: bool = Field(
        False, description="a backslash and n in a text are a line break, as in Yelp's archive"
    )
    drop_duplicates: bool = Field(
        False,
        description="leave out training rows whose text is also a test row's, or has another label "
        "elsewhere in training",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="of the draw of the sets; null: the run's seed"
    )
    train_rows: int | None = Field(
        None, ge=1, description="rows drawn for training and validation together; null: all"
    )
    test_rows: int | None = Field(None, ge=1, description="rows drawn for testing; null: all")
    validation_share: float = Field(
        0.06, ge=0, lt=1, description="share of the drawn training rows kept for validation"
    )
    balanced: bool = Field(
        False, description="draw equally many rows of each label instead of uniformly"
    )
    cutoff: int = Field(
        1024, ge=32, description="longest sequence in tokens; longer reviews lose their end"
    )

    @model_validator(mode="after")
    def _source_is_named(self) -> DataConfig:
        if self.source == "hub" and not self.path:
            raise ValueError("source hub needs data.path, the data set's id")
        if self.source == "file" and not self.train:
            raise ValueError("source file needs data.train, a csv, jsonl or parquet file")
        if self.source == "file" and not self.test and not self.test_rows:
            raise ValueError("source file needs data.test, or data.test_rows to draw from train")
        if self.source == "hub" and not self.test_split and not self.test_rows:
            raise ValueError("without data.test_split, data.test_rows are needed")
        return self


class PromptConfig(Section):
    """The text around a review."""

    template: Annotated[str, SEVERAL_LINES] = Field(
        "Instruction: The following is a user's review of a merchant. Please judge and output "
        "the corresponding five-star rating for this review.\nReview: {review}\nOutput: {label}",
        description="holds {review} once and ends with {label}",
    )

    @field_validator("template")
    @classmethod
    def _placeholders(cls, value: str) -> str:
        if value.count("{review}") != 1 or value.count("{label}") != 1:
            raise ValueError("must hold {review} and {label} exactly once each")
        if not value.endswith("{label}"):
            raise ValueError("must end with {label}")
        return value


class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(8, ge=1, le=2**14, description="rank of the update of each adapted matrix")
    alpha: float = Field(16, gt=0, le=1e6, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.08, ge=0, lt=1, description="of the adapter's input, in training")
    target: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="names of the adapted modules; null: the architecture's attention",
    )


class TrainConfig(Section):
    """Supervised fine-tuning on the answer tokens."""

    adapter: Place | None = Field(
        None,
        description="an adapter that exists, evaluated in place of a training: a run, a folder of "
        "PEFT's or a Hub id; rank, modules and variant are its own, `lora` and the rest are unread",
    )
    start: Place | None = Field(
        None,
        alias="from",
        description="an adapter to go on from, as `adapter` names one: its weights in place of "
        "fresh ones; with `schedule: constant` and a run that was trained so far in the same way, "
        "its optimizer and step, too",
    )
    learning_rate: float = Field(5e-5, gt=0, description="its peak, after the warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="of the learning rate, from its peak to 0"
    )
    warmup_steps: Auto | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="steps in which the rate rises from 0; auto: 20, a tenth of the steps at most",
    )
    epochs: int = Field(1, ge=1, description="how often each training row is seen")
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps")
    global_batch: int = Field(32, ge=1, description="sequences an optimizer step, over all ranks")
    max_tokens: Auto | Annotated[int, Field(ge=64)] = Field(
        "auto", description="token budget of a micro-batch; auto: what fits with activations kept"
    )
    micro_batches: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="pieces of a global batch, which its ranks share; auto: 1, 2, 4 or 8, as many "
        "as cost 2 % at most",
    )
    precision: AutoPrecision = Field(
        "auto",
        description="number format of the weights and sums; auto, chosen at the first start: bf16 "
        "on GPUs that have it (sm_80), fp16 on older ones, fp32 on a CPU",
    )
    weight_decay: float = Field(0.0, ge=0, le=100, description="AdamW's, on the adapter")
    max_grad_norm: float = Field(1.0, gt=0, description="a longer gradient is cut to this norm")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of Adam's moments")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="Adam's term against division by 0")
    gradient_checkpointing: OnOff = Field(
        "auto", description="compute layers twice to save memory; auto: only if it must be"
    )
    nproc: Auto | Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="ranks a node, one a GPU; auto: as many as the node has"
    )
    evaluate_every: int | None = Field(
        None, ge=1, description="steps between validation losses; null: about ten times a run"
    )
    evaluate_rows: int = Field(
        2000, ge=1, description="validation rows of each check, a fixed sample; all at the end"
    )
    log_every: int = Field(1, ge=1, description="steps between lines of log.jsonl")
    save_every_steps: int = Field(200, ge=1, description="steps between checkpoints, or …")
    save_every_minutes: float = Field(10, gt=0, description="… minutes, whichever is first")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept beside the best")
    tensorboard: bool = Field(
        False, description="write TensorBoard event files while it trains, into train/tensorboard/"
    )
    trackers: tuple[Tracker, ...] = Field(
        (), description="written from the log at the end of a training, as `track` does at any time"
    )

    @model_validator(mode="after")
    def _one_adapter(self) -> TrainConfig:
        if self.adapter is not None and self.start is not None:
            raise ValueError("adapter is evaluated as it is, from is trained on: name one of them")
        return self

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a training of so many steps."""
        return min(20, steps // 10) if self.warmup_steps == "auto" else self.warmup_steps


FREE_TRAIN_SETTINGS = frozenset(
    {
        *("max_tokens", "micro_batches", "evaluate_rows"),
        *("gradient_checkpointing", "nproc", "log_every", "tensorboard", "trackers"),
        *("save_every_steps", "save_every_minutes", "keep_checkpoints"),
    }
)
"""Keys of `train` that change speed, saving or what is shown, but not what is learnt."""


class InferConfig(Section):
    """Predictions on the test set."""

    models: tuple[Literal["base", "tuned"], ...] = Field(
        ("base", "tuned"), description="which are asked; without tuned nothing is trained"
    )
    mode: Literal["score", "answer", "generate"] = Field(
        "score",
        description="compare the labels' scores; find the best label alone, which saves time where "
        "labels are many and of several tokens; or write and parse an answer",
    )
    shards: int = Field(1, ge=1, le=100_000, description="parts of the test set, a job each")
    max_tokens: int = Field(8192, ge=64, description="token budget of a batch")
    max_new_tokens: int = Field(32, ge=1, description="generate: longest answer in tokens")
    precision: AutoPrecision = Field(
        "auto",
        description="number format of the weights and sums; auto: the training's",
    )
    fp16_accumulation: bool = Field(
        False, description="sum fp16 products in fp16 on a GPU; its effect on F1 is not measured"
    )

    @field_validator("models")
    @classmethod
    def _models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name base, tuned or both, each once")
        return value


class CollectConfig(Section):
    """Statistics over the predictions."""

    bootstrap: int = Field(
        2000, ge=100, le=1_000_000, description="resamples of the 95 % intervals"
    )
    calibration_bins: int = Field(15, ge=2, le=1000, description="bins of confidence")
    mistakes: int = Field(20, ge=0, le=10_000, description="worst mistakes shown in the report")


class PublishConfig(Section):
    """Upload to the Hugging Face Hub."""

    repo_id: str | None = Field(None, description="owner/name on the Hub; null: publish nothing")
    private: bool = Field(True, description="make the repository private if it is made")
    license: str = Field("other", description="of the card")
    tags: tuple[str, ...] = Field(
        ("lora", "yelp", "text-classification"), description="of the card"
    )
    branch: str | None = Field(None, description="branch to commit to; null: the main branch")
    pull_request: bool = Field(False, description="open a pull request instead of committing")
    merged: bool = Field(False, description="upload the merged model instead of the adapter")
    where: Literal["slurm", "login"] = Field(
        "slurm", description="login: left out of `submit all`, run it where the Hub is in reach"
    )
    include_diff: bool = Field(
        False, description="upload the uncommitted changes too, not their SHA-256 alone"
    )
    token_file: Place | None = Field(None, description="file (mode 0600) that holds the Hub token")

    @field_validator("repo_id")
    @classmethod
    def _repo_id(cls, value: str | None) -> str | None:
        # the Hub's own rule (huggingface_hub.utils.validate_repo_id)
        good = r"\w[\w.-]*/\w[\w.-]*(?<![.-])"
        if value is not None and (
            not re.fullmatch(good, value, re.ASCII) or re.search(r"--|\.\.|\.git$", value)
        ):
            raise ValueError("must look like owner/name: letters, digits, . _ -")
        return value


class Config(Section):
    """Everything that a run's result depends on."""

    synonyms: ClassVar[Mapping[str, str]] = CONFIG
    elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(OF_A_SITE, "it belongs into a cluster file, which --cluster names"),
        **NO_KEY,
    }
    as_written: ClassVar[frozenset[str]] = frozenset({"labels", "values", "names"})

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        "yelp", description="a short name: letters, digits, . _ -"
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**32,
        description="of order, dropout, the adapter's start; and the draw, if no data.seed is",
    )
    model: ModelConfig
    data: DataConfig
    task: TaskConfig = YELP
    prompt: PromptConfig = PromptConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    infer: InferConfig = InferConfig()
    collect: CollectConfig = CollectConfig()
    publish: PublishConfig = PublishConfig()


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration with the origin of every value that was given."""

    config: Config
    given: dict[str, Any]
    """The file and the overrides, merged, before defaults."""
    origin: dict[str, str]
    """Dotted key → `FILE:LINE` or `--set`; a key that is not in it has its default."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file, apply `a.b=value` overrides in order and check the result.

    A name that is no file here may be one of the package's own: `demo`, `yelp_chatglm3`.

    Raises:
        RequestError: the file is missing, not YAML or a run's record, a key is unknown (the nearest
            valid one is named), a value has the wrong type or range. All problems are in the one
            message.
    """
    if Path(path).name == "run.json" and Path(path).is_file():
        raise RequestError(
            f"{path} is the record of a run, no config; to repeat what it asked for:\n"
            f"  python -m yelp_hpc reproduce --from {path} --run DIR"
        )
    config, given, origin = read_settings(Config, shipped(path), overrides)
    return LoadedConfig(config, given, origin)


def config_from_dict(values: dict[str, Any]) -> Config:
    """The configuration that `run.json` holds, checked again."""
    return Config.model_validate(values)
