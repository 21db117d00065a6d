"""The ChatGLM3 tokenizer against the published code's ids and decodes, and its round trip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from yelp_hpc.errors import RequestError
from yelp_hpc.models.chatglm3.tokenizer import ChatGLMTokenizer
from yelp_hpc.models.load import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "tokenizer" / "strings.json").read_text())
STRINGS, IDS, META = EXPECTED["strings"], EXPECTED["ids"], EXPECTED["meta"]


def published_folder(folder: Path, vocabulary: int = 6144) -> Path:
    """A folder laid out as the published one, remote code named and all."""
    config = json.loads((GOLDEN / "model" / "config.json").read_text())
    config["padded_vocab_size"] = vocabulary
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(GOLDEN / "tokenizer" / "tokenizer.model", folder / "tokenizer.model")
    code = ["tokenization_chatglm.ChatGLMTokenizer", None]
    published = {
        "name_or_path": "THUDM/chatglm3-6b-base",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": code},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(published))
    return folder


@pytest.fixture(params=["load_tokenizer", "AutoTokenizer", "saved and loaded"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> ChatGLMTokenizer:
    folder = published_folder(tmp_path)
    if request.param == "load_tokenizer":
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if request.param == "saved and loaded":
        tokenizer.save_pretrained(folder / "again")
        shutil.copyfile(folder / "config.json", folder / "again" / "config.json")
        tokenizer = AutoTokenizer.from_pretrained(folder / "again")
    assert isinstance(tokenizer, ChatGLMTokenizer)
    return tokenizer


def test_ids_and_decodes_are_the_published_ones(tokenizer: ChatGLMTokenizer) -> None:
    prefix = META["prefix"]
    for text, ids, decoded in zip(STRINGS, IDS, EXPECTED["decode"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer(text)["input_ids"] == prefix + ids
        assert tokenizer.decode(ids) == decoded
        assert tokenizer.decode(ids, skip_special_tokens=True) == decoded
    assert tokenizer(STRINGS)["input_ids"] == [prefix + ids for ids in IDS]


def test_special_tokens_are_the_published_ones(tokenizer: ChatGLMTokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(list(META["specials"])) == list(
        META["specials"].values()
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (META["eos"], META["pad"])
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id) == (None, None)
    assert tokenizer.all_special_ids == META["all_special_ids"]
    assert (tokenizer.vocab_size, len(tokenizer)) == (META["vocab_size"], META["len"])
    assert tokenizer("a", "b")["input_ids"] == META["pair_a_b"]


def test_special_strings_in_a_text_are_text(tokenizer: ChatGLMTokenizer) -> None:
    for special in META["specials"]:
        assert META["specials"][special] not in tokenizer(f"x {special} y")["input_ids"][2:]


def test_batches_are_padded_on_the_left_with_positions_of_real_tokens(
    tokenizer: ChatGLMTokenizer,
) -> None:
    batch = tokenizer(EXPECTED["batch"]["texts"], padding=True)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert batch[name] == EXPECTED["batch"][name]
    right = tokenizer(EXPECTED["batch"]["texts"], padding=True, padding_side="right")
    assert right["attention_mask"][0] == batch["attention_mask"][0][::-1]


def test_truncation_keeps_the_prefix(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer("a long review", truncation=True, max_length=4)["input_ids"]
    assert len(ids) == 4 and ids[:2] == META["prefix"]


def test_setting_a_special_token_moves_no_id(tokenizer: ChatGLMTokenizer) -> None:
    tokenizer.pad_token = "<pad>"  # type: ignore[misc]
    tokenizer.eos_token = "[gMASK]"  # type: ignore[misc]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (META["pad"], META["eos"])


def test_chat_input_is_made_of_role_tokens(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.build_chat_input("hi", [{"role": "system", "content": "be brief"}])
    first, last = ids["input_ids"][0, :3].tolist(), ids["input_ids"][0, -1].item()
    assert first == [*META["prefix"], META["specials"]["<|system|>"]]
    assert last == META["specials"]["<|assistant|>"]


def test_a_piece_spelled_like_a_special_token_is_that_token(tmp_path: Path) -> None:
    """The published code looks pieces up by name, special tokens first."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("sopor eopen xsop aeop sopranos\n" * 200)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        user_defined_symbols=["sop"],
        minloglevel=2,
    )
    tokenizer = ChatGLMTokenizer(str(tmp_path / "tokenizer.model"))
    own = tokenizer.sp_model.PieceToId("sop")
    ids = tokenizer.encode("xsop", add_special_tokens=False)
    assert own in tokenizer.sp_model.encode("xsop")
    assert own not in ids and tokenizer.special_ids["sop"] in ids


def test_missing_torn_and_foreign_tokenizers_are_named(tmp_path: Path) -> None:
    folder = published_folder(tmp_path, vocabulary=6000)
    with pytest.raises(RequestError, match=r"6009 tokens.*6000"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"torn")
    with pytest.raises(RequestError, match="cannot be loaded"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(RequestError, match=r"tokenizer\.model is missing"):
        load_tokenizer(folder)
