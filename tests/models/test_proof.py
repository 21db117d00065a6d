"""The proof at the door: what cannot be packed is seen, computed another way, and still right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MiniMaxM3VLTextConfig,
    Phi3Config,
    Phi4MultimodalConfig,
    Qwen3NextConfig,
)

from yelp_hpc.data.answer_tree import answer_tree
from yelp_hpc.errors import RequestError
from yelp_hpc.inference.generation import GreedyDecoder
from yelp_hpc.models.load import attention_of
from yelp_hpc.models.packed.batch import forward_selected, pack, prepare_model, way_of
from yelp_hpc.models.packed.dropout import use_sequence_dropout
from yelp_hpc.models.packed.proof import choose, limits_passed, positions_of, prove
from yelp_hpc.models.packed.unpacked import generate_rows

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWED = {
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    ),
    "gemma2": Gemma2Config(**SIZES, sliding_window=9),  # caps its scores, too
    "gpt_oss": GptOssConfig(**SIZES, **MOE, sliding_window=9),  # has sinks, too
    "llama4": Llama4TextConfig(
        **SIZES,
        **MOE,
        intermediate_size_mlp=64,
        attention_chunk_size=9,
        attn_temperature_tuning=False,
    ),
}
RECURRENT = {
    "qwen3_next": Qwen3NextConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mamba2": Mamba2Config(
        vocab_size=97,
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        num_hidden_layers=2,
        chunk_size=8,
    ),
}
TARGETS = {"mamba2": ["in_proj"]}
LENGTHS = (5, 23, 1, 30, 8)


def tiny(config: Any, targets: list[str] | None = None, dropout: float = 0.0) -> Any:
    torch.manual_seed(11)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    targets = targets or ["q_proj", "k_proj", "v_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    adapted: Any = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted.eval()


def sequences(prefix: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)

    def tokens(n: int) -> list[int]:
        return torch.randint(2, 97, (n,), generator=draw).tolist()

    head = tokens(prefix)
    return [head + tokens(n) for n in LENGTHS]


def plain_logits(model: Any, rows: list[list[int]], last: int = 1) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0, -last:] for row in rows])


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal_to_alone(model: Any, prefix: int) -> None:
    """Logits to 1e-5 and gradients to 1e-4 of the same model's one row a call."""
    rows = sequences(prefix)
    way = way_of(model)
    prepare_model(model, way="alone")
    expected = plain_logits(model, rows)
    expected.logsumexp(1).sum().backward()
    wanted = gradients(model)
    prepare_model(model, way=way)
    logits = forward_selected(model, pack(rows, prefix))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.logsumexp(1).sum().backward()
    got = gradients(model)
    assert got.keys() == wanted.keys() and wanted
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("prefix", [0, 4, 12])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_chunks_caps_and_sinks_are_packed(name: str, prefix: int) -> None:
    model = tiny(WINDOWED[name])
    assert prove(model, gradients=True).way == "packed"
    assert_equal_to_alone(model, prefix)


def test_a_window_of_128_and_a_review_of_197_tokens_are_those_of_plain_transformers() -> None:
    """Against a model that nothing of ours has touched, with transformers' own eager attention."""
    layers = ["sliding_attention", "full_attention"]

    def windowed(window: int) -> Any:
        return tiny(Gemma3TextConfig(**SIZES, sliding_window=window, layer_types=layers))

    draw = torch.Generator().manual_seed(5)
    whole = torch.randint(2, 97, (197,), generator=draw).tolist()
    own = [torch.randint(2, 97, (n,), generator=draw).tolist() for n in (1, 115, 116, 117)]
    rows = [whole, *(whole[:12] + one for one in own)]  # 128 tokens and one more and one less
    plain, model = windowed(128), windowed(128)
    plain.set_attn_implementation("eager")
    expected = plain_logits(plain, rows)
    expected.logsumexp(1).sum().backward()
    wanted = gradients(plain)
    assert prove(model, gradients=True).way == "packed"
    logits = forward_selected(model, pack(rows, 12))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.logsumexp(1).sum().backward()
    got = gradients(model)
    assert got.keys() == wanted.keys() and wanted
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
    with torch.no_grad():  # the window is what makes it so
        open_ended = plain_logits(windowed(512), rows)
    assert ((open_ended - expected).abs().amax(1) > 1e-3).tolist() == [True, *[False] * 3, True]


@pytest.mark.parametrize("way", ["rows", "alone"])
@pytest.mark.parametrize("name", RECURRENT)
def test_what_mixes_tokens_outside_of_attention_is_computed_as_rows(name: str, way: Any) -> None:
    model = tiny(RECURRENT[name], TARGETS.get(name))
    assert prove(model, gradients=True).way == "rows"
    prepare_model(model, way=way)
    assert_equal_to_alone(model, 4)


@pytest.mark.parametrize("name", RECURRENT)
def test_packed_they_would_leak_and_the_proof_sees_it(name: str) -> None:
    with pytest.raises(RequestError, match=r"does not answer in a batch as it does alone \(packed"):
        prove(tiny(RECURRENT[name], TARGETS.get(name)), ["packed"])


def test_a_model_that_reads_ahead_is_no_decoder() -> None:
    config = BertConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(RequestError, match="is no decoder"):
        prove(model)


@pytest.mark.parametrize("way", ["packed", "rows", "alone"])
def test_a_tree_of_labels_is_scored_alike_in_every_way(way: Any) -> None:
    model = tiny(LlamaConfig(**SIZES))
    rows = sequences(4)
    tree = answer_tree([[5, 6, 7], [5, 6, 8], [5, 9], [10]])
    alone = prepare_model(model, way="packed")
    batch = pack(rows, 4, tree=tree.parents, tree_tokens=tree.tokens)
    with torch.no_grad():
        expected = forward_selected(alone, batch)
        logits = forward_selected(prepare_model(model, way=way), batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["rows", "alone"])
def test_dropout_is_the_same_packed_and_unpacked(way: Any) -> None:
    model = tiny(LlamaConfig(**SIZES), dropout=0.3).train()
    context = use_sequence_dropout(model, seed=3)
    batch = pack(sequences(4), 4)
    found = []
    for chosen in ("packed", way):
        prepare_model(model, way=chosen, fused=False)
        with context.batch(7, range(len(LENGTHS)), batch):
            logits = forward_selected(model, batch)
            logits.logsumexp(1).sum().backward()
        found.append((logits.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for name, wanted in found[0][1].items():
        assert (found[1][1][name] - wanted).norm() <= 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("name", [*WINDOWED, *RECURRENT])
def test_generated_texts_are_those_of_each_prompt_alone(name: str) -> None:
    config = (WINDOWED | RECURRENT)[name]
    model = tiny(config, TARGETS.get(name))
    prove(model)
    prompts = [*sequences(4), *sequences(4)[:2]]

    def decided(answer: list[int]) -> bool:
        return len(answer) > 2 and answer[-1] % 7 == 0

    wanted = generate_rows(model, prompts, {1}, 9, decided, torch.device("cpu"), alone=True)
    decoder = GreedyDecoder(model, 4, {1}, 9, decided, way="rows")
    assert decoder.generate(prompts) == wanted
    assert len({tuple(answer) for answer in wanted}) > 1


def test_the_twin_shows_a_window_that_rows_of_the_run_pass() -> None:
    config = Gemma3TextConfig(**SIZES, sliding_window=128)
    assert limits_passed(config, 197) == ["sliding_window"]
    assert limits_passed(config, 128) == []
    chosen = choose(config, 197)
    assert chosen is not None
    small: Any = chosen[1]
    assert small.config.sliding_window < 16
    assert chosen[0].way == "packed"


def test_blocks_of_sparse_attention_are_packed_only_where_all_of_them_are_seen() -> None:
    config = MiniMaxM3VLTextConfig(layer_types=["full_attention", "minimax_m3_sparse"] * 30)
    most = config.index_block_size * config.index_topk_blocks
    assert limits_passed(config, most) == []
    ways = [chosen[0].way for n in (most, most + 1) if (chosen := choose(config, n))]
    assert ways == ["packed", "rows"]


def test_an_adapter_that_no_text_goes_through_is_refused() -> None:
    config = Phi4MultimodalConfig()
    chosen = choose(config, 64)
    assert chosen is not None
    adapted = [n for n, p in chosen[1].named_parameters() if p.requires_grad]
    assert adapted and not [n for n in adapted if "audio" in n or "image" in n]
    model = tiny(LlamaConfig(**SIZES)).requires_grad_(False)
    with pytest.raises(RequestError, match=r"adapts nothing in .* that text"):
        prove(model, gradients=True)


def test_long_rope_is_computed_one_row_a_call_where_rows_pass_its_first_length() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config = Phi3Config(
        **SIZES,
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_parameters=rope,
    )
    ways = [chosen[0].way for n in (64, 65) if (chosen := choose(config, n))]
    assert ways == ["packed", "alone"]


def test_learnt_positions_are_found_and_rotated_ones_count_on() -> None:
    assert positions_of(GPT2Config(n_positions=64, n_layer=2)) == 64
    assert positions_of(LlamaConfig(**SIZES, max_position_embeddings=64)) is None
