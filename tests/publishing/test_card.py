"""The card: metadata that huggingface_hub takes, figures that are those of metrics.json."""

from __future__ import annotations

import copy
import html
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from tokenizers import processors
from transformers import AutoTokenizer

from tests.tiny import HEAD, TAIL, make_model, reviews
from yelp_hpc.config import Config, config_from_dict
from yelp_hpc.evaluation.confusion_plot import draw_confusion
from yelp_hpc.publishing.card import load_snippet, model_card
from yelp_hpc.rundir.attempts import GpuHours
from yelp_hpc.task import YELP
from yelp_hpc.training.loss_plot import draw_loss

METRICS: dict[str, Any] = {
    "models": {
        name: {
            "rows": 50,
            "answered": 48,
            "unparsed": 2,
            "outside": 0,
            "accuracy": accuracy,
            "f1": {"micro": accuracy + 0.01, "macro": 0.5, "weighted": 0.52},
            "f1_report": {"micro": 0.6, "macro": 0.41, "weighted": 0.61},
            "per_class": [],
            "confusion": [[6, 2, 0, 0, 1, 1]] + [[1, 1, 5, 1, 2, 0]] * 4,
            "ci95": {"accuracy": [accuracy - 0.1, accuracy + 0.1], "f1.macro": [0.4, 0.6]},
        }
        for name, accuracy in (("base", 0.21), ("tuned", 0.46))
    },
    "report": {},
}
RECORD: dict[str, Any] = {
    "code": {"version": "0.1.0", "git_sha": "b" * 40, "dirty": True},
    "model": {"fingerprint": "c" * 64},
    "data": {"rows": {"train": 1504}, "truncated": 12, "duplicates": 3, "fingerprint": "d" * 64},
    "image": {"sha256": "e" * 64},
}


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "model": {"path": "THUDM/chatglm3-6b-base", "revision": "f" * 40},
        "data": {"source": "hub", "path": "Yelp/yelp_review_full", "revision": "main"},
        "publish": {"repo_id": "me/yelp-stars", "license": "other", "tags": ["lora", "yelp"]},
    }
    for section, settings in sections.items():
        values[section] = {**values.get(section, {}), **settings}
    return config_from_dict(values)


def head(card: str) -> dict[str, Any]:
    opening, text, _ = card.split("---\n", 2)
    assert opening == ""
    value = yaml.safe_load(text)
    assert isinstance(value, dict)
    return value


def test_metadata_is_taken_by_the_hubs_own_classes() -> None:
    text = model_card(config(), METRICS, RECORD)
    data: Any = ModelCard(text).data  # refuses a malformed model-index
    assert data.base_model == "THUDM/chatglm3-6b-base"
    assert data.datasets == ["Yelp/yelp_review_full"]
    assert (data.library_name, data.license) == ("peft", "other")
    assert data.tags == ["lora", "yelp"]
    name, results = model_index_to_eval_results(head(text)["model-index"])
    assert name == "yelp-stars"
    figures = {result.metric_name: result.metric_value for result in results}
    tuned = METRICS["models"]["tuned"]
    assert figures == {
        "Accuracy": tuned["accuracy"],
        **{f"F1 ({k})": v for k, v in tuned["f1"].items()},
    }
    assert {result.dataset_type for result in results} == {"Yelp/yelp_review_full"}


def test_both_conventions_intervals_and_confusion_are_shown() -> None:
    text = model_card(config(), METRICS, RECORD, pictures=["loss.png"], gpu_hours=GpuHours(9.25, 1))
    assert "| accuracy | 0.210 [0.110, 0.310] | 0.460 [0.360, 0.560] |" in text
    assert "| F1 macro | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in text
    assert "| F1 macro, over labels seen | 0.410 | 0.410 |" in text
    assert "| of them without a usable answer | 2 | 2 |" in text
    assert "| 0 | 6 | 2 | 0 | 0 | 1 | 1 |" in text
    assert "](loss.png)" in text and "confusion.png" not in text
    assert "GPU-hours: 9.25 used, 1.00 of them lost to interruptions" in text
    assert "12 reviews over" in text and "3 test reviews also stand" in text
    assert "uncommitted changes" in text


@pytest.mark.parametrize(
    ("path", "count", "shown"),
    [
        ("a/b", {}, False),
        ("a/b", {"unparsed": 1}, True),
        ("a/b", {"outside": 1}, True),
        ("Yelp/yelp_review_full", {}, True),
    ],
)
def test_the_reports_convention_stands_where_it_differs_and_beside_its_own_data(
    path: str, count: dict[str, int], shown: bool
) -> None:
    metrics = copy.deepcopy(METRICS)
    for model in metrics["models"].values():
        model |= {"unparsed": 0, "outside": 0}
    metrics["models"]["base"] |= count
    text = model_card(config(data={"path": path}), metrics, RECORD)
    assert ("over labels seen" in text) == shown and "| F1 macro | 0.500" in text


def test_the_distance_of_mistakes_is_counted() -> None:
    metrics = copy.deepcopy(METRICS)
    confusion = [[0] * 6 for _ in range(5)]
    confusion[0][:] = [3, 2, 0, 0, 1, 1]  # two one star off, one four off, one without answer
    metrics["models"]["tuned"]["confusion"] = confusion
    text = model_card(config(), metrics, RECORD)
    assert "4 test reviews got a wrong answer, 2 of them one star off." in text


def test_nothing_is_claimed_that_is_not_known() -> None:
    metrics = {"models": {"base": METRICS["models"]["base"]}, "report": {}}
    text = model_card(config(), metrics, {})
    assert "model-index" not in head(text)  # there is no tuned model's figure
    assert "GPU-hours" not in text and "git commit" not in text
    undefined = copy.deepcopy(METRICS)
    undefined["models"]["tuned"]["f1"]["macro"] = None
    values = [
        m["name"]
        for r in head(model_card(config(), undefined, RECORD))["model-index"][0]["results"]
        for m in r["metrics"]
    ]
    assert "F1 (macro)" not in values and "Accuracy" in values


def test_a_local_path_is_never_shown() -> None:
    text = model_card(
        config(
            model={"path": "/home/ann/models/base", "revision": None},
            data={"source": "file", "path": None, "train": "/home/ann/a.csv", "test_rows": 5},
        ),
        METRICS,
        RECORD,
    )
    assert "/home/ann" not in text
    assert "base_model" not in head(text) and "datasets" not in head(text)


def test_the_demos_base_model_is_named() -> None:
    demo = config(
        model={"path": "demo:smollm2-135m", "revision": None},
        data={"source": "demo", "path": None, "revision": None},
    )
    assert head(model_card(demo, METRICS, RECORD))["base_model"].endswith("SmolLM2-135M-Instruct")


def test_the_same_run_gives_the_same_bytes() -> None:
    assert model_card(config(), METRICS, RECORD) == model_card(config(), METRICS, RECORD)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_every_snippet_is_python(merged: bool, native: bool) -> None:
    wanted = config(publish={"merged": merged, "branch": "run-1"})
    snippet = load_snippet(wanted, "me/yelp-stars", native)
    compile(snippet, "snippet", "exec")
    assert ("PeftModel" in snippet) is not merged
    assert ("yelp_hpc" in snippet) is native
    assert 'revision="run-1"' in snippet


@pytest.mark.parametrize("labels", [("0", "1", "2", "3", "4"), ("good", "nice", "best")])
def test_what_a_tokenizer_appends_is_no_part_of_an_answer(
    tmp_path: Path, labels: tuple[str, ...]
) -> None:
    model = make_model(tmp_path / "model", initializer_range=0.3)
    written: dict[str, dict[str, Any]] = {
        "publish": {"merged": True},
        "prompt": {"template": HEAD + "{review}" + TAIL + "{label}"},
        "infer": {"precision": "fp32"},
    }
    if labels != YELP.labels:
        written["task"] = {"labels": labels}
    snippet = load_snippet(config(**written), str(model)).replace("\nprint(", "\n# print(")
    found = []
    for appended in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(model)
        if appended:
            end = [("<eos>", tokenizer.eos_token_id)]
            single = processors.TemplateProcessing(single="$A <eos>", special_tokens=end)
            tokenizer.backend_tokenizer.post_processor = single
            tokenizer.save_pretrained(model)
        names: dict[str, Any] = {}
        exec(snippet, names)
        ask = names["rating" if labels == YELP.labels else "answer"]
        found.append([ask(text) for text, _ in reviews(12)])
    assert found[0] == found[1] and len(set(found[0])) > 1


@pytest.mark.parametrize(
    ("start", "named"), [("/home/me/runs/first", "first"), ("me/adapter", "me/adapter")]
)
def test_an_adapter_that_training_goes_on_from_is_named(start: str, named: str) -> None:
    text = model_card(config(train={"from": start}), METRICS, RECORD)
    assert f"Goes on from the adapter `{named}`" in text and "/home/me" not in text


def test_a_language_is_claimed_of_the_data_that_are_known() -> None:
    assert head(model_card(config(), METRICS, RECORD))["language"] == "en"
    other = config(data={"path": "me/german"})
    assert "language" not in head(model_card(other, METRICS, RECORD))


def test_odd_values_stay_valid_yaml() -> None:
    odd = config(publish={"tags": ["a: b", "ünï", "#x", "yes"], "license": "cc-by-4.0"})
    assert head(model_card(odd, METRICS, RECORD))["tags"] == ["a: b", "ünï", "#x", "yes"]


MARKS = ["a | b", "<b>x</b>", "$x_1$", "**a**", "`b`", "__class__", "card_arrival", "[x](y)", "\\n",
         "a &amp; b", "~~x~~", "a``b"]  # fmt: skip


@pytest.mark.parametrize("repeated", [1, 2])
def test_labels_are_shown_letter_by_letter(repeated: int) -> None:
    """In the table of a few labels, in the list of the mistakes between many."""
    labels = [f"{mark}{' x' * i}" for i in range(repeated) for mark in MARKS]
    metrics = copy.deepcopy(METRICS)
    size = len(labels)
    metrics["models"]["tuned"] |= {
        "confusion": [[int(j == (i + 1) % size) for j in range(size + 1)] for i in range(size)],
        "confusion_columns": [*labels, "unparsed"],
    }
    names = [f"the name of {label}" for label in labels]
    wanted = config(task={"labels": labels, "names": names, "ordinal": False})
    card = model_card(wanted, metrics, RECORD).split("---\n", 2)[2]
    page = MarkdownIt("commonmark").enable("table").render(card)
    cells = [html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", page)]
    assert {*labels[:20]} <= {*cells}
    opening = html.unescape(page.split("</p>", 1)[0])
    for label, name in [*zip(labels, names, strict=True)][:10]:
        assert f"<code>{label}</code> ({name})" in opening


def test_the_picture_of_any_labels_is_drawn(recwarn: pytest.WarningsRecorder) -> None:
    labels = ["$\\no{$", "$x_1$", "好的", "שלום", "👩\u200d💻", "a\tb", "unparsed", "x" * 300]
    matrix = [[1] * (len(labels) + 1)] * len(labels)
    pictures = {draw_confusion(matrix, [*labels[:2], one, *labels[3:], "unparsed"])
                for one in ("class 2", *labels[2:3])}  # fmt: skip
    assert len(pictures) == 1  # letters that the font has not
    draw_confusion([[1, 1]] * 2, ["W" * 20, "W" * 40])  # no room taken from the cells
    assert not [one for one in recwarn if re.search("Glyph|collapsed", str(one.message))]


def test_many_classes_fit_into_a_picture() -> None:
    png = draw_confusion([[1] * 801] * 800, [f"label {i}" for i in range(801)])
    assert max(int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) < 3000


def test_the_pictures_heed_no_settings_of_the_users_matplotlib(tmp_path: Path) -> None:
    """LaTeX for every letter ends a training where there is none; another font, other bytes."""
    lines = [{"step": step, "loss": 1.0, "learning_rate": 0.1} for step in (1, 2)]

    def pictures() -> tuple[bytes, bytes]:
        draw_loss(lines, tmp_path / "loss.png")
        return draw_confusion([[1, 2], [3, 4]], ["a", "b"]), (tmp_path / "loss.png").read_bytes()

    before = pictures()
    theirs: Any = {
        "text.usetex": True,
        "font.family": "serif",
        "savefig.dpi": 10,
        "lines.marker": "x",
    }
    with matplotlib.rc_context(theirs):
        assert pictures() == before
        assert matplotlib.rcParams["text.usetex"]
