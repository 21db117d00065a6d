"""infer on a tiny random Llama: the same predictions however the work is cut, batched or killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from yelp_hpc.config import Config, config_from_dict
from yelp_hpc.errors import NodeFault, RequestError, SavedForRequeue, StageError
from yelp_hpc.inference.answers import parse_label
from yelp_hpc.inference.generation import GreedyDecoder, plan_batches
from yelp_hpc.inference.predictor import Predictor, load_predictor
from yelp_hpc.inference.shard_files import parts_of, provenance_of, read_windows, write_shard
from yelp_hpc.jobs.progress import shards_missing, shards_progress
from yelp_hpc.models.chatglm3.model import ChatGLMConfig, ChatGLMForCausalLM
from yelp_hpc.models.load import load_model, load_tokenizer
from yelp_hpc.models.packed.batch import prepare_model
from yelp_hpc.rundir.files import write_json, write_marker
from yelp_hpc.rundir.node_faults import read_faults
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages import infer

ROWS = 120
WORDS = ["food", "good", "bad", "stars", "was", "the", "a", "\n", ".", "waited", "hours", "of", "/"]
DIGITS = [str(digit) for digit in range(10)]
PREFIX = ["Judge", "the", "review", ":"]
EOS = "<eos>"


def save_model(folder: Path) -> PreTrainedTokenizerFast:
    """A random Llama of two layers and a tokenizer whose tokens are whole words."""
    words = ["<unk>", EOS, *DIGITS, *dict.fromkeys([*PREFIX, *WORDS, "Output", "Review"])]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=EOS, pad_token=EOS, unk_token="<unk>"
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.4,  # a random model with opinions: answers differ between reviews
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_test_set(run: RunPaths, tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(3)
    rows = draw.sample(range(10_000), ROWS)  # ids are not positions and not sorted
    texts = [" ".join(draw.choices(WORDS + DIGITS, k=draw.randint(1, 60))) for _ in rows]
    prompts = [" ".join([*PREFIX, text, "Output"]) for text in texts]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    table = pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "label": pa.array([row % 5 for row in rows], pa.int8()),
            "text": texts,
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "length": pa.array([len(i) for i in ids], pa.int32()),
        }
    )
    run.prepare.mkdir(parents=True)
    pq.write_table(table, run.split("test"), row_group_size=37)  # shards cross row groups
    write_json(
        run.tokens,
        {
            "prefix": tokenizer.convert_tokens_to_ids(PREFIX),
            "label_ids": tokenizer.convert_tokens_to_ids(DIGITS[:5]),
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    )
    write_marker(run.prepare, ["test.parquet", "tokens.json"])


def save_adapter(run: RunPaths, model_folder: Path, seed: int, std: float = 0.5) -> None:
    torch.manual_seed(seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(str(run.adapter))
    write_marker(run.adapter, ["adapter_config.json", "adapter_model.safetensors"])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infer-model")
    save_model(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    save_test_set(paths, load_tokenizer(model_folder))
    return paths


def configured(model_folder: Path, **values: object) -> Config:
    return config_from_dict(
        {
            "model": {"path": str(model_folder)},
            "data": {"source": "demo"},
            "infer": {"max_new_tokens": 6, "precision": "fp32", **values},
        }
    )


def predictions(run: RunPaths, model: str = "base") -> pa.Table:
    """All shards' rows in the order of the test set."""
    tables = [pq.read_table(path) for path in sorted(run.predictions(model).glob("*.parquet"))]
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def prompts_of(run: RunPaths) -> list[list[int]]:
    ids: list[list[int]] = pq.read_table(run.split("test"))["input_ids"].to_pylist()
    return ids


def test_scores_are_the_plain_models_logits(run: RunPaths, model_folder: Path) -> None:
    infer.run(run, configured(model_folder), "base")
    found = predictions(run)
    test = pq.read_table(run.split("test"))
    assert found["row"].to_pylist() == test["row"].to_pylist()
    assert found["label"].to_pylist() == test["label"].to_pylist()
    assert found["text"].null_count == ROWS
    model = LlamaForCausalLM.from_pretrained(model_folder)
    labels = json.loads(run.tokens.read_text())["label_ids"]
    with torch.no_grad():
        expected = torch.stack(
            [model(torch.tensor([ids])).logits[0, -1, labels] for ids in prompts_of(run)]
        )
    torch.testing.assert_close(
        torch.tensor(found["scores"].to_pylist()), expected, atol=1e-4, rtol=0
    )
    assert found["prediction"].to_pylist() == expected.argmax(1).tolist()
    assert len(set(found["prediction"].to_pylist())) > 1, "the model has no opinions"


def test_an_adapter_of_zeros_changes_no_bit(run: RunPaths, model_folder: Path) -> None:
    """Base and tuned go through the same arithmetic: what differs is the adapter's doing."""
    save_adapter(run, model_folder, 1, std=0.0)
    for model in ("base", "tuned"):
        infer.run(run, configured(model_folder), model)
    assert predictions(run, "base")["scores"] == predictions(run, "tuned")["scores"]


def test_score_agrees_with_whole_answer_log_likelihoods(run: RunPaths, model_folder: Path) -> None:
    """As the LM evaluation harness does it: log p(answer | prompt) over the whole vocabulary."""
    infer.run(run, configured(model_folder), "base")
    model = LlamaForCausalLM.from_pretrained(model_folder)
    labels = json.loads(run.tokens.read_text())["label_ids"]
    expected = []
    for prompt in prompts_of(run):
        likelihoods = []
        for label in labels:
            ids = torch.tensor([[*prompt, label]])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            likelihoods.append(float(log_p.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()))
        expected.append(likelihoods.index(max(likelihoods)))
    assert predictions(run)["prediction"].to_pylist() == expected


@pytest.mark.parametrize("mode", ["score", "answer", "generate"])
def test_predictions_do_not_depend_on_batches_and_shards(
    tmp_path: Path, model_folder: Path, mode: str
) -> None:
    results = []
    for i, (max_tokens, shards) in enumerate([(8192, 1), (64, 1), (200, 3), (500, 150)]):
        paths = RunPaths(tmp_path / str(i))
        save_test_set(paths, load_tokenizer(model_folder))
        config = configured(model_folder, mode=mode, max_tokens=max_tokens, shards=shards)
        infer.run(paths, config, "base")
        assert len(list(paths.predictions("base").glob("*.parquet"))) == shards
        results.append(predictions(paths).drop_columns("scores").to_pydict())
    assert all(result == results[0] for result in results[1:])


def test_generate_writes_the_text_of_transformers_generate(
    run: RunPaths, model_folder: Path
) -> None:
    config = configured(model_folder, mode="generate", max_tokens=300, max_new_tokens=8)
    infer.run(run, config, "base")
    found = predictions(run)
    assert found["scores"].null_count == ROWS
    model = load_model(model_folder, "fp32")
    tokenizer = load_tokenizer(model_folder)
    stopped = 0
    for prompt, text, prediction in zip(
        prompts_of(run), found["text"].to_pylist(), found["prediction"].to_pylist(), strict=True
    ):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        expected = tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)
        assert expected.startswith(text)
        assert parse_label(expected) == parse_label(text) == prediction
        if text != expected:
            stopped += 1
            assert "\n" in text.lstrip() or text[-1].isspace()
    assert 0 < stopped < ROWS, "both ways to end an answer are wanted"


def test_answers_end_at_the_end_token(run: RunPaths, model_folder: Path) -> None:
    """The end token is whatever comes most often first, so that rows of a batch end apart."""
    model = load_model(model_folder, "fp32")
    with torch.no_grad():
        first = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts_of(run)]
    end = max(set(first), key=first.count)
    tokens = json.loads(run.tokens.read_text())
    write_json(run.tokens, {**tokens, "eos_id": end})
    write_marker(run.prepare, ["test.parquet", "tokens.json"])
    infer.run(run, configured(model_folder, mode="generate", max_new_tokens=8), "base")
    tokenizer = load_tokenizer(model_folder)
    texts = predictions(run)["text"].to_pylist()
    assert [text == "" for text in texts].count(True) >= first.count(end) > 1
    for prompt, text in zip(prompts_of(run), texts, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=[end, tokenizer.eos_token_id],
        )[0, len(prompt) :].tolist()
        kept = itertools.takewhile(lambda token: token not in (end, tokenizer.eos_token_id), whole)
        assert tokenizer.decode(list(kept), skip_special_tokens=True).startswith(text)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "glm4", "chatglm"])
@pytest.mark.parametrize("prefix_length", [0, 4])
def test_every_architecture_generates_as_transformers_does(kind: str, prefix_length: int) -> None:
    """Models that the fused decoder computes, and models that it does not."""
    torch.manual_seed(5)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "chatglm":
        config = ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=40,
            hidden_size=32,
            ffn_hidden_size=48,
            kv_channels=8,
            num_attention_heads=4,
            multi_query_attention=True,
            multi_query_group_num=2,
            seq_length=128,
            eos_token_id=1,
            pad_token_id=0,
        )
        model: Any = ChatGLMForCausalLM(config)
        model.eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    else:
        made = {"llama": LlamaConfig, "qwen3": Qwen3Config, "glm4": Glm4Config}[kind](**sizes)
        model = AutoModelForCausalLM.from_config(made).eval()
    draw = random.Random(2)
    prefix = draw.choices(range(2, 40), k=prefix_length)
    prompts = [prefix + draw.choices(range(2, 40), k=draw.randint(1, 30)) for _ in range(9)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=7,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        expected.append(list(itertools.takewhile(lambda token: token != 1, whole)))
    decoder = GreedyDecoder(prepare_model(model), prefix_length, {1}, 7, decided=lambda _: False)
    assert decoder.generate(prompts) == expected
    assert decoder.generate(prompts[:1]) == expected[:1]


def test_generation_batches_keep_their_budget() -> None:
    lengths = [3, 50, 48, 4, 4, 3, 200, 49, 10]
    batches = plan_batches(lengths, max_tokens=160, prefix_length=5)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * (5 + longest) <= 160
        assert sum(lengths[i] for i in batch) >= 0.5 * longest * len(batch)


@pytest.mark.parametrize("mode", ["score", "answer", "generate"])
def test_the_tuned_model_is_the_adapters(run: RunPaths, model_folder: Path, mode: str) -> None:
    from peft import PeftModel

    save_adapter(run, model_folder, seed=1)
    config = configured(model_folder, mode=mode)
    infer.run(run, config, "base")
    infer.run(run, config, "tuned")
    base, tuned = predictions(run, "base"), predictions(run, "tuned")
    assert base["prediction"].to_pylist() != tuned["prediction"].to_pylist()
    if mode == "score":
        plain = LlamaForCausalLM.from_pretrained(model_folder)
        model = PeftModel.from_pretrained(plain, str(run.adapter)).eval()
        labels = json.loads(run.tokens.read_text())["label_ids"]
        for prompt, scores in zip(prompts_of(run), tuned["scores"].to_pylist(), strict=True):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([prompt])).logits[0, -1, labels]
            torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)


def test_half_precision_keeps_the_adapter_apart(run: RunPaths, model_folder: Path) -> None:
    save_adapter(run, model_folder, seed=1)
    infer.run(run, configured(model_folder, precision="bf16"), "tuned")
    half = torch.tensor(predictions(run, "tuned")["scores"].to_pylist())
    run.shard("tuned", 0, 1).unlink()
    infer.run(run, configured(model_folder), "tuned")
    whole = torch.tensor(predictions(run, "tuned")["scores"].to_pylist())
    assert (half - whole).abs().max() < 0.1 * whole.abs().max()


def test_finished_work_is_left_alone(
    run: RunPaths, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(model_folder, shards=2)
    infer.run(run, config, "base")
    files = [run.shard("base", k, 2) for k in (0, 1)]
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    capsys.readouterr()
    infer.run(run, config, "base")
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == before
    assert "nothing to do" in "".join(capsys.readouterr())
    assert not list(run.partials("base").glob("*"))
    progress = json.loads(run.shard_progress("base", 1, 2).read_text())
    assert progress["state"] == "complete"
    assert progress["done"] == progress["rows"] == pq.read_metadata(files[1]).num_rows


def test_the_folder_of_a_model_is_one_table_for_pandas_even_while_a_shard_is_at_work(
    run: RunPaths, model_folder: Path
) -> None:
    config = configured(model_folder, shards=2, max_tokens=64)
    infer.run(run, config, "base", shard=0)
    process = started(run, config, shard=1, shards=2, parts=1)
    process.kill()
    process.communicate()
    folder = run.predictions("base")
    assert [path.name for path in folder.iterdir()] == [run.shard("base", 0, 2).name]
    first = pandas.read_parquet(folder)
    infer.run(run, config, "base")
    whole = pandas.read_parquet(folder)
    assert whole["row"].tolist() == pq.read_table(run.split("test"))["row"].to_pylist()
    assert whole.iloc[: len(first)]["prediction"].tolist() == first["prediction"].tolist()


def test_parts_and_progress_that_lie_among_the_shards_are_moved_and_used(
    run: RunPaths, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As run directories of 0.1 have them."""
    config = configured(model_folder, max_tokens=64)
    process = started(run, config)
    process.kill()
    process.communicate()
    folder = run.predictions("base")
    folder.mkdir(parents=True, exist_ok=True)
    run.partials("base").rename(folder / "partial")
    run.progress("base").rename(folder / "progress")
    said = shards_progress(run, "base", 1)
    assert said[0]["state"] == "running"
    capsys.readouterr()
    infer.run(run, config, "base")
    assert "goes on after" in "".join(capsys.readouterr())
    assert [path.name for path in folder.iterdir()] == [run.shard("base", 0, 1).name]
    assert shards_progress(run, "base", 1)[0]["state"] == "complete"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "doubled"])
def test_a_damaged_shard_is_said_and_made_again(
    run: RunPaths, model_folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(model_folder, shards=2)
    infer.run(run, config, "base")
    path = run.shard("base", 0, 2)
    whole = path.read_bytes()
    content = bytearray(whole)
    if damage == "flipped":
        content[len(content) // 4] ^= 0x10
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "empty": b"", "flipped": bytes(content)}.get(
            damage, whole
        )
    )
    if damage == "doubled":
        table = pq.read_table(path)
        pq.write_table(pa.concat_tables([table, table]), path)
    capsys.readouterr()
    infer.run(run, config, "base", 0)
    said = "".join(capsys.readouterr())
    assert path.name in said and "made again" in said
    assert path.read_bytes() == whole


def test_a_flipped_byte_is_found_or_harmless(run: RunPaths, model_folder: Path) -> None:
    """Anywhere in the file: either the check refuses it, or every value still reads the same."""
    from yelp_hpc.inference.shard_files import damage_of_shard

    infer.run(run, configured(model_folder), "base")
    path = run.shard("base", 0, 1)
    whole, table = path.read_bytes(), pq.read_table(path)
    identity = provenance_of(table.schema)["identity"]
    rows = table["row"].to_pylist()
    assert damage_of_shard(path, rows, identity) is None
    found = 0
    for position in random.Random(1).sample(range(len(whole)), 300):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        if damage_of_shard(path, rows, identity) is None:
            assert pq.read_table(path).equals(table), position
        else:
            found += 1
    assert found > 150


def test_a_new_adapter_makes_its_shards_again(
    run: RunPaths, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(model_folder)
    save_adapter(run, model_folder, seed=1)
    infer.run(run, config, "tuned")
    first = predictions(run, "tuned")["scores"]
    identity = provenance_of(pq.read_schema(run.shard("tuned", 0, 1)))
    assert identity["model"] == "tuned" and identity["mode"] == "score"
    save_adapter(run, model_folder, seed=2)
    infer.run(run, config, "tuned")
    assert "another model, adapter or setting" in "".join(capsys.readouterr())
    assert predictions(run, "tuned")["scores"] != first
    again = provenance_of(pq.read_schema(run.shard("tuned", 0, 1)))
    assert again["adapter_sha256"] != identity["adapter_sha256"]
    assert again["identity"] != identity["identity"]


def test_missing_work_of_other_stages_is_named(run: RunPaths, model_folder: Path) -> None:
    config = configured(model_folder)
    with pytest.raises(StageError, match="run train first"):
        infer.run(run, config, "tuned")
    save_adapter(run, model_folder, seed=1)
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(StageError, match="run train first"):
        infer.run(run, config, "tuned")
    with pytest.raises(RequestError, match="no shard 4"):
        infer.run(run, config, "base", 4)
    run.split("test").write_bytes(run.split("test").read_bytes()[:-10])
    with pytest.raises(StageError, match="run prepare first"):
        infer.run(run, config, "base")


def test_several_shards_load_the_model_once_and_are_the_files_of_one_each(
    run: RunPaths, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(model_folder, shards=5)
    alone = RunPaths(tmp_path / "alone")
    save_test_set(alone, load_tokenizer(model_folder))
    loads: list[Path | None] = []

    def counted(config: Config, adapter: Path | None, *more: Any) -> Predictor:
        loads.append(adapter)
        return load_predictor(config, adapter, *more)

    monkeypatch.setattr("yelp_hpc.stages.infer.load_predictor", counted)
    for shard in (1, 3, 4):
        infer.run(alone, config, "base", shard)
    infer.run(run, config, "base", (1, 3, 4))
    assert len(loads) == 3 + 1
    assert [path.name[6:10] for path in sorted(run.predictions("base").iterdir())] == [
        *("0001", "0003", "0004")
    ]
    for shard in (1, 3, 4):
        assert (
            run.shard("base", shard, 5).read_bytes() == alone.shard("base", shard, 5).read_bytes()
        )
    with pytest.raises(RequestError, match=r"no shard 5-6: this run has shards 0 to 4"):
        infer.run(run, config, "base", (0, 5, 6))
    assert len(loads) == 3 + 1


def test_a_signal_between_two_shards_is_heard_before_the_next(
    run: RunPaths, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(model_folder, shards=3)

    def struck(*arguments: Any) -> None:
        write_shard(*arguments)
        os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr("yelp_hpc.stages.infer.write_shard", struck)
    with pytest.raises(SavedForRequeue, match="shard 1 of 3: stopped by a signal before it began"):
        infer.run(run, config, "base")
    assert shards_missing(run, config, "base") == [1, 2]
    assert not list(run.partials("base").glob("*"))


def test_a_shard_of_another_make_is_missing_until_its_own_is_whole(
    run: RunPaths, model_folder: Path
) -> None:
    """It goes on standing there while the new one is made: a requeue must not take it for that."""
    infer.run(run, configured(model_folder), "base")
    config = configured(model_folder, mode="generate", max_tokens=64)
    assert shards_missing(run, config, "base") == [0]
    process = started(run, config)
    process.kill()
    process.communicate()
    assert run.shard("base", 0, 1).is_file()
    assert shards_missing(run, config, "base") == [0]
    infer.run(run, config, "base")
    assert shards_missing(run, config, "base") == []


def test_what_another_process_said_last_of_a_whole_shard_is_put_right(
    run: RunPaths, model_folder: Path
) -> None:
    config = configured(model_folder)
    infer.run(run, config, "base")
    said = json.loads(run.shard_progress("base", 0, 1).read_text())
    for record in ({**said, "state": "running", "identity": ""}, "torn", None):
        write_json(run.shard_progress("base", 0, 1), record)
        infer.run(run, config, "base")
        again = json.loads(run.shard_progress("base", 0, 1).read_text())
        assert (again["state"], again["identity"]) == ("complete", said["identity"])
        assert shards_missing(run, config, "base") == []


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from yelp_hpc.config import config_from_dict
from yelp_hpc.errors import SavedForRequeue
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.stages import infer
import json, time
from yelp_hpc.inference import predictor

real = predictor.label_scores
def slow(*args):  # long enough that a signal comes in the middle
    time.sleep(0.05)
    return real(*args)
predictor.label_scores = slow
config = config_from_dict(json.loads(sys.argv[2]))
try:
    infer.run(RunPaths(sys.argv[1]), config, "base", int(sys.argv[3]))
except SavedForRequeue as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def started(
    run: RunPaths, config: Config, shard: int = 0, shards: int = 1, parts: int = 2
) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, at work and with at least so many parts written."""
    command = [sys.executable, "-c", CHILD, str(run.root), config.model_dump_json(), str(shard)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    folder = run.partial("base", shard, shards)
    while len(list(folder.glob("part-*"))) < parts:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.02)
    return process


def test_a_killed_shard_goes_on_from_its_parts(
    run: RunPaths, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(model_folder, max_tokens=64)
    whole = RunPaths(tmp_path / "whole")
    save_test_set(whole, load_tokenizer(model_folder))
    infer.run(whole, config, "base")

    process = started(run, config)
    process.kill()
    process.communicate()
    folder = run.partial("base", 0, 1)
    assert not run.shard("base", 0, 1).exists()
    parts = [path for paths in parts_of(folder).values() for path in paths]
    parts[0].write_bytes(parts[0].read_bytes()[:-7])
    capsys.readouterr()
    infer.run(run, config, "base")
    said = "".join(capsys.readouterr())
    assert f"{parts[0].name} is made again: torn or altered" in said
    assert "goes on after" in said and not folder.exists()
    # The very file of an undisturbed run, scores to the last bit included.
    assert run.shard("base", 0, 1).read_bytes() == whole.shard("base", 0, 1).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_saves_and_asks_for_a_requeue(
    run: RunPaths, model_folder: Path, number: signal.Signals
) -> None:
    config = configured(model_folder, max_tokens=64)
    process = started(run, config)
    os.kill(process.pid, number)
    _, errors = process.communicate()
    assert process.returncode == 75, errors.decode()
    progress = json.loads(run.shard_progress("base", 0, 1).read_text())
    assert progress["state"] == "saved" and 0 < progress["done"] < ROWS
    kept = sum(
        pq.read_metadata(path).num_rows
        for paths in parts_of(run.partial("base", 0, 1)).values()
        for path in paths
    )
    assert kept == progress["done"]
    infer.run(run, config, "base")
    assert (
        predictions(run)["row"].to_pylist() == pq.read_table(run.split("test"))["row"].to_pylist()
    )


def test_parts_of_two_processes_at_once_do_not_double_rows(
    run: RunPaths, model_folder: Path
) -> None:
    """A requeued task may start before the old one has ended."""
    config = configured(model_folder, max_tokens=64)
    process = started(run, config)
    infer.run(run, config, "base")  # ends long before the slow one
    whole = run.shard("base", 0, 1).read_bytes()
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert run.shard("base", 0, 1).read_bytes() == whole
    assert (
        predictions(run)["row"].to_pylist() == pq.read_table(run.split("test"))["row"].to_pylist()
    )


def test_a_fault_of_the_nodes_hardware_is_recorded_and_asks_for_another_node(
    run: RunPaths, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(model_folder)

    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with …")

    monkeypatch.setattr("yelp_hpc.inference.predictor.label_scores", failing)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-7")
    with pytest.raises(NodeFault, match="node gpu-7: CUDA error: uncorrectable ECC"):
        infer.run(run, config)
    (fault,) = read_faults(run)
    assert fault["node"] == "gpu-7" and "ECC" in fault["what"]
    monkeypatch.undo()
    infer.run(run, config)  # elsewhere it is done
    assert len(read_faults(run)) == 1


def test_signal_handlers_are_put_back(run: RunPaths, model_folder: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    infer.run(run, configured(model_folder), "base")
    assert signal.getsignal(signal.SIGUSR2) == before
    with pytest.raises(SavedForRequeue), infer.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.is_set()
        raise SavedForRequeue("saved")
    assert signal.getsignal(signal.SIGUSR2) == before


TWICE = """
import os, signal, sys
from yelp_hpc.stages.infer import stop_signals

def second(frame, event, arg):
    if event == "line" and frame.f_code.co_name == "set":
        os.kill(os.getpid(), signal.SIGUSR2)
    return second

with stop_signals() as stop:
    sys.settrace(second)
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.is_set())
"""


def test_a_second_signal_inside_the_handler_of_the_first_hangs_nothing() -> None:
    argv = [sys.executable, "-c", TWICE]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    "windows", [[(0, 120)], [(5, 6)], [(0, 30), (30, 74), (74, 120)], [(40, 41), (110, 120)]]
)
def test_windows_are_read_whatever_the_row_groups(
    run: RunPaths, windows: list[tuple[int, int]]
) -> None:
    test = pq.read_table(run.split("test"), columns=["row", "label", "input_ids"])
    tables = list(read_windows(run.split("test"), [range(*window) for window in windows]))
    assert len(tables) == len(windows)
    for (start, stop), table in zip(windows, tables, strict=True):
        assert table.to_pydict() == test.slice(start, stop - start).to_pydict()
