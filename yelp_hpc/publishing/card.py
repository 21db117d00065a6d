"""The model card: what a run recorded, as markdown with the Hub's metadata. No file is read.

The same run gives the same bytes, so that publishing twice makes one commit: nothing here is taken
from the clock or the machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yelp_hpc.cache import DEMO_HUB_ID, DEMO_MODEL
from yelp_hpc.config import Config
from yelp_hpc.evaluation.metrics import AVERAGES
from yelp_hpc.evaluation.outcome import STUDY_DATA, figure, interval, is_number, shows_study
from yelp_hpc.publishing.snippet import article, snippet
from yelp_hpc.rundir.attempts import GpuHours
from yelp_hpc.task import YELP

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w-][\w.-]*)?")
MATRIX_CLASSES = 12
"""The most classes whose confusion matrix is a table in the card."""


def base_model_id(config: Config) -> str | None:
    """The Hub id of the base model; None for a local folder, whose path is nobody's business."""
    path = config.model.path
    if path == DEMO_MODEL:
        return DEMO_HUB_ID
    return path if "/" in path and _is_hub_id(path) else None


def data_id(config: Config) -> str | None:
    """The Hub id of the data set; None for local files, a folder named with `source: hub` too."""
    path = config.data.path or ""
    return path if config.data.source == "hub" and _is_hub_id(path) else None


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not Path(path).exists()


def data_name(config: Config) -> str:
    """What the reviews are called in the card; never a local path."""
    if (name := data_id(config)) is not None:
        return name
    if config.data.source == "demo":
        return "rated review sentences (vaderSentiment 2.5)"
    files = "local files" if config.data.source == "hub" else "a local file"
    return f"{files} of {config.task.noun}s"


def model_card(
    config: Config,
    metrics: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    pictures: Sequence[str] = (),
    gpu_hours: GpuHours | None = None,
    native: bool = False,
) -> str:
    """README.md of the published model.

    Args:
        metrics: the content of metrics.json.
        record: the content of run.json.
        pictures: names of pictures beside the card (loss.png, confusion.png).
        native: the architecture is loaded by this package's own classes (ChatGLM3).
    """
    repo = config.publish.repo_id or "OWNER/NAME"
    sections = [
        f"# {repo.split('/')[-1]}",
        _opening(config),
        _results(metrics, config),
        _pictures(pictures),
        _use(config, repo, native),
        _training(config, record, gpu_hours),
        _limits(config, metrics, record),
        _provenance(record),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_metadata(config, metrics, repo)}\n---\n\n{body}\n"


def _metadata(config: Config, metrics: Mapping[str, Any], repo: str) -> str:
    """The YAML head, by huggingface_hub's own classes, which refuse what the Hub would refuse."""
    from huggingface_hub import EvalResult, ModelCardData

    publish, data, data_set = config.publish, config.data, data_id(config)
    tuned = metrics["models"].get("tuned")
    values = {} if tuned is None else {"accuracy": tuned.get("accuracy")}
    for average in AVERAGES if tuned else ():
        values[f"f1_{average}"] = tuned["f1"].get(average)
    results = [
        EvalResult(
            task_type="text-classification",
            task_name=_task_name(config),
            dataset_type=data_id(config) or f"{config.task.noun}s",
            dataset_name=data_name(config),
            dataset_split="test",
            dataset_revision=data.revision if data_id(config) else None,
            metric_type="accuracy" if name == "accuracy" else "f1",
            metric_name="Accuracy" if name == "accuracy" else f"F1 ({name[3:]})",
            metric_value=value,
        )
        for name, value in values.items()
        if is_number(value)
    ]
    card = ModelCardData(
        base_model=base_model_id(config),
        base_model_relation="finetune" if publish.merged else "adapter",
        datasets=[data_set] if data_set else None,
        language="en" if data.source == "demo" or data.path in STUDY_DATA else None,
        library_name="transformers" if publish.merged else "peft",
        license=publish.license,
        metrics=["accuracy", "f1"],
        model_name=repo.split("/")[-1],
        pipeline_tag="text-classification",
        tags=list(dict.fromkeys(publish.tags)),
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def _opening(config: Config) -> str:
    base = base_model_id(config)
    named = f"[{base}](https://huggingface.co/{base})" if base else "a local base model"
    what = "A language model" if config.publish.merged else "A LoRA adapter"
    return (
        f"{what} that reads {_answers_with(config)}. It was fine-tuned from {named} on "
        f"{data_name(config)}."
    )


def _task_name(config: Config) -> str:
    task, count = config.task, len(config.task.labels)
    words = {2: "two", 3: "three", 4: "four", 5: "five"}
    kind = "rating" if task.ordinal else "classification"
    return f"{task.noun.capitalize()} {kind}, {words.get(count, count)} classes"


def _answers_with(config: Config) -> str:
    task = config.task
    if task == YELP:
        return "a customer's review and answers with its rating, `0` (one star) to `4` (five stars)"
    shown = [
        _code(label) + (f" ({_plain(name)})" if name != label else "")
        for label, name in zip(task.labels, task.shown, strict=True)
    ]
    listed = ", ".join(shown if len(shown) <= 12 else [*shown[:10], "…", shown[-1]])
    return f"{article(task.noun)} {task.noun} and answers with one of {len(shown)} labels: {listed}"


def _results(metrics: Mapping[str, Any], config: Config) -> str:
    models = metrics["models"]
    names = [name for name in ("base", "tuned") if name in models]
    if not names:
        return ""
    head = "| | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names)

    def row(label: str, *keys: str) -> str:
        cells = []
        for name in names:
            value: Any = models[name]
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            ends = (models[name].get("ci95") or {}).get(".".join(keys))
            cells.append(f"{figure(value)} {interval(ends or None)}".rstrip())
        return f"| {label} | " + " | ".join(cells) + " |"

    rows = [
        row(f"test {config.task.noun}s", "rows"),
        row("of them without a usable answer", "unparsed"),
    ]
    rows.append(row("accuracy", "accuracy"))
    rows += [row(f"F1 {average}", "f1", average) for average in AVERAGES]
    notes = (
        "Square brackets hold 95 % bootstrap intervals. *F1* is over "
        f"{'the labels 0 to 4' if config.task == YELP else 'all labels of the task'} and counts "
        "an answer that names none of them as wrong."
    )
    if shows_study(metrics, config.data.model_dump()):
        rows += [row(f"F1 {name}, over labels seen", "f1_report", name) for name in AVERAGES]
        notes += (
            " *F1 over labels seen* drops such answers and averages over every label that occurs, "
            "a stray one included; it is given because earlier reports used it, and it is not "
            "comparable between models that leave different answers out."
        )
    return "## Results\n\n" + "\n".join([head, *rows]) + f"\n\n{notes}" + _confusion(models, config)


def _confusion(models: Mapping[str, Any], config: Config) -> str:
    """The tuned model's confusion matrix as a table, readable without the picture.

    Of many classes the pairs that are taken for each other most often.
    """
    tuned = models.get("tuned") or {}
    matrix = tuned.get("confusion")
    if not matrix:
        return ""
    labels = config.task.labels
    outside = f"outside 0-{len(labels) - 1}"
    titles = [*map(_plain, tuned.get("confusion_columns") or [*labels, "unparsed", outside])]
    if len(matrix) > MATRIX_CLASSES:
        return _confused(matrix, titles)
    width = len(matrix[0])
    lines = [
        "| truth \\ answer | " + " | ".join(titles[:width]) + " |",
        "|---|" + "---:|" * width,
        *(
            f"| {label} | " + " | ".join(str(cell) for cell in cells) + " |"
            for label, cells in zip(titles, matrix, strict=False)
        ),
    ]
    return "\n\nConfusion matrix of the tuned model:\n\n" + "\n".join(lines)


def _confused(matrix: Sequence[Sequence[int]], titles: Sequence[str]) -> str:
    pairs = sorted(
        (-count, i, j)
        for i, cells in enumerate(matrix)
        for j, count in enumerate(cells)
        if i != j and count
    )
    lines = [
        "| truth | answer | rows | of |\n|---|---|---:|---:|",
        *(
            f"| {titles[i]} | {titles[j]} | {-count} | {sum(matrix[i])} |"
            for count, i, j in pairs[:20]
        ),
    ]
    return "\n\nMost frequent mistakes of the tuned model:\n\n" + "\n".join(lines) if pairs else ""


_MARKS = re.compile(r"[\\`*\[\]<>|$~&]|(?<![^\W_])_|_(?![^\W_])")
"""What markdown or the Hub's formulas would read in a text; an underscore inside a word is none."""


def _plain(text: str) -> str:
    """A label or a name as markdown shows it: letter by letter."""
    return _MARKS.sub(r"\\\g<0>", text)


def _code(text: str) -> str:
    """A text in as many backticks as it needs, none of which is its own."""
    runs = re.findall("`+", text)
    fence = "`" * (max(map(len, runs), default=0) + 1)
    return f"{fence} {text} {fence}" if runs else f"{fence}{text}{fence}"


def _pictures(pictures: Sequence[str]) -> str:
    alt = {
        "loss.png": "Training and validation loss over the optimizer steps",
        "confusion.png": "Confusion matrix of the tuned model",
    }
    return "\n\n".join(f"![{alt.get(name, name)}]({name})" for name in pictures)


def _use(config: Config, repo: str, native: bool) -> str:
    return f"## Use\n\n```python\n{load_snippet(config, repo, native)}\n```"


def load_snippet(config: Config, repo: str, native: bool = False) -> str:
    """Python that loads the published model and answers, as the evaluation did."""
    return snippet(config, repo, base_model_id(config) or "PATH/TO/BASE_MODEL", native)


def _training(config: Config, record: Mapping[str, Any], gpu_hours: GpuHours | None) -> str:
    lora, train, data = config.lora, config.train, config.data
    rows = (record.get("data") or {}).get("rows") or {}
    steps = f", at most {train.max_steps} steps" if train.max_steps else ""
    warm = "at most 20" if train.warmup_steps == "auto" else str(train.warmup_steps)
    counted = ", ".join(f"{count:,} {name}" for name, count in rows.items())
    facts = [
        f"Data: {data_name(config)}" + (f"; {config.task.noun}s: {counted}" if counted else ""),
        f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, on "
        + (", ".join(f"`{name}`" for name in lora.target) if lora.target else "the attention"),
        f"AdamW, peak learning rate {train.learning_rate:g} ({train.schedule}, "
        f"{warm} warm-up steps), weight decay {train.weight_decay:g}",
        f"{train.epochs} epoch{'s' if train.epochs > 1 else ''}{steps}, "
        f"{train.global_batch} sequences an optimizer step, at most {data.cutoff} tokens each",
        f"Base weights in {config.model.precision}, computed in {train.precision}; "
        f"loss on the answer only; seed {config.seed}",
    ]
    if train.start is not None:
        named = train.start if _is_hub_id(train.start) else Path(train.start).name
        facts.insert(1, f"Goes on from the adapter `{named}`: its first weights are not fresh ones")
    if gpu_hours is not None:
        facts.append(str(gpu_hours))
    return "## Training\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _limits(config: Config, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    data, noun = record.get("data") or {}, config.task.noun
    truncated, twins = data.get("truncated"), data.get("duplicates")
    facts = [
        f"It was tested on {noun}s from the source that it was trained on, and on nothing else.",
        f"It inherits the biases of the base model and of the people who wrote the {noun}s. It is "
        "not meant for decisions about persons or businesses.",
        f"One training run with one seed: the intervals cover the choice of test {noun}s, not the "
        "chance in training.",
    ]
    if mistakes := _mistakes(metrics, config):
        facts.insert(1, mistakes)
    if truncated:
        facts.append(
            f"{truncated:,} {noun}s over {config.data.cutoff} tokens lost their end before the "
            "model saw them."
        )
    if twins:
        facts.append(f"{twins:,} test {noun}s also stand in the training data.")
    if config.model.path == DEMO_MODEL and not config.publish.merged:
        facts.append(
            "The adapter was trained and tested on the base model's packaged GGUF weights. The "
            "Hub's own, which the snippet loads, may differ from them, and so may the answers."
        )
    facts.append(
        f"The licence given here is `{config.publish.license}`; the base model's and the data's "
        "own terms hold as well."
    )
    return "## Limitations\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _mistakes(metrics: Mapping[str, Any], config: Config) -> str:
    """How many of the tuned model's answers are wrong; how far off where that means something."""
    matrix = (metrics["models"].get("tuned") or {}).get("confusion") or []
    wrong = sum(sum(cells) for cells in matrix) - sum(c[i] for i, c in enumerate(matrix))
    if not wrong:
        return ""
    said = f"{wrong:,} test {config.task.noun}s got a wrong answer"
    if not config.task.ordinal:
        return f"{said}."
    count = len(config.task.labels)
    near = sum(cells[j] for i, cells in enumerate(matrix) for j in (i - 1, i + 1) if 0 <= j < count)
    return f"{said}, {near:,} of them one {config.task.unit} off."


def _provenance(record: Mapping[str, Any]) -> str:
    code, model = record.get("code") or {}, record.get("model") or {}
    image, data = record.get("image") or {}, record.get("data") or {}
    changed = " with uncommitted changes" if code.get("dirty") else ""
    facts = [
        f"Code: yelp_hpc {code.get('version', 'unknown')}"
        + (f", git commit `{code['git_sha']}`{changed}" if code.get("git_sha") else ""),
        f"Base model fingerprint: `{model['fingerprint']}`" if model.get("fingerprint") else "",
        f"Data fingerprint: `{data['fingerprint']}`" if data.get("fingerprint") else "",
        f"Image: `{image['sha256']}`" if image.get("sha256") else "",
        "`run.json` holds the whole configuration and the package versions, `metrics.json` every "
        "figure. `python -m yelp_hpc reproduce --from run.json --run NEW` prepares the same run.",
    ]
    return "## Provenance\n\n" + "\n".join(f"- {fact}" for fact in facts if fact)
