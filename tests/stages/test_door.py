"""Broken model folders: plan, doctor, submit, prepare and train refuse them in the same words."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.test_malformed import call
from tests.tiny import make_model, prepare_run, reviews, tiny_config
from yelp_hpc.config import Config, load_config
from yelp_hpc.data.encoding import Encoder
from yelp_hpc.errors import RequestError
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.doctor.request import Inputs, Request, inputs
from yelp_hpc.jobs.doctor.run import check_inputs
from yelp_hpc.models.door import check_model
from yelp_hpc.rundir.files import read_json, write_json
from yelp_hpc.rundir.manifest import record_run
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages import prepare
from yelp_hpc.stages.door import admit, examine, take_the_way


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its own cache, and the child's work done here: its packages take seconds to import."""
    monkeypatch.setenv("YELP_HPC_CACHE", str(tmp_path / "cache"))

    class Done:
        stdout = ""

    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if "yelp_hpc.stages.door" not in " ".join(command):
            return real(command, **options)
        asked, done = json.loads(options["input"]), Done()
        answer: dict[str, Any] = {"problem": "", "notes": []}
        try:
            answer["notes"] = list(
                admit(Config.model_validate(asked["config"]), Path(asked["folder"])).notes
            )
        except RequestError as error:
            answer["problem"] = str(error)
        done.stdout = json.dumps(answer)
        return done

    monkeypatch.setattr("yelp_hpc.models.door.subprocess.run", run)
    yield


def changed(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def only(name: str, content: str = "{}") -> Callable[[Path], None]:
    """Nothing but one file."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_text(content)

    return change


def also(name: str) -> Callable[[Path], None]:
    """One file more."""

    def change(folder: Path) -> None:
        (folder / name).write_text("{}")

    return change


def eighths(folder: Path) -> None:
    """A matrix in eight bits, which config.json says nothing of."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")


def in_parts(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_end(folder: Path) -> None:
    changed(eos_token_id=None)(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("eos_token")
    path.write_text(json.dumps(values))


@dataclass(frozen=True)
class Broken:
    name: str
    break_: Callable[[Path], None]
    says: str
    train: bool = True
    """The model is to blame and not its tokenizer: train needs none, prepare has bound it."""


BROKEN = [
    Broken("an adapter", only("adapter_config.json", '{"base_model_name_or_path": "me/base"}'),
           "is an adapter, not a model.*me/base"),
    Broken("an adapter in it", also("adapter_config.json"), "holds an adapter beside a model"),
    Broken("GGUF", only("model.gguf"), "holds GGUF"),
    Broken("no config", lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    Broken("no model_type", only("config.json"), "names no model_type"),
    Broken("quantised", changed(quantization_config={"quant_method": "gptq", "bits": 4}),
           "quantised .gptq."),
    Broken("quantised inside", changed(text_config={"quantization_config": {"bits": 4}}),
           "weights are quantised"),
    Broken("quantised unsaid", eighths, "quantised .F8_E4M3."),
    Broken("a classifier", changed(architectures=["LlamaForSequenceClassification"]),
           "LlamaForSequenceClassification, whose head gives no words"),
    Broken("a drafting model", changed(model_type="gemma4_assistant"), "drafts for another model"),
    Broken("another size", changed(intermediate_size=96), "do not fit its config.json"),
    Broken("an encoder", changed(model_type="bert"), "bert is an encoder"),
    Broken("an encoder-decoder", changed(model_type="t5", is_encoder_decoder=True),
           "t5 is an encoder-decoder"),
    Broken("its own code", changed(model_type="mymodel", auto_map={"AutoModel": "m.M"}),
           "model_type mymodel .* needs its own code .auto_map.: trust_remote_code is off"),
    Broken("unknown", changed(model_type="mymodel"), "model_type mymodel .* is unknown"),
    Broken("no language model", changed(model_type="vit"), "vit .* is no decoder-only"),
    Broken("no weights", lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    Broken("no index", in_parts, "parts of the weights, but not their index"),
    Broken("half weights", cut, "weights in .* are damaged"),
    Broken("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(),
           "has no tokenizer", train=False),
    Broken("ids beyond the embedding", changed(vocab_size=100), "ids up to .* has 100 rows"),
    Broken("no end of sequence", no_end, "has no end-of-sequence token"),
    Broken("nonsense", changed(num_attention_heads="many"),
           "config.json cannot be used: num_attention_heads is 'many', and a positive whole"),
    Broken("no layers", changed(num_hidden_layers=0), "num_hidden_layers is 0, and a positive"),
    Broken("no size", changed(hidden_size=-8, head_dim=True, text_config={"vocab_size": "9"}),
           "hidden_size is -8, .*; head_dim is True, .*; text_config.vocab_size is '9', and"),
    Broken("no positions", changed(max_position_embeddings=0),
           "max_position_embeddings is 0, and a positive whole number is wanted"),
    Broken("no base", changed(rope_theta=0, rms_norm_eps=-1, text_config={"norm_eps": "x"}),
           "rms_norm_eps is -1, and a number .*; rope_theta is 0, .*text_config.norm_eps is"),
    Broken("no rotation", changed(rope_parameters={"rope_theta": None, "factor": True}),
           "rope_parameters.rope_theta is None, .*; rope_parameters.factor is True, and a number"),
    Broken("layers", changed(num_hidden_layers=10**9), "is 1000000000, and no model has so many"),
    Broken("null", changed(hidden_size=None, num_attention_heads=None),
           "config.json cannot be used: hidden_size is null, .*; num_attention_heads is null, and"),
    Broken("beyond 1", changed(attention_dropout=1.5), "attention_dropout is 1.5, and a number fr"),
    Broken("no activation", changed(hidden_act="foo"),
           "config.json cannot be used: hidden_act is 'foo': there is no such one"),
    Broken("not in its bounds", changed(initializer_range=-1), "initializer_range is -1: expected"),
    Broken("odd heads", changed(num_key_value_heads=3), "is 3, which does not divide num_att.*, 4"),
]  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_every_command_refuses_a_broken_model_folder_in_the_same_words(
    case: Broken, sound: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    rows = tmp_path / "reviews.csv"
    rows.write_text("label,text\n" + "".join(f"{y},{text}\n" for text, y in reviews(40)))
    data = {"train": str(rows), "cutoff": 256}
    config = tiny_config(folder, data=data, train={"max_steps": 1})
    run = prepare_run(tmp_path / "run", sound)
    case.break_(folder)
    with pytest.raises(RequestError, match=case.says) as asked:
        check_model(config)  # plan, submit and its --dry-run
    with pytest.raises(RequestError, match=case.says) as prepared:
        prepare.run(RunPaths(tmp_path / "new"), config)
    assert str(prepared.value) == str(asked.value)
    assert not (tmp_path / "new" / "prepare").exists()
    found: Inputs = inputs(config)
    text = " ".join(f.text for f in check_inputs(found, Request(ClusterConfig(), config)))
    assert str(asked.value) in text or found.problem, text
    if case.train:
        with pytest.raises(RequestError) as trained:
            take_the_way(None, config, folder, 40)
        assert str(trained.value) == str(asked.value)
    assert run.tokens.is_file()


def configured(case: Broken, sound: Path, folder: Path) -> str:
    """Below `folder` a broken model, its data and c.yaml; returns what is said of the model."""
    shutil.copytree(sound, folder / "model")
    rows = "".join(f"{y},{text}\n" for text, y in reviews(40))
    (folder / "reviews.csv").write_text(f"label,text\n{rows}")
    data = {"train": str(folder / "reviews.csv"), "cutoff": 256}
    config = tiny_config(folder / "model", data=data, train={"max_steps": 1, "nproc": 1})
    (folder / "c.yaml").write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    case.break_(folder / "model")
    with pytest.raises(RequestError, match=case.says) as asked:
        check_model(config)
    return " ".join(str(asked.value).split())


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_the_command_line_refuses_it_in_the_same_words_and_writes_nothing(
    case: Broken,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = configured(case, sound, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "no-slurm-here"))
    for line in (
        "plan --config c.yaml",
        "submit all --config c.yaml --run run --dry-run",
        "submit all --config c.yaml --run run --executor local",
        "doctor --config c.yaml",
    ):
        code, output = call(line.split(" "), monkeypatch, capfd)
        assert said in " ".join(output.split()), f"{line}\n{output}"
        assert code == (1 if line.startswith("doctor") else 2), line
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in BROKEN if c.train], ids=lambda case: case.name)
def test_a_training_refuses_it_in_the_same_words(
    case: Broken,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where the folder was whole when its data were prepared."""
    said = configured(case, sound, tmp_path)
    monkeypatch.chdir(tmp_path)
    run = prepare_run(tmp_path / "run", sound)
    record_run(run.root, load_config(tmp_path / "c.yaml"), "c.yaml", [])
    code, output = call(["run", "train", "--run", "run"], monkeypatch, capfd)
    if case.name == "ids beyond the embedding":  # no tokenizer is read here: the weights tell
        said = "do not fit its config.json"
    assert said in " ".join(output.split()), output
    assert code == 2 and "Traceback" not in output
    assert not run.adapter.exists()


def test_a_sound_folder_is_admitted_and_its_answer_kept(sound: Path, tmp_path: Path) -> None:
    config = tiny_config(sound, data={"cutoff": 256})
    assert check_model(config) == ()
    (kept,) = (tmp_path / "cache" / "door").iterdir()
    kept.write_text('{"problem": "", "notes": ["from the cache"]}')
    assert check_model(config) == ("from the cache",)


def test_a_model_without_a_twin_is_asked_itself_in_prepare(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yelp_hpc.models.packed.proof.twin", lambda *_: None)
    config = tiny_config(sound, data={"cutoff": 256})
    assert admit(config, sound).way is None
    assert check_model(config) == ("llama has no small twin here: prepare asks the model itself",)
    assert examine(config, sound).way == "packed"


@pytest.mark.parametrize("piece", [None, 1, 100])
def test_prepare_reads_every_weight(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int | None
) -> None:
    if piece:
        monkeypatch.setattr("yelp_hpc.models.weights._PIECE", piece)
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.one_number"] = torch.tensor(float("inf"))
    tensors["lm_head.weight"][[3, -1], [3, -1]] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = tiny_config(folder, data={"cutoff": 256})
    check_model(config)  # reads headers alone
    with pytest.raises(RequestError, match="NaN or infinity") as refused:
        examine(config, folder)
    assert str(refused.value).splitlines()[1:] == ["  - lm_head.weight", "  - model.one_number"]


def load(folder: Path) -> Any:
    from yelp_hpc.models.load import load_tokenizer

    return load_tokenizer(folder)


TEMPLATE = "Review: {review}\nOutput: {label}"


def test_special_tokens_in_a_review_are_text_and_in_the_template_tokens(sound: Path) -> None:
    tokenizer = load(sound)
    end = tokenizer.eos_token_id
    encode = Encoder(tokenizer, TEMPLATE)
    spelled, plain = encode(["Review: a<eos>b\nOutput: 3", "Review: ab\nOutput: 3"])
    assert end not in spelled
    assert tokenizer.decode(spelled) == "Review: a<eos>b\nOutput: 3"
    assert plain == tokenizer("Review: ab\nOutput: 3")["input_ids"]
    chat = Encoder(tokenizer, "<eos>Review: {review}<eos>\nOutput: {label}")
    (ids,) = chat(["<eos>Review: a<eos>b<eos>\nOutput: 3"])
    assert ids.count(end) == 2
    assert tokenizer.decode(ids) == "<eos>Review: a<eos>b<eos>\nOutput: 3"
    assert chat.spelled("x<eos>y<pad>") == ["<pad>", "<eos>"]


@pytest.mark.parametrize("own", [False, True])
def test_texts_are_encoded_as_a_call_of_the_tokenizer_does(sound: Path, own: bool) -> None:
    """Whatever an earlier call asked for, and where the tokenizer's class does more than call."""
    tokenizer = load(sound)
    if own:

        class Lower(type(tokenizer)):  # type: ignore[misc]
            def _encode_plus(self, text: Any, **options: Any) -> Any:
                lowered = text.lower() if isinstance(text, str) else [one.lower() for one in text]
                return super()._encode_plus(lowered, **options)

        tokenizer = Lower.from_pretrained(sound)
    encode = Encoder(tokenizer, TEMPLATE)
    inner = ("", "GOOD food 12", "naïve ☕\r\n ", "x" * 3000)
    texts = [f"Review: {text}\nOutput: 3" for text in inner]
    tokenizer(texts, padding=True, truncation=True, max_length=3, split_special_tokens=True)
    assert (
        encode([*texts, TEMPLATE + "<eos>"]) == tokenizer([*texts, TEMPLATE + "<eos>"])["input_ids"]
    )


def test_what_a_tokenizer_appends_is_left_off(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    tokenizer = load(folder)
    plain = Encoder(tokenizer, TEMPLATE)(["Review: ab\nOutput: 3"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    again = load(folder)
    assert again("ab")["input_ids"][-1] == again.eos_token_id
    texts = ["Review: ab\nOutput: 3", "Review: a<eos>b\nOutput: 3"]
    found = Encoder(again, TEMPLATE)(texts)
    assert found[0] == plain[0]
    assert again.eos_token_id not in found[1]


def test_prepare_counts_reviews_that_spell_special_tokens(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "reviews.csv"
    texts = [f"{y},{text}\n" for text, y in reviews(60)]
    rows.write_text("label,text\n3,good <eos> food\n" + "".join(texts))
    config = tiny_config(sound, data={"train": str(rows), "test_rows": 20, "cutoff": 256})
    run = RunPaths(tmp_path / "run")
    write_json(run.run_json, {})
    prepare.run(run, config)
    assert "1 reviews spell special tokens (<eos>): kept as text" in capsys.readouterr().err
    assert read_json(run.tokens)["eos_id"] == 1


def test_a_special_token_that_is_a_word_of_the_vocabulary_is_no_text(tmp_path: Path) -> None:
    """As in Unigram vocabularies, where splitting special tokens leaves them what they are."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<eos>", "<unk>"]
    words.train_from_iterator(
        [TEMPLATE.format(review="good food", label="0 1 2 3 4")],
        trainers.WordLevelTrainer(special_tokens=special, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.pad_token = "good"
    encode = Encoder(tokenizer, TEMPLATE)
    assert encode(["Review: good<eos> sushi\nOutput: 3"])  # unknown words of a review are no fault
    with pytest.raises(RequestError, match=r"spells the special token <eos>, .* \('good <eos>"):
        encode(["Review: good <eos> food\nOutput: 3"])


def test_an_answer_that_ends_a_sequence_is_refused(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "3"}))
    with pytest.raises(RequestError, match="the answer '3' holds the token that ends a sequence"):
        admit(tiny_config(folder), folder)
