"""The forecast: arithmetic against counted numbers, the command, and a probe against a real run."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_model, prepare_run, reviews, tiny_config
from yelp_hpc.config import load_config
from yelp_hpc.data.packing import DataPlan, cut_batch, deal, plan_microbatches
from yelp_hpc.errors import RequestError
from yelp_hpc.forecast.forecast import checkpoint_interval, forecast, time_limit
from yelp_hpc.forecast.inputs import estimated_lengths, prepared_lengths, read_shape
from yelp_hpc.forecast.machine import Probe
from yelp_hpc.forecast.memory import choose_budget, training_memory
from yelp_hpc.forecast.model_shape import KNOWN, model_shape
from yelp_hpc.forecast.page import Happened, comparison_page, page
from yelp_hpc.forecast.work import Lengths, computed, forward_flops, training_work
from yelp_hpc.gpus import find_card
from yelp_hpc.rundir.paths import RunPaths

ROOT = Path(__file__).parents[2]
CHATGLM3 = model_shape(KNOWN["THUDM/chatglm3-6b-base"], "ChatGLM3")
LLAMA = model_shape(KNOWN["demo:smollm2-135m"], "SmolLM2")


def yelp_hpc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yelp_hpc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


# --- sizes --------------------------------------------------------------------------------------


def test_sizes_of_chatglm3_are_the_published_ones() -> None:
    assert CHATGLM3.parameters == 6_243_584_000
    assert CHATGLM3.adapter_parameters(["query_key_value"], 8) == 1_949_696


def test_sizes_are_those_of_the_built_models(tmp_path: Path) -> None:
    from yelp_hpc.models.load import load_model
    from yelp_hpc.training.adapter import add_lora

    make_model(tmp_path / "llama")
    for folder, target in ((tmp_path / "llama", ["q_proj", "v_proj", "down_proj"]), (None, None)):
        if folder is None:
            folder = ROOT / "tests" / "models" / "golden" / "model"
            target = ["query_key_value", "dense_h_to_4h"]
        config = tiny_config(folder, lora={"rank": 4, "target": target})
        model = load_model(folder, "fp32")
        shape = read_shape(config)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        tuned = add_lora(model, config)
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        assert shape.adapter_parameters(target, 4) == trained


EXPERTS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320,
           "num_key_value_heads": 2, "intermediate_size": 48, "num_experts_per_tok": 2}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**EXPERTS, "num_local_experts": 8},
    "qwen2_moe": {**EXPERTS, "num_experts": 6, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "granitemoe": {**EXPERTS, "num_local_experts": 4},
    "deepseek_v3": {**EXPERTS, "n_routed_experts": 8, "moe_intermediate_size": 16,
                    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
                    "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 8,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_holds_all_and_computes_with_those_that_are_chosen(
    kind: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = MIXTURES[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    model.save_pretrained(tmp_path)
    shape = read_shape(tiny_config(tmp_path))
    assert shape.parameters == sum(v.numel() for v in model.state_dict().values())
    experts = next(n for key, n in values.items() if key.endswith("experts") and "_s" not in key)
    passed = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and 320 not in weight.shape:
            routed = ".experts." in name or weight.ndim == 3
            passed += weight.numel() * (2 / experts if routed else 1)
    assert shape.layer_weights == pytest.approx(passed, rel=0.01)
    file = tmp_path / "config.json"
    told = json.loads(file.read_text())
    del told["num_experts_per_tok"]
    file.write_text(json.dumps(told))
    with pytest.raises(RequestError, match=r"mixture of experts.*num_experts_per_tok would be"):
        read_shape(tiny_config(tmp_path))


OTHERS: dict[str, dict[str, Any]] = {
    "llama": EXPERTS,
    "starcoder2": EXPERTS,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 320, "state_size": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 320, "n_positions": 1024},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_are_those_of_the_files_where_the_sizes_say_otherwise(
    kind: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in OTHERS[kind].items() if "experts" not in k}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    model.save_pretrained(tmp_path)
    shape = read_shape(tiny_config(tmp_path))
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)
    assert (shape.stored == 0) == (kind == "llama")
    passed = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim > 1 and 320 not in p.shape and "wpe" not in name
    )
    assert shape.layer_weights == pytest.approx(passed, rel=0.01)


def test_experts_whose_files_tell_no_sizes_are_not_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", **MIXTURES["mixtral"]}))
    with pytest.raises(RequestError, match="its safetensors would be needed to plan"):
        read_shape(tiny_config(tmp_path))


def test_a_config_json_that_is_no_decoder_is_named() -> None:
    with pytest.raises(RequestError, match=r"x/config.json .*hidden_size is None.*num_hidden"):
        model_shape({"model_type": "clip", "vocab_size": 10}, "x/config.json")


# --- the work -----------------------------------------------------------------------------------


def test_computed_tokens_are_those_of_the_engines_micro_batches() -> None:
    own = [5, 90, 13, 40, 40, 7, 61, 200]
    for budget in (64, 100, 128, 1000):
        groups = plan_microbatches(own, budget, 11)
        assert computed(own, budget, 11) == sum(11 + sum(own[i] for i in g) for g in groups)


def test_work_of_a_training_is_that_of_its_steps(tmp_path: Path) -> None:
    config = tiny_config(Path("m"), train={"epochs": 2, "global_batch": 8, "max_tokens": 128})
    lengths = Lengths([10 + i % 7 for i in range(50)], [9] * 4, [9] * 5, 6, "")
    work = training_work(config, lengths, 2, None, CHATGLM3)
    plan = DataPlan(50, 8, 2, config.seed)
    assert work.pieces == 1 and work.budget == 128 and not work.recompute
    tokens = critical = 0
    for step in range(plan.steps):
        own = [lengths.train[row] for row in plan.batch(step)]
        cut = [6 + sum(own[i] for i in piece) for piece in cut_batch(own, 1, 128, 6)]
        tokens += sum(cut)
        critical += max(sum(cut[i] for i in share) for share in deal(cut, 2))
    assert (work.steps, work.sequences) == (14, 100)
    assert (work.tokens, work.critical) == (tokens, critical)
    assert work.evaluations == 14  # each step: a tenth of 14 steps is one
    none = training_work(config, replace(lengths, validation=[]), 2, None, CHATGLM3)
    assert none == replace(work, evaluations=0)
    short = tiny_config(Path("m"), train={"global_batch": 8, "max_tokens": 128, "max_steps": 3})
    fewer = training_work(short, lengths, 2, None, CHATGLM3)
    assert (fewer.steps, fewer.sequences, fewer.evaluations) == (3, 24, 3)
    rarely = tiny_config(Path("m"), train={"global_batch": 8, "evaluate_every": 3})
    assert training_work(rarely, lengths, 2, None, CHATGLM3).evaluations == 3  # of 7 steps


def test_forward_flops_of_one_sequence_by_hand() -> None:
    shape = model_shape(
        {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 100},
        "",
    )  # fmt: skip
    qkv, out, mlp = 8 * 4 * 4, 8 * 8, 3 * 8 * 16
    products = 2 * (2 * qkv + out + mlp) * 10  # the last layer's output and MLP are left out
    attention = 4 * 8 * 2 * (6 * 4 + 6 * 6 / 2)  # 6 tokens of its own behind a prefix of 4
    assert forward_flops(shape, [6], 10, 4) == products + attention + 2 * 100 * 8 * 2


def test_the_adapters_own_products_are_counted() -> None:
    path = ROOT / "configs/yelp_chatglm3.yaml"
    plans = []
    for rank in (8, 512):
        config = load_config(path, [f"lora.rank={rank}", "data.train_rows=320"]).config
        plans.append(forecast(config, CHATGLM3, estimated_lengths(config), card=find_card("h100")))
    small, large = plans
    more = large.adapter_parameters - small.adapter_parameters
    # forward, and backward for what it reads and for its weights: 2 each of a parameter and token
    assert large.train_flops - small.train_flops == pytest.approx(6 * more * large.train_tokens)
    assert large.infer_flops - small.infer_flops == pytest.approx(more * large.infer_tokens)
    assert large.train_flops > 1.02 * small.train_flops


def test_what_generate_writes_is_said_not_to_be_counted_and_no_tree_is() -> None:
    names = json.dumps([f"card payment number {n}" for n in range(20)])
    changes = ["data.train_rows=320", "data.test_rows=50", f"task.labels={names}"]
    plans = {}
    for mode in ("score", "generate"):
        told = [*changes, f"infer.mode={mode}", "task.ordinal=false", "task.names=null"]
        config = load_config(ROOT / "configs/yelp_chatglm3.yaml", told).config
        plans[mode] = forecast(config, CHATGLM3, estimated_lengths(config))
    lengths = estimated_lengths(config)
    assert lengths.tree > 50
    more = plans["score"].infer_tokens - plans["generate"].infer_tokens
    assert more >= 2 * 50 * lengths.tree  # both models, each test row
    assert plans["score"].mean_tokens == plans["generate"].mean_tokens  # of prompts
    assert any("32 tokens an answer at most" in note for note in plans["generate"].notes)
    assert not any("tokens an answer" in note for note in plans["score"].notes)


def test_the_budget_of_the_reports_run_keeps_its_activations_on_a_3090() -> None:
    config = load_config(ROOT / "configs/yelp_chatglm3.yaml").config
    card = find_card("rtx3090")

    def largest(budget: int) -> int:
        return max(budget, 1024)

    budget, recompute = choose_budget(CHATGLM3, config, card.memory, True, largest)
    assert 3300 < budget < 3600 and not recompute
    memory = training_memory(CHATGLM3, config, budget, recompute, cuda=True)
    assert memory.weights == 2 * CHATGLM3.parameters
    assert memory.adapter == 16 * 1_949_696
    assert 0.85 * card.memory < memory.total < 0.93 * card.memory
    # more asked for than fits: the layers are computed twice
    fixed = load_config(ROOT / "configs/yelp_chatglm3.yaml", ["train.max_tokens=8000"]).config
    assert choose_budget(CHATGLM3, fixed, card.memory, True, largest) == (8000, True)
    # the longest sequence alone does not fit with everything kept
    tight = round(memory.total - 0.75 * memory.activations)
    budget, recompute = choose_budget(CHATGLM3, config, tight, True, largest)
    assert recompute and budget > 1024
    roomy = choose_budget(CHATGLM3, config, find_card("h100").memory, True, largest)
    assert roomy == (8192, False)
    twice = load_config(ROOT / "configs/yelp_chatglm3.yaml", ["train.gradient_checkpointing=on"])
    more, recompute = choose_budget(CHATGLM3, twice.config, card.memory, True, largest)
    assert recompute and more > 3600


def test_lora_keeps_what_its_modules_read_once() -> None:
    """Modules that read the same share it: q, k and v; gate and up."""

    def kept(*target: str) -> float:
        config = tiny_config(Path("m"), lora={"target": [*target]})
        return training_memory(LLAMA, config, 1000, False, cuda=True).activations

    assert kept("q_proj", "k_proj", "v_proj") == kept("q_proj") == kept("k_proj")
    assert kept("gate_proj", "up_proj") == kept("gate_proj") == kept("up_proj")
    for others in (["gate_proj"], ["o_proj"], ["down_proj"], ["o_proj", "up_proj", "down_proj"]):
        assert kept("q_proj", *others) > kept("q_proj")
        assert kept("q_proj", *others) > kept(*others)


def test_long_batches_are_cut_into_more_pieces() -> None:
    config = tiny_config(Path("m"), train={"global_batch": 32, "micro_batches": "auto"})
    pieces = [
        training_work(config, Lengths([each] * 64, [], [9], 6, ""), 1, None, CHATGLM3).pieces
        for each in (1, 1000)
    ]
    assert pieces == [1, 8]


def test_sizes_of_the_language_model_inside_another_are_its_own() -> None:
    inside = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}
    inside |= {"intermediate_size": 16, "num_attention_heads": 2}
    outer = {"model_type": "llava", "vocab_size": 50, "hidden_size": 99, "text_config": inside}
    shape = model_shape(outer, "config.json")
    assert (shape.vocabulary, shape.hidden, shape.layers) == (50, 8, 2)


# --- advice -------------------------------------------------------------------------------------


def test_checkpoint_interval_is_the_best_of_its_neighbours() -> None:
    save, mtbf = 30.0, 6 * 3600.0
    best = checkpoint_interval(save, mtbf)
    assert math.isclose(best, math.sqrt(2 * save * mtbf), rel_tol=0.05)  # Young's first order

    def total(interval: float) -> float:
        """Daly's expected wall time of an hour of work, restart costs nothing."""
        return mtbf * math.expm1((interval + save) / mtbf) * 3600 / interval

    assert total(best) <= min(total(best * 1.05), total(best / 1.05))
    assert checkpoint_interval(100.0, 40.0) == 40.0


def test_time_limits_are_slurms_and_leave_room() -> None:
    from yelp_hpc.jobs.cluster import minutes

    for seconds in (1, 100, 3600, 80_000, 900_000):
        assert minutes(time_limit(seconds)) * 60 >= 1.5 * seconds + 600


@pytest.mark.parametrize("shards", [1, 8, 400])
def test_the_limit_has_room_for_a_shard_of_the_number_that_is_advised(shards: int) -> None:
    from yelp_hpc.jobs.cluster import minutes

    config = load_config(ROOT / "configs/yelp_chatglm3.yaml", [f"infer.shards={shards}"]).config
    plan = forecast(config, CHATGLM3, estimated_lengths(config), card=find_card("t4"))
    assert plan.infer_limit and plan.shards and plan.shards > 1
    assert plan.infer_seconds
    infer = config.infer.model_copy(update={"shards": 1})
    alone = config.model_copy(update={"infer": infer})
    whole = forecast(alone, CHATGLM3, estimated_lengths(config), card=find_card("t4"))
    each = (whole.infer_seconds or 0) / 2 / min(shards, plan.shards)
    assert minutes(plan.infer_limit) * 60 >= 1.5 * each


def test_more_cards_take_less_time_and_no_fewer_flops() -> None:
    config = load_config(ROOT / "configs/yelp_chatglm3.yaml", ["data.train_rows=32000"]).config
    lengths = estimated_lengths(config)
    card = find_card("a100")
    one, four = (forecast(config, CHATGLM3, lengths, card=card, nodes=n) for n in (1, 4))
    assert one.train_seconds and four.train_seconds
    assert one.train_seconds > four.train_seconds
    assert four.train_tokens >= one.train_tokens  # the prefix is computed in more micro-batches
    assert "assumption" in page(one) and max(map(len, page(one).splitlines())) <= 80


def test_a_card_that_waits_for_its_host_is_said_and_counted() -> None:
    """An H200 took 91 to 180 ms for a micro-batch of which it computed 62."""
    path = ROOT / "configs/yelp_chatglm3.yaml"
    times = []
    for pieces in (1, 4):
        config = load_config(path, [f"train.micro_batches={pieces}", "train.nproc=1"]).config
        plan = forecast(config, CHATGLM3, estimated_lengths(config), card=find_card("h200"))
        times.append(plan.train_seconds or 0)
        assert ("faster than its host" in "\n".join(plan.notes)) == (pieces == 4)
    assert times[1] > 1.5 * times[0]
    slow = load_config(path).config
    plan = forecast(slow, CHATGLM3, estimated_lengths(slow), card=find_card("rtx3090"))
    assert "faster than its host" not in "\n".join(plan.notes)


def test_a_card_that_is_too_small_or_knows_no_bf16_is_said() -> None:
    changes = ["data.train_rows=320", "train.precision=bf16", "model.precision=fp32"]
    config = load_config(ROOT / "configs/yelp_chatglm3.yaml", changes).config
    plan = forecast(config, CHATGLM3, estimated_lengths(config), card=find_card("t4"))
    assert "no bf16: set train.precision" in "\n".join(plan.notes)
    whole = load_config(ROOT / "configs/yelp_chatglm3.yaml", [changes[0], "train.precision=fp32"])
    plan = forecast(whole.config, CHATGLM3, estimated_lengths(config), card=find_card("t4"))
    assert "lower train.max_tokens or train.precision" in "\n".join(plan.notes)


@pytest.mark.parametrize(
    ("card", "chosen", "said"),
    [
        ("rtx3090", "bf16", "precision auto is bf16 on a RTX 3090"),
        ("t4", "fp16", "precision auto is fp16 on a T4"),
        (None, "fp32", "precision auto is fp32 on a CPU, which is assumed: name a card with --gpu"),
    ],
)
def test_precision_auto_is_planned_as_the_card_has_it(
    card: str | None, chosen: str, said: str
) -> None:
    auto, same = (
        load_config(
            ROOT / "configs/yelp_chatglm3.yaml",
            ["data.train_rows=320", f"train.precision={p}", f"infer.precision={p}"],
        ).config
        for p in ("auto", chosen)
    )
    found, named = (
        forecast(c, CHATGLM3, estimated_lengths(c), card=find_card(card) if card else None)
        for c in (auto, same)
    )
    assert said in found.notes
    assert replace(found, notes=[]) == replace(named, notes=[])
    assert not any("auto" in note for note in named.notes)


def test_a_card_that_the_image_does_not_know_gets_no_time() -> None:
    config = load_config(ROOT / "configs/yelp_chatglm3.yaml", ["data.train_rows=320"]).config
    plan = forecast(config, CHATGLM3, estimated_lengths(config), card=find_card("v100"))
    assert plan.train_seconds is None and plan.infer_seconds is None
    assert (
        "CUDA 13, which the image is built with, does not run on a V100: it needs compute "
        "capability 7.5 and driver 580. `containers/lock.sh --index URL` makes a lock for an older "
        "CUDA"
    ) in plan.notes


def test_a_probe_gives_times_in_proportion_to_the_tokens() -> None:
    config = tiny_config(Path("m"))
    lengths = Lengths([20] * 80, [], [30] * 40, 5, "")
    shape = model_shape(KNOWN["demo:smollm2-135m"], "")
    probe = Probe(
        device="this CPU", cuda=False, train_start=10.0, train_token=0.01,
        train_first=2 * 10**9, train_memory=3 * 10**9, train_largest=10**6, train_shapes=10**6,
        infer_start=5.0, infer_token=0.002, infer_memory=2 * 10**9,
    )  # fmt: skip
    plan = forecast(config, shape, lengths, probe=probe)
    work = training_work(config, lengths, 1, None, shape)
    assert plan.train_seconds == pytest.approx(10 + 0.01 * work.critical)
    scored = computed(lengths.test, config.infer.max_tokens, 5)
    assert plan.infer_seconds == pytest.approx(2 * (5 + 0.002 * scored))
    assert plan.train_memory.total == 3 * 10**9
    grown = forecast(config, shape, lengths, probe=replace(probe, train_shapes=1))
    assert work.shapes >= 1 and grown.train_memory.total >= 3 * 10**9


# --- the command --------------------------------------------------------------------------------


def test_lengths_of_a_prepared_run_are_counted(tmp_path: Path) -> None:
    run = prepare_run(tmp_path / "run", make_model(tmp_path / "model"))
    lengths = prepared_lengths(run)
    assert lengths is not None and len(lengths.train) == 84
    import pyarrow.parquet as pq

    total = sum(pq.read_table(run.split("train"))["length"].to_pylist())
    assert sum(lengths.train) + 84 * (lengths.prefix - 1) == total
    assert prepared_lengths(RunPaths(tmp_path)) is None


def test_plan_of_the_reports_run_needs_nothing_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['x', 'plan', '--config', 'configs/yelp_chatglm3.yaml', '--gpu',"
        " 'rtx3090', '--json']\nfrom yelp_hpc.cli.main import cli\n"
        "cli.main(standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"] == 4700 and plan["ranks"] == 4 and plan["card_memory"] == 24 * 2**30


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name --config FILE, or --run DIR"),
        (["--config", "configs/demo.yaml", "--gpu", "gtx1080"], "no GPU 'gtx1080'"),
        (["--compare"], "--compare needs --run"),
        (["--run", "nowhere"], "not a run directory"),
        (["--run", "nowhere", "--set", "seed=1"], "--set changes a --config"),
        (
            ["--config", "configs/yelp_chatglm3.yaml", "--set", "model.path=a/b"],
            "model.path a/b is no folder here",
        ),
        (
            ["--config", "configs/yelp_chatglm3.yaml", "--set", "data.path=a/b"],
            "set data.test_rows",
        ),
    ],
)
def test_a_wrong_request(arguments: list[str], expected: str) -> None:
    done = yelp_hpc("plan", *arguments)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_the_comparison_shows_by_how_much_it_was_off() -> None:
    config = load_config(ROOT / "configs/yelp_chatglm3.yaml", ["data.train_rows=320"]).config
    plan = forecast(config, CHATGLM3, estimated_lengths(config), card=find_card("h100"))
    assert plan.train_seconds
    happened = Happened(steps=plan.steps, train_seconds=plan.train_seconds / 1.25, restarts=2)
    text = comparison_page(plan, happened)
    assert "+25%" in text and "2 restarts" in text and "?" in text


def test_probe_then_run_then_compare(tmp_path: Path) -> None:
    """The whole way on a tiny model: the forecast is kept, and stands beside what happened."""
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews(240)])
    values = tiny_config(
        make_model(tmp_path / "model"),
        data={"train": str(tmp_path / "reviews.csv"), "test_rows": 40},
    ).model_dump(mode="json")
    config, run = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(json.dumps(values))  # JSON is YAML
    planned = yelp_hpc("plan", "--config", str(config), "--run", str(run), "--probe", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert "measured" in plan["machine"] and plan["token_source"] == "counted in prepare/"
    assert [path.name for path in run.iterdir()] == ["plan.json"]
    early = yelp_hpc("plan", "--compare", "--run", str(run))
    assert early.returncode == 2

    submit = ("submit", "all", "--config", str(config), "--executor", "local", "--run", str(run))
    done = yelp_hpc(*submit)
    assert done.returncode == 0, done.stderr
    compared = yelp_hpc("plan", "--compare", "--run", str(run), "--json")
    assert compared.returncode == 0, compared.stderr
    rows = {row["what"]: row for row in json.loads(compared.stdout)["rows"]}
    for what in ("steps", "tokens"):
        assert rows[what]["forecast"] == pytest.approx(rows[what]["happened"], rel=0.01), rows
    assert rows["train seconds"]["happened"] > 0 and rows["infer seconds"]["happened"] > 0
    memory = rows["train memory"]
    assert memory["forecast"] == pytest.approx(memory["happened"], rel=0.15)
    # who names a machine asks for its forecast, not for the one that was kept
    named = yelp_hpc("plan", "--compare", "--run", str(run), "--gpu", "t4", "--json")
    other = {row["what"]: row for row in json.loads(named.stdout)["rows"]}
    assert other["train seconds"]["forecast"] != rows["train seconds"]["forecast"]
    assert other["steps"] == rows["steps"]
