"""The native ChatGLM3 against the published code's logits; its cache, masks, packing and faults."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from yelp_hpc.errors import RequestError
from yelp_hpc.models.load import load_model, load_tokenizer, lora_targets

GOLDEN = Path(__file__).parent / "golden"
CASES = dict(np.load(GOLDEN / "cases.npz"))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INPUTS = ("input_ids", "attention_mask", "position_ids")


def inputs_of(case: str, names: tuple[str, ...] = INPUTS) -> dict[str, Tensor]:
    keys = {name: f"{case}.{name}" for name in names}
    return {name: torch.from_numpy(CASES[key]) for name, key in keys.items() if key in CASES}


def logits_of(case: str, precision: str) -> Tensor:
    values = CASES[f"{case}.logits_{precision}"]
    if precision == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(GOLDEN / "model", "fp32")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", ["single_L17", "right_pad", "left_pad_tokpos"])
def test_logits_are_the_published_ones_to_the_last_bit(
    case: str, precision: Any, use_cache: bool
) -> None:
    inputs = inputs_of(case)
    with torch.no_grad():
        logits = load_model(GOLDEN / "model", precision)(**inputs, use_cache=use_cache).logits
    assert logits.dtype == DTYPES[precision]
    difference = (logits.float() - logits_of(case, precision)).abs()
    # Rows of padding too: the published mask lets them see everything. A processor without the
    # instructions for bf16 adds its products in another order: two units in the last place of 4.
    other = precision == "bf16" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text()
    assert difference.max() <= (2**-4 if other else 0.0)


def test_eager_logits_agree_to_1e_5() -> None:
    model = load_model(GOLDEN / "model", "fp32", attn_implementation="eager")
    for case in ("single_L17", "right_pad", "left_pad_tokpos"):
        with torch.no_grad():
            logits = model(**inputs_of(case)).logits
        assert (logits - logits_of(case, "fp32")).abs().max() < 1e-5


def test_loss_is_the_published_one(model: Any) -> None:
    inputs = inputs_of("right_pad", (*INPUTS, "labels"))
    with torch.no_grad():
        assert model(**inputs).loss.item() == CASES["right_pad.loss"].item()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("names", [INPUTS, ("input_ids", "attention_mask")])
def test_greedy_tokens_are_the_published_ones(model: Any, use_cache: bool, names: Any) -> None:
    inputs = inputs_of("left_pad_tokpos", names)
    tokens = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=use_cache
    )
    assert tokens.tolist() == CASES["gen.left_pad_tokpos"].tolist()


def test_greedy_tokens_do_not_depend_on_padding(model: Any) -> None:
    inputs, width = inputs_of("left_pad_tokpos"), CASES["left_pad_tokpos.input_ids"].shape[1]
    for i, mask in enumerate(inputs["attention_mask"]):
        alone = inputs["input_ids"][i : i + 1, mask.bool()]
        tokens = model.generate(alone, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected = CASES["gen.left_pad_tokpos"][i, width:].tolist()
        assert tokens[0, alone.shape[1] :].tolist() == expected


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("split", [1, 6, 16])
def test_continuing_from_a_cache_gives_the_logits_of_one_pass(
    implementation: str, split: int
) -> None:
    model = load_model(GOLDEN / "model", "fp32", attn_implementation=implementation)
    ids = inputs_of("single_L17")["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        first = model(ids[:, :split], attention_mask=mask[:, :split], use_cache=True)
        rest = model(ids[:, split:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits[0], whole[0, split:], atol=1e-5, rtol=0)
    real = max(3 - split, 0)  # what row 1 still has of padding
    torch.testing.assert_close(rest.logits[1, real:], whole[1, split:][real:], atol=1e-5, rtol=0)


def test_packed_sequences_that_restart_their_positions_do_not_see_each_other(
    model: Any,
) -> None:
    ids = inputs_of("single_L17")["input_ids"]
    positions = torch.cat([torch.arange(10), torch.arange(7)]).unsqueeze(0)
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        alone = torch.cat([model(ids[:, :10]).logits, model(ids[:, 10:]).logits], dim=1)
        shifted = model(ids, position_ids=torch.arange(17).unsqueeze(0) + 40).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    assert (shifted - logits_of("single_L17", "fp32")).abs().max() < 1e-3  # one sequence still


def test_any_registered_attention_function_gets_heads_groups_and_arguments(
    model: Any,
) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen = []

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        seen.append((tuple(query.shape), tuple(key.shape), kwargs["marker"], module.is_causal))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("chatglm3_test", attend)
    AttentionMaskInterface.register("chatglm3_test", sdpa_mask)
    other = load_model(GOLDEN / "model", "fp32", attn_implementation="chatglm3_test")
    inputs = inputs_of("left_pad_tokpos")
    with torch.no_grad():
        logits = other(**inputs, marker="kept").logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        logits[real], logits_of("left_pad_tokpos", "fp32")[real], atol=1e-5, rtol=0
    )
    assert seen == [((3, 4, 20, 32), (3, 2, 20, 32), "kept", True)] * 3


def test_logits_to_keep_projects_the_chosen_positions(
    model: Any,
) -> None:
    inputs = inputs_of("left_pad_tokpos")
    with torch.no_grad():
        whole = model(**inputs).logits
        kept = {
            "last 4": (4, whole[:, -4:]),
            "positions": (torch.tensor([2, 19]), whole[:, [2, 19]]),
            "per row": (torch.tensor([[1], [2], [3]]), whole[[0, 1, 2], [1, 2, 3]].unsqueeze(1)),
            "mask": (inputs["attention_mask"].bool(), whole[inputs["attention_mask"].bool()]),
        }
        for keep, expected in kept.values():
            logits = model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_model(GOLDEN / "model", "fp32").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs_of("right_pad", (*INPUTS, "labels"))).loss.backward()
        gradients.append(model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight.grad)
    assert torch.equal(*gradients)


def test_training_after_inference_mode_works(model: Any) -> None:
    with torch.inference_mode():
        model(**inputs_of("single_L17"))
    ids = inputs_of("single_L17")["input_ids"]
    model(ids, labels=ids).loss.backward()
    model.zero_grad()


def test_more_tokens_than_positions_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="seq_length"):
        model(torch.zeros(1, 513, dtype=torch.long))


def test_saved_copy_keeps_names_and_needs_no_remote_code(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    names = set(load_file(GOLDEN / "model" / "model.safetensors"))
    assert set(load_file(tmp_path / "model.safetensors")) == names
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    with torch.no_grad():
        logits = load_model(tmp_path, "fp32")(**inputs_of("single_L17")).logits
    assert torch.equal(logits, logits_of("single_L17", "fp32"))


def sharded_bin(folder: Path) -> Path:
    """The tiny model as it is published: several .bin files and an index."""
    shutil.copyfile(GOLDEN / "model" / "config.json", folder / "config.json")
    weights = load_file(GOLDEN / "model" / "model.safetensors")
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(3):
        file = f"pytorch_model-{shard + 1:05}-of-00003.bin"
        torch.save({name: weights[name] for name in names[shard::3]}, folder / file)
        index |= dict.fromkeys(names[shard::3], file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    shutil.copytree(GOLDEN / "model", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sharded_bin_weights_load_unchanged(tmp_path: Path) -> None:
    with torch.no_grad():
        logits = load_model(sharded_bin(tmp_path), "bf16")(**inputs_of("single_L17")).logits
    assert torch.equal(logits.float(), logits_of("single_L17", "bf16"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "inside", "bit", "pickle"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    shard = sharded_bin(tmp_path) / "pytorch_model-00002-of-00003.bin"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        shard.write_bytes(b"<html>not found</html>" * 100)
    elif damage == "inside":
        middle = content.index(b"data.pkl") + 8
        shard.write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
    elif damage == "bit":
        middle = len(content) // 2  # inside a tensor
        shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        torch.save({"run": print}, shard)  # more than tensors: weights_only refuses it
    with pytest.raises(RequestError, match=r"pytorch_model-00002-of-00003\.bin") as error:
        load_model(tmp_path, "fp32")
    assert "00001" not in str(error.value)


def test_truncated_safetensors_are_named(tmp_path: Path) -> None:
    file = edited(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"model\.safetensors: \d+ bytes instead of"):
        load_model(tmp_path, "fp32")


def test_weights_overwritten_by_random_bytes_are_named(tmp_path: Path) -> None:
    file = edited(tmp_path) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-20_000:-10_000] = np.random.default_rng(0).bytes(10_000)
    file.write_bytes(content)
    with pytest.raises(RequestError, match=r"NaN or infinity.*\n.*transformer\."):
        load_model(tmp_path, "fp32")


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    file = edited(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.dense_4h_to_h\.weight is missing"):
        load_model(tmp_path, "fp32")


def test_a_wrong_vocabulary_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"wrong vocabulary size.*padded_vocab_size"):
        load_model(edited(tmp_path, padded_vocab_size=352), "fp32")


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"_name_or_path": "THUDM/chatglm2-6b"}, "ChatGLM2"),
        ({"_name_or_path": "x", "transformers_version": "4.27.1"}, "ChatGLM2"),
        ({"_name_or_path": "THUDM/glm-4-9b"}, "GLM-4"),
        ({"_name_or_path": "x", "eos_token_id": [151329, 151336, 151338]}, "GLM-4"),
        ({"_name_or_path": "x", "position_encoding_2d": True}, "ChatGLM"),
    ],
)
def test_other_generations_of_the_same_model_type_are_refused(
    tmp_path: Path, changes: Any, family: str
) -> None:
    folder = edited(tmp_path, **changes)
    for load in (partial(load_model, dtype="fp32"), load_tokenizer):
        with pytest.raises(RequestError, match=family) as error:
            load(folder)
        assert "\n" not in str(error.value)


def test_a_model_that_needs_its_own_code_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = edited(tmp_path, model_type="baichuan")
    with pytest.raises(RequestError, match="trust_remote_code is off") as error:
        load_model(folder, "fp32")
    assert "\n" not in str(error.value)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="quantized"):
        load_model(edited(tmp_path, quantization_bit=4), "fp32")


def test_lora_targets_by_architecture_and_by_name(model: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    assert lora_targets(model, None) == ["query_key_value"]
    assert lora_targets(LlamaForCausalLM(tiny), None) == ["q_proj", "k_proj", "v_proj"]
    assert lora_targets(model, ["dense"]) == ["dense"]
    with pytest.raises(RequestError, match=r"q_proj matches no.*query_key_value"):
        lora_targets(model, ["q_proj", "dense"])
