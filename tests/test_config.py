"""Settings: every problem at once, the nearest key named, the origin of each value known."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from yelp_hpc.config import Config, load_config
from yelp_hpc.errors import RequestError

ROOT = Path(__file__).resolve().parent.parent
GOOD = "model: {path: somewhere}\ndata: {source: hub, path: a/b}\n"


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_reports_run_is_spelled_out() -> None:
    config = load_config(ROOT / "configs/yelp_chatglm3.yaml").config
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.08)
    assert config.lora.target == ("query_key_value",)
    assert (config.data.train_rows, config.data.validation_share) == (160_000, 0.06)
    assert (config.data.cutoff, config.train.warmup_steps, config.train.epochs) == (1024, 20, 1)
    assert (config.train.learning_rate, config.train.schedule) == (5e-5, "cosine")
    assert (config.train.precision, config.train.nproc) == ("fp16", 4)
    assert config.train.global_batch == 4 * 4 * 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads_and_opens_with_its_command(path: Path) -> None:
    load_config(path)
    assert "python -m yelp_hpc submit" in path.read_text(encoding="utf-8").split("\nname:")[0]


def test_overrides_and_origins(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "train:\n  learning_rate: 1e-3\n  epochs: 2\n")
    loaded = load_config(path, ["train.epochs=3", "lora.target=[a, b]"])
    assert loaded.config.train.learning_rate == 1e-3
    assert loaded.config.train.epochs == 3
    assert loaded.config.lora.target == ("a", "b")
    assert loaded.origin["train.learning_rate"] == f"{path}:4"
    assert loaded.origin["train.epochs"] == "--set"
    assert "train.max_grad_norm" not in loaded.origin


def test_a_loaded_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, GOOD)).config
    with pytest.raises(ValidationError):
        config.train.epochs = 7  # type: ignore[misc]


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = GOOD + "train:\n  learning_rat: 1\n  epochs: none\nlora:\n  rank: -1\nsead: 4\n"
    with pytest.raises(RequestError) as caught:
        load_config(written(tmp_path, text))
    message = str(caught.value)
    assert "unknown key train.learning_rat; did you mean train.learning_rate?" in message
    assert "unknown key sead; did you mean seed?" in message
    assert "train.epochs" in message
    assert "lora.rank" in message
    assert ":4:" in message  # the line of learning_rat
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "key: value"),
        ("model: [unclosed\n", "is not YAML"),
        ("model: {path: a}\nmodel: {path: b}\n", "written twice"),
        (b"model: {path: caf\xe9}\n", "not UTF-8"),
        ("model: {path: a}\ndata: {source: ftp}\n", "data.source"),
        ("model: {path: a}\ndata: {source: hub}\n", "needs data.path"),
        ("model: {path: a}\ndata: {source: file}\n", "needs data.train"),
        ("data: {source: demo}\n", "model is missing"),
        (GOOD + "prompt: {template: no place}\n", "{review}"),
        (GOOD + "publish: {repo_id: noowner}\n", "owner/name"),
        (GOOD + "infer: {models: []}\n", "infer.models"),
        (GOOD + "name: 'a b; rm'\n", "name"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RequestError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    with pytest.raises(RequestError, match=r"did you mean .*config\.yaml"):
        load_config(tmp_path / "confg.yaml")


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train.epochs=[", "name.deep=1"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(RequestError, match="--set"):
        load_config(written(tmp_path, GOOD + "name: x\n"), [override])


@pytest.mark.parametrize("key", ["labels", "values", "names"])
@pytest.mark.parametrize(
    "texts",
    [
        ["01", "010", "1e3", "1_000", "0x10", "1.50", ".5", "+1", ".nan"],
        ["yes", "no", "on", "off", "True", "null", "~", "2024-01-01", "1:30", "=", "<<"],
    ],
)
def test_labels_are_the_text_that_stands_there(tmp_path: Path, key: str, texts: list[str]) -> None:
    task = {"labels": [f"label {i}" for i in range(len(texts))], key: texts}
    lists = {name: f"[{', '.join(entries)}]" for name, entries in task.items()}
    in_file = "task:\n" + "".join(f"  {name}: {text}\n" for name, text in lists.items())
    overrides = [f"task.{name}={text}" for name, text in lists.items()]
    whole = "task={" + ", ".join(f"{name}: {text}" for name, text in lists.items()) + "}"
    for text, asked in ((in_file, []), ("", overrides), ("", [whole])):
        loaded = load_config(written(tmp_path, GOOD + text), asked)
        assert getattr(loaded.config.task, key) == tuple(texts)
        assert Config.model_validate(loaded.given) == loaded.config  # as `verify` reads it


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("[a, [b]]", r"entry 1 is \['b'\], no text: put it in quotes"),
        ("[a, b: c]", "entry 1 is {'b': 'c'}, no text"),
        ('["", a]', "'' is empty"),
        ('[" a", "b "]', "' a' begins or ends with a space, 'b ' begins or ends with a space"),
        (r'["a\nb", c]', "has several lines"),
        (r'["a\eb", "c\0"]', "'a.x1bb' holds a control character, 'c.x00' holds"),
        (r'["caf\u00e9", "cafe\u0301"]', "labels holds 'café' twice"),
        ("[a, a]\n  names: [x]", "labels holds 'a' twice; names holds 1 entries for 2 labels"),
    ],
)
def test_what_is_no_label_is_named(tmp_path: Path, labels: str, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        load_config(written(tmp_path, GOOD + f"task:\n  labels: {labels}\n"))
