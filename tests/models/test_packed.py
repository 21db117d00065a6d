"""Packed arithmetic equals the plain model, in logits and in LoRA gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from yelp_hpc.data.packing import plan_microbatches
from yelp_hpc.models.packed.attention import Layout, attend
from yelp_hpc.models.packed.batch import forward_selected, pack, prepare_model
from yelp_hpc.models.packed.dropout import use_sequence_dropout
from yelp_hpc.models.packed.masks import keep_mask, token_keys
from yelp_hpc.models.packed.varlen import attend_varlen, varlen_kernel

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "glm": GlmConfig(**SIZES),
    "glm4": Glm4Config(**SIZES),
}
LENGTHS = (5, 19, 1, 8, 8, 14)


def tiny(
    name: str,
    *,
    lora: bool = True,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
) -> Any:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    for parameter in model.parameters():  # norm weights of one and zero biases would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    if lora:
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def sequences(prefix_length: int, lengths: Sequence[int] = LENGTHS) -> Any:
    generator = torch.Generator().manual_seed(5)

    def tokens(n: int) -> Any:
        return torch.randint(2, VOCAB, (n,), generator=generator).tolist()

    prefix = tokens(prefix_length)
    return [prefix + tokens(n) for n in lengths]


def plain_logits(model: Any, rows: Sequence[Sequence[int]], last: int) -> Any:
    """The reference: the untouched model, one sequence at a time."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0, -last:] for row in rows])


def gradients(model: Any) -> Any:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got: Any, wanted: Any) -> None:
    assert wanted.keys() == got.keys() and wanted
    for key in wanted:
        assert (got[key] - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    targets = torch.arange(logits.shape[0]) % VOCAB
    return torch.nn.functional.cross_entropy(logits, targets)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prefix_length", [0, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_lora_gradients_equal_the_plain_model(
    name: str, prefix_length: int, fused: bool
) -> None:
    rows = sequences(prefix_length)
    plain = tiny(name)
    fast = prepare_model(copy.deepcopy(plain), fused=fused)

    expected = plain_logits(plain, rows, last=1)
    logits = forward_selected(fast, pack(rows, prefix_length))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    loss_of(expected).backward()
    loss_of(logits).backward()
    wanted, got = gradients(plain), gradients(fast)
    assert wanted.keys() == got.keys() and wanted
    for key in wanted:
        error = (got[key] - wanted[key]).norm() / wanted[key].norm()
        assert error < 1e-5, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_lora_on_every_linear_layer(name: str, fused: bool) -> None:
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    targets += ["gate_up_proj"] if name == "glm4" else ["gate_proj", "up_proj"]
    rows = sequences(4)
    plain = tiny(name, targets=targets)
    fast = prepare_model(copy.deepcopy(plain), fused=fused)
    loss_of(plain_logits(plain, rows, last=1)).backward()
    loss_of(forward_selected(fast, pack(rows, 4))).backward()
    assert_equal_gradients(gradients(fast), gradients(plain))


@pytest.mark.parametrize("fused", [False, True])
def test_vocabulary_rows_and_last_two_positions(fused: bool) -> None:
    rows = sequences(3, lengths=(5, 2, 9))
    plain = tiny("llama")
    fast = prepare_model(copy.deepcopy(plain), fused=fused)
    vocabulary = torch.tensor([4, 90, 7])
    with torch.no_grad():
        expected = plain_logits(plain, rows, last=2)[:, vocabulary]
        logits = forward_selected(fast, pack(rows, 3, last=2), vocabulary)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_sequence_does_not_see_its_neighbours(fused: bool) -> None:
    rows = sequences(6)
    model = prepare_model(tiny("llama"), fused=fused)
    other = [list(row) for row in rows]
    other[1][6:] = [(token + 1) % VOCAB for token in other[1][6:]]
    with torch.no_grad():
        before = forward_selected(model, pack(rows, 6))
        after = forward_selected(model, pack(other, 6))
    assert not torch.allclose(before[1], after[1])
    kept = [i for i in range(len(rows)) if i != 1]
    torch.testing.assert_close(before[kept], after[kept], atol=1e-6, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_predictions_do_not_depend_on_the_batching(fused: bool) -> None:
    rows = sequences(6, lengths=(3, 11, 30, 7, 7, 2, 25, 14))
    model = prepare_model(tiny("llama"), fused=fused).eval()
    answers = []
    for max_tokens in (1, 40, 1000):
        scores = torch.empty(len(rows), VOCAB)
        for group in plan_microbatches([len(row) - 6 for row in rows], max_tokens, 6):
            with torch.no_grad():
                scores[group] = forward_selected(model, pack([rows[i] for i in group], 6))
        answers.append(scores)
    for scores in answers[1:]:
        torch.testing.assert_close(scores, answers[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(scores.argmax(1), answers[0].argmax(1))


class MadeOf(TorchDispatchMode):
    """Notes the height of each matrix of one width that a model makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.heights = width, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if "linear" in str(func) and made.shape[-1] == self.width:
            self.heights.append(len(made))
        return made


def test_a_long_batch_is_scored_with_few_tokens_of_an_mlp_at_once() -> None:
    rows = sequences(6, lengths=[53 + i % 7 for i in range(80)])
    batch, layers = pack(rows, 6), SIZES["num_hidden_layers"]
    model = prepare_model(tiny("llama")).eval()
    with torch.inference_mode(), MadeOf(2 * SIZES["intermediate_size"]) as made:
        logits = forward_selected(model, batch)
    tokens = batch.layout.total
    assert tokens > 4096 and max(made.heights) <= 2048
    # of the last layer the selected positions alone
    assert sum(made.heights) == (layers - 1) * tokens + len(rows)
    with MadeOf(2 * SIZES["intermediate_size"]) as made:
        whole = forward_selected(model, batch)
    assert max(made.heights) == tokens  # a training step is not cut
    torch.testing.assert_close(logits, whole, atol=1e-6, rtol=0)
    with torch.no_grad():
        some = plain_logits(tiny("llama").eval(), rows[::20], last=1)
    torch.testing.assert_close(logits[::20], some, atol=1e-5, rtol=1e-5)


def test_dropout_of_a_long_batch_is_that_of_a_step_whether_it_is_trained_on_or_not() -> None:
    rows = sequences(6, lengths=[53] * 80)
    targets = ("gate_proj", "up_proj", "down_proj")
    model = prepare_model(tiny("llama", dropout=0.3, targets=targets)).train()
    torch.manual_seed(3)
    trained = forward_selected(model, pack(rows, 6))
    torch.manual_seed(3)
    with torch.no_grad():
        asked = forward_selected(model, pack(rows, 6))
    assert torch.equal(asked, trained)


@pytest.mark.parametrize("fused", [False, True])
def test_dropout_follows_torch_seed(fused: bool) -> None:
    rows = sequences(4)
    model = prepare_model(tiny("llama", dropout=0.3), fused=fused).train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        logits = forward_selected(model, pack(rows, 4))
        loss_of(logits).backward()
        results.append((logits.detach(), gradients(model)))
    (first, grads), (again, grads_again), (another, _) = results
    assert torch.equal(first, again)
    assert all(torch.equal(grads[key], grads_again[key]) for key in grads)
    assert not torch.allclose(first, another)


def test_ordinary_calls_still_work_after_prepare() -> None:
    rows = sequences(0, lengths=(6, 9))
    plain = tiny("llama").eval()
    fast = prepare_model(copy.deepcopy(plain)).eval()
    padded = torch.tensor([[0] * 3 + rows[0], rows[1]])
    mask = (padded != 0).long()
    with torch.no_grad():
        expected = plain(input_ids=padded, attention_mask=mask).logits
        logits = fast(input_ids=padded, attention_mask=mask).logits
        generated = [
            m.generate(input_ids=padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
            for m in (plain, fast)
        ]
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    assert torch.equal(*generated)


def varlen_reference(
    query: Any,
    key: Any,
    value: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: Any,
    max_k: Any,
    *,
    scale: Any,
    window_size: Any,
    enable_gqa: Any,
) -> Any:
    """What `torch.nn.attention.varlen.varlen_attn` computes, which runs on CUDA only."""
    assert window_size == (-1, 0)
    assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outputs = []
    for i in range(len(cu_q) - 1):
        q, k, v = (
            query[cu_q[i] : cu_q[i + 1]],
            key[cu_k[i] : cu_k[i + 1]],
            value[cu_k[i] : cu_k[i + 1]],
        )
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("prefix_length", [0, 1, 7])
def test_padded_rows_and_variable_length_arguments_agree(prefix_length: int) -> None:
    layout = Layout(prefix_length, LENGTHS, torch.device("cpu"))
    torch.manual_seed(3)
    states = [
        torch.randn(layout.total, heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, 2, 2)
    ]
    query, key, value = states
    expected = attend_varlen(varlen_reference, query, key, value, layout.varlen, scale=0.3)
    found = attend(query, key, value, layout, scale=0.3)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * slope).sum(), states)
    torch.testing.assert_close(torch.autograd.grad((found * slope).sum(), states), wanted)


def test_a_variable_length_kernel_that_does_not_run_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a CPU torch has the function and no kernel behind it."""
    varlen_kernel.cache_clear()
    found = [varlen_kernel(torch.device("cpu"), 8, torch.float16) for _ in range(2)]
    assert found == [None, None]
    assert capsys.readouterr().err.count("variable-length kernel does not run: ") == 1


def test_pack_lays_out_prefix_then_remainders() -> None:
    batch = pack([[9, 8, 1, 2], [9, 8, 3, 4, 5]], prefix_length=2, last=2)
    assert batch.input_ids.tolist() == [9, 8, 1, 2, 3, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.lengths == (2, 3)
    assert batch.select.tolist() == [2, 3, 5, 6]


@pytest.mark.parametrize(
    ("rows", "prefix_length", "last", "message"),
    [
        ([], 0, 1, "no sequences"),
        ([[1, 2], [1, 2, 3]], 2, 1, "sequence 0 has 2 tokens"),
        ([[1, 2, 3], [1, 4, 3]], 2, 1, "sequence 1 does not share"),
        ([[1, 2, 3]], 0, 0, "at least 1"),
    ],
)
def test_pack_refuses_what_it_cannot_represent(
    rows: Sequence[Sequence[int]], prefix_length: int, last: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(rows, prefix_length, last)


def test_plan_keeps_the_budget_and_every_sequence() -> None:
    lengths = [30, 5, 200, 40, 40, 7, 90]
    plan = plan_microbatches(lengths, max_tokens=110, prefix_length=10)
    assert sorted(i for group in plan for i in group) == list(range(len(lengths)))
    assert all(10 + sum(lengths[i] for i in g) <= 110 or g == [2] for g in plan)
    assert plan[0] == [2]
    assert plan == plan_microbatches(lengths, max_tokens=110, prefix_length=10)


class FixedMask(torch.nn.Module):
    """Dropout that drops the same features of every token, so that packing cannot matter."""

    p = 0.5

    def __init__(self, features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.row = 1.0 * (torch.rand(features, generator=generator) < 0.5)

    def kept(self, states: torch.Tensor) -> torch.Tensor:
        return self.row.expand(states.shape).contiguous()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * self.row / (1 - self.p)


def test_gradients_through_dropout_equal_the_plain_model() -> None:
    rows = sequences(4)
    plain = tiny("llama")
    for seed, module in enumerate(plain.modules()):
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = FixedMask(SIZES["hidden_size"], seed)
    fast = prepare_model(copy.deepcopy(plain))
    loss_of(plain_logits(plain, rows, last=1)).backward()
    loss_of(forward_selected(fast, pack(rows, 4))).backward()
    assert_equal_gradients(gradients(fast), gradients(plain))


def test_layers_that_read_the_same_input_share_a_dropout_mask() -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = tiny("llama", dropout=0.3, targets=targets).train()
    context = use_sequence_dropout(model, seed=1)
    batch = pack(sequences(4), 4)
    masks = {}
    with context.batch(0, range(len(LENGTHS)), batch):
        for name, module in model.named_modules():
            if hasattr(module, "lora_dropout"):
                states = torch.ones(len(batch.input_ids), SIZES["hidden_size"])
                layer, last = name.split("layers.")[1].split(".")[::2]
                masks[int(layer), last] = module.lora_dropout["default"].kept(states)
    assert len(masks) == len(targets) * SIZES["num_hidden_layers"]
    shared = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
    for (layer, one), mask in masks.items():
        for (other_layer, other), other_mask in masks.items():
            together = one == other or any({one, other} <= names for names in shared)
            expected = layer == other_layer and together
            assert torch.equal(mask, other_mask) == expected, (layer, one, other_layer, other)


def test_gradients_through_a_shared_mask_do_not_depend_on_fusing() -> None:
    batch = pack(sequences(4), 4)
    results = []
    for fused in (False, True):
        model = tiny("llama", dropout=0.3).train()
        context = use_sequence_dropout(model, seed=1)
        prepare_model(model, fused=fused)
        with context.batch(0, range(len(LENGTHS)), batch):
            loss_of(forward_selected(model, batch)).backward()
        results.append(gradients(model))
    plain, fast = results
    assert_equal_gradients(fast, plain)


def test_keep_mask_keeps_the_share_it_should_and_is_reproducible() -> None:
    keys = token_keys(torch.tensor(3), torch.arange(500))
    mask = keep_mask(keys, 7, 401, 0.08, torch.float32)
    assert mask.shape == (500, 401)
    assert torch.equal(mask.unique(), torch.tensor([0.0, 1.0]))
    assert abs(float((mask == 0).float().mean()) - 0.08) < 0.003
    assert torch.equal(mask, keep_mask(keys, 7, 401, 0.08, torch.float32))
    assert not torch.equal(mask, keep_mask(keys, 8, 401, 0.08, torch.float32))
    assert torch.equal(mask[100:200].half(), keep_mask(keys[100:200], 7, 401, 0.08, torch.half))


def test_masks_are_splitmix64_bit_for_bit() -> None:
    """Against whole numbers of Python's: what any device must give."""

    def mix(number: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            number = (number ^ number >> shift) * factor % 2**64
        return number

    gamma, seed, layer, features = 0x9E3779B97F4A7C15, 2**62 + 12345, 2**63 - 9, 10
    # the first output of the published generator for the seed 0
    assert mix(gamma) == 0xE220A8397B1DCDAF
    mask = keep_mask(
        token_keys(torch.tensor(seed), torch.arange(6)), layer, features, 0.3, torch.int
    )
    threshold = round(0.3 * 2**16)
    for position in range(6):
        key = mix((seed + (position + 1) * gamma) % 2**64)
        for column in range(features):
            bits = mix((key + layer + (column // 4 + 1) * gamma) % 2**64)
            draw = (bits >> 16 * (column % 4)) % 2**16
            signed = draw - 2**16 if draw >= 2**15 else draw
            assert mask[position, column] == (signed >= threshold - 2**15)


def test_masks_of_rows_layers_and_columns_are_independent() -> None:
    """Correlations of neighbours in each direction are those of chance: four standard errors."""
    rows, columns = 400, 512
    one, other = (token_keys(torch.tensor(seed), torch.arange(rows)) for seed in (5, 6))
    mask = keep_mask(one, 11, columns, 0.5, torch.float64) - 0.5
    others = {
        "row": keep_mask(other, 11, columns, 0.5, torch.float64) - 0.5,
        "layer": keep_mask(one, 12, columns, 0.5, torch.float64) - 0.5,
        "position": mask.roll(1, 0),
        "column": mask.roll(1, 1),
        "fourth column": mask.roll(4, 1),
    }
    for name, shifted in others.items():
        correlation = float((mask * shifted).mean()) * 4
        assert abs(correlation) < 4 / (rows * columns) ** 0.5, name


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_merging_and_switching_off_an_adapter_is_seen(name: str) -> None:
    rows = sequences(4)
    model = prepare_model(tiny(name)).eval()
    batch = pack(rows, 4)
    with torch.no_grad():
        adapted = forward_selected(model, batch)
        model.merge_adapter()
        merged = forward_selected(model, batch)
        model.unmerge_adapter()
        with model.disable_adapter():
            base = forward_selected(model, batch)
        again = forward_selected(model, batch)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, adapted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base, adapted, atol=1e-3)


def test_a_prepared_adapter_is_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    rows = sequences(4)
    model = prepare_model(tiny("llama")).eval()
    with torch.no_grad():
        expected = forward_selected(model, pack(rows, 4))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama", lora=False), tmp_path).eval()
    with torch.no_grad():
        logits = plain_logits(loaded, rows, last=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(ValueError, match="prepare_model"):
        forward_selected(tiny("llama"), pack(sequences(4), 4))
