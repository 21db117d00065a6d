"""Stage train on a tiny Llama: what is written is what PEFT and plain transformers compute too."""

from __future__ import annotations

import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from pyarrow.parquet import read_schema
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_model, prepare_run, tiny_config
from yelp_hpc.config import Config, LoadedConfig, config_from_dict
from yelp_hpc.errors import RequestError, SavedForRequeue, StageError
from yelp_hpc.inference.shard_files import provenance_of
from yelp_hpc.models.packed.batch import forward_selected
from yelp_hpc.models.packed.dropout import SequenceDropout
from yelp_hpc.models.packed.masks import keep_mask
from yelp_hpc.proof.reproduce import reproduce
from yelp_hpc.publishing.export import export_merged
from yelp_hpc.ranks.launch import first_host, rendezvous
from yelp_hpc.ranks.rank import StopRequest, deadline
from yelp_hpc.rundir.files import (
    is_complete,
    read_json,
    read_jsonl,
    read_marker,
    write_json,
    write_marker,
)
from yelp_hpc.rundir.manifest import load_run, record_run
from yelp_hpc.rundir.paths import WEIGHTS, RunPaths
from yelp_hpc.stages import infer, train
from yelp_hpc.training.checkpoint import read_checkpoint
from yelp_hpc.training.data import f1_macro, read_rows
from yelp_hpc.training.log import truncate_log

FORWARD = "yelp_hpc.training.gradients.forward_selected"
Trained = tuple[RunPaths, Config]
KEPT_OR_PACKED: list[dict[str, Any]] = [{"gradient_checkpointing": "on"}, {"max_tokens": 4096}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def train_here(run: RunPaths, config: Config, stop: Any = None) -> None:
    """One rank in this process, without the launcher."""
    payload = {
        "run": str(run.root),
        "config": config.model_dump(mode="json"),
        "model": config.model.path,
        "fingerprint": train.training_fingerprint(run, config),
    }
    threads = torch.get_num_threads()
    try:
        train.train_rank(payload, stop or StopRequest())
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished training through the launcher, and its settings."""
    run = prepare_run(tmp_path_factory.mktemp("run"), model)
    config = tiny_config(model, train={"epochs": 2, "evaluate_every": 5})
    train.run(run, config)
    return run, config


def last_step(run: RunPaths) -> int:
    return max((line["step"] for line in read_jsonl(run.train_log)), default=0)


def losses(run: RunPaths) -> list[float]:
    return [line["loss"] for line in read_jsonl(run.train_log)]


def test_the_log_holds_every_step_once_and_the_loss_falls(trained: Trained) -> None:
    run, _ = trained
    lines = read_jsonl(run.train_log)
    assert [line["step"] for line in lines] == list(range(1, 23))
    checked = [line["step"] for line in lines if "validation_loss" in line]
    assert checked == [5, 10, 15, 20, 22]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["validation_loss"] < lines[4]["validation_loss"]
    rates = [line["learning_rate"] for line in lines]
    assert rates[:3] == [0, 2.5e-3, 5e-3]  # two steps of warm-up, then the cosine
    assert rates[12] == pytest.approx(5e-3 * 0.5 * (1 + math.cos(math.pi * 10 / 20)))
    for key in ("tokens_per_second", "examples_per_second", "memory_bytes", "grad_norm", "time"):
        assert all(line[key] > 0 for line in lines), key


def test_peft_alone_finds_the_logged_validation_loss(trained: Trained) -> None:
    """The adapter on the plain model, one padded-free sequence at a time, no code of ours."""
    run, config = trained
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    tuned = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    rows = read_rows(run.split("validation"), read_json(run.tokens))
    total, confusion = 0.0, [[0] * 5 for _ in range(5)]
    for i in range(len(rows)):
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([rows.sequence(i)])).logits[0, -2:]
        targets = torch.tensor([*rows.answer(i), rows.eos_id])
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        confusion[rows.labels[i]][logits[0, [a[0] for a in rows.answers]].argmax()] += 1
    last = read_jsonl(run.train_log)[-1]
    assert last["validation_loss"] == pytest.approx(total / (2 * len(rows)), abs=1e-5)
    assert last["validation_accuracy"] == sum(confusion[i][i] for i in range(5)) / len(rows)
    assert last["validation_f1_macro"] == pytest.approx(f1_macro(confusion))


def test_the_adapter_folder_is_pefts_and_whole(trained: Trained) -> None:
    run, config = trained
    assert is_complete(run.adapter)
    settings = read_json(run.adapter / "adapter_config.json")
    assert settings["base_model_name_or_path"] == config.model.path
    assert settings["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8, "LORA")
    assert run.loss_png.read_bytes().startswith(b"\x89PNG")
    # A checkpoint is an adapter of PEFT's as well.
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    PeftModel.from_pretrained(base, str(run.checkpoint(22)))


def test_a_finished_training_does_nothing(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    run, config = trained
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    train.run(run, config)
    assert "already done" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before


def test_another_training_in_the_same_folder_is_refused(trained: Trained) -> None:
    run, config = trained
    other = tiny_config(
        Path(config.model.path), lora={"rank": 2}, train={"epochs": 2, "evaluate_every": 5}
    )
    with pytest.raises(RequestError, match=r"lora.rank: 4 there, 2 now"):
        train.run(run, other)


def test_gradients_checkpointed_or_not_and_any_packing_are_equal(
    model: Path, trained: Trained, tmp_path: Path
) -> None:
    straight = losses(trained[0])
    for number, settings in enumerate(KEPT_OR_PACKED):
        run = prepare_run(tmp_path / str(number), model)
        train_here(run, tiny_config(model, train={"epochs": 2, "evaluate_every": 5, **settings}))
        assert losses(run) == pytest.approx(straight, abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_starts_like_fp32(
    model: Path, trained: Trained, tmp_path: Path, precision: str
) -> None:
    run = prepare_run(tmp_path, model)
    train_here(run, tiny_config(model, train={"epochs": 2, "precision": precision, "max_steps": 5}))
    assert losses(run) == pytest.approx(losses(trained[0])[:5], rel=5e-3)
    state = read_checkpoint(run.checkpoint(5)).state["scaler"]
    assert (state.get("scale") == 65536) == (precision == "fp16")


def test_fp16_skips_a_step_that_overflows(model: Path, tmp_path: Path) -> None:
    """A scale far too large: the steps are skipped, the scale halves, the rate stays."""
    run = prepare_run(tmp_path, model)
    config = tiny_config(model, train={"precision": "fp16", "max_steps": 1, "evaluate_every": 99})
    train_here(run, config)
    folder = run.checkpoint(1)
    assert read_jsonl(run.train_log)[0]["skipped"] == 0
    config = tiny_config(model, train={"precision": "fp16", "max_steps": 4, "evaluate_every": 99})
    from yelp_hpc.training.checkpoint import CheckpointStore

    snapshot = read_checkpoint(folder)
    snapshot.state["scaler"]["scale"] = 2.0**40
    snapshot.state["fingerprint"] = train.training_fingerprint(run, config)
    CheckpointStore(run.checkpoints, 2).save(snapshot)
    train_here(run, config)
    lines = read_jsonl(run.train_log)
    assert lines[1]["skipped"] == 1
    assert lines[1]["grad_norm"] is None
    assert lines[1]["loss_scale"] == 2.0**39
    assert lines[2]["learning_rate"] == lines[1]["learning_rate"]


def test_a_diverging_loss_stops_and_names_the_last_good_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    run = prepare_run(tmp_path, model)
    config = tiny_config(
        model,
        train={
            "learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 1e9, "save_every_steps": 1,
            "evaluate_every": 99,
        },
    )  # fmt: skip
    with pytest.raises(StageError, match=r"step 2: .*last good checkpoint is .*step-000001"):
        train_here(run, config)
    assert not run.adapter.exists()


def test_a_validation_that_is_no_number_stops_too(model: Path, tmp_path: Path) -> None:
    run = prepare_run(tmp_path, model)
    settings = {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 1e9}
    config = tiny_config(model, train={**settings, "evaluate_every": 1})
    with pytest.raises(StageError, match=r"step 1: the validation loss is (nan|inf); there is no"):
        train_here(run, config)
    assert not run.adapter.exists()


def test_a_resume_on_another_device_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = prepare_run(tmp_path, model)
    config = tiny_config(model, train={"save_every_steps": 1, "evaluate_every": 99})
    monkeypatch.setattr("yelp_hpc.ranks.device.device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(StopRequest, "pending", property(lambda _: last_step(run) >= 3))
    with pytest.raises(SavedForRequeue):
        train_here(run, config)
    monkeypatch.undo()
    assert "warning" not in capfd.readouterr().err
    train_here(run, config)
    assert "was computed on NVIDIA A100, this is CPU " in capfd.readouterr().err
    marker = read_marker(run.adapter)
    assert marker is not None and marker["fingerprint"]["device"].startswith("CPU ")


def test_a_stop_in_the_middle_of_a_step_repeats_that_step(
    model: Path, trained: Trained, tmp_path: Path
) -> None:
    """Asked to stop at every check in turn: no step is applied twice, none is lost."""
    run = prepare_run(tmp_path, model)
    config = tiny_config(model, train={"epochs": 2, "evaluate_every": 5})

    class After(StopRequest):
        checks = 7

        @property
        def pending(self) -> Any:
            self.checks -= 1
            return self.checks < 0

    starts = 1
    while True:
        stop = After()
        stop.checks = 7 + 5 * starts
        try:
            train_here(run, config, stop)
            break
        except SavedForRequeue:
            starts += 1
    assert starts > 5
    first, second = (r.adapter / "adapter_model.safetensors" for r in (trained[0], run))
    assert first.read_bytes() == second.read_bytes()
    lines = read_jsonl(run.train_log)
    assert [line["step"] for line in lines] == list(range(1, 23))
    assert [x.get("validation_loss") for x in lines] == [
        x.get("validation_loss") for x in read_jsonl(trained[0].train_log)
    ]


def test_a_step_that_does_not_fit_the_memory_is_repeated_in_smaller_parts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played from a step in the middle on; the record makes the same bytes again."""
    seen: list[int] = []

    def limited(model: Any, batch: Any) -> Any:
        tokens = len(batch.input_ids)
        seen.append(tokens)
        if len(seen) > 7 and tokens > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward_selected(model, batch)

    settings = {"micro_batches": 2, "max_tokens": 400, "max_steps": 8, "evaluate_every": 99}
    config = tiny_config(model, train=settings)
    first = prepare_run(tmp_path / "first", model)
    monkeypatch.setattr(FORWARD, limited)
    train_here(first, config)
    lines = read_jsonl(first.train_log)
    assert [line["step"] for line in lines] == list(range(1, 9))
    start, *lowered = read_json(first.budgets)
    assert start["max_tokens"] == 400 and start["step"] == 0
    assert lowered and 0 < lowered[0]["step"] < 7
    assert lowered[-1]["max_tokens"] < 300 and "out of memory" in lowered[-1]["why"]
    assert read_marker(first.adapter)["budgets"] == [start, *lowered]  # type: ignore[index]

    monkeypatch.setattr(FORWARD, forward_selected)
    second = prepare_run(tmp_path / "second", model)
    write_json(second.budgets, [start, *lowered])
    train_here(second, config)
    calm = prepare_run(tmp_path / "calm", model)
    train_here(calm, config)
    assert losses(second) == losses(first)
    assert losses(calm) == pytest.approx(losses(first), abs=1e-5)
    weights = [run.adapter / "adapter_model.safetensors" for run in (first, second, calm)]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_out_of_memory_at_any_micro_batch_changes_no_row_and_no_mask(
    seed: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hand is needed, and a reproduction with the recorded budgets has the same bytes."""
    settings = {"micro_batches": 2, "max_tokens": 400, "max_steps": 6, "evaluate_every": 99}
    (tmp_path / "reviews.csv").touch()  # prepared already
    data = {"train": str(tmp_path / "reviews.csv")}
    values = tiny_config(model, train=settings, data=data).model_dump(mode="json")
    config = config_from_dict(values)

    def new(name: str) -> RunPaths:
        run = prepare_run(tmp_path / name, model)
        return record_run(run.root, LoadedConfig(config, values, {}), "x.yaml", [])

    computed: list[dict[Any, Any]] = []
    calls = 0
    fails_at = Random(seed).randrange(12)  # of two a step

    def played(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        modules = [m for m in model.modules() if isinstance(m, SequenceDropout)]
        keys = modules[0].context.keys
        assert keys is not None
        rows = {}
        sizes = [batch.prefix_length, *batch.lengths]
        for own, tokens in zip(keys.split(sizes), batch.input_ids.split(sizes), strict=True):
            masks = [keep_mask(own, m.layer, 32, m.p, torch.uint8) for m in modules]
            rows[tuple(own.tolist())] = (tokens.tolist(), [mask.tolist() for mask in masks])
        computed.append(rows)
        if calls == fails_at + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward_selected(model, batch)

    def go(run: RunPaths, fails: bool) -> dict[Any, Any]:
        """Train; what was computed of each step's rows, and of its prefix."""
        nonlocal calls
        computed.clear()
        calls = 0 if fails else 100
        train_here(run, config)
        return {key: value for rows in computed for key, value in rows.items()}

    monkeypatch.setattr(FORWARD, played)
    calm, struck = new("calm"), new("struck")
    assert go(calm, fails=False) == go(struck, fails=True)
    assert [entry["max_tokens"] < 400 for entry in read_json(struck.budgets)] == [False, True]
    assert read_json(struck.budgets)[1]["step"] == fails_at // 2
    second = reproduce(struck.run_json, tmp_path / "again").run
    shutil.copytree(struck.prepare, second.prepare)
    go(second, fails=False)
    weights = [run.adapter / "adapter_model.safetensors" for run in (struck, second, calm)]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()
    assert losses(calm) == pytest.approx(losses(struck), abs=1e-5)


def test_a_sequence_that_never_fits_ends_with_what_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(model: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FORWARD, never)
    run = prepare_run(tmp_path, model)
    with pytest.raises(StageError, match=r"step 1: a sequence of .* lower data.cutoff"):
        train_here(run, tiny_config(model))
    assert read_json(run.budgets)[-1]["recompute"]


def test_checks_take_a_fixed_sample_and_the_last_one_all_rows(model: Path, tmp_path: Path) -> None:
    run = prepare_run(tmp_path, model)
    train_here(run, tiny_config(model, train={"evaluate_rows": 7, "evaluate_every": 4}))
    rows = [x["validation_rows"] for x in read_jsonl(run.train_log) if "validation_rows" in x]
    assert rows == [7, 7, 20]


def test_merged_export_equals_the_adapter_on_its_base(trained: Trained, tmp_path: Path) -> None:
    run, config = trained
    out = tmp_path / "merged"
    export_merged(run, config, out)
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("the food was superb")["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    tuned = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        difference = (merged(ids).logits - tuned(ids).logits).abs().max()
        with tuned.disable_adapter():
            effect = (merged(ids).logits - tuned(ids).logits).abs().max()
    assert difference < 1e-4 < effect
    with pytest.raises(RequestError, match="not empty"):
        export_merged(run, config, out)
    with pytest.raises(RequestError, match="run train"):
        export_merged(RunPaths(tmp_path / "nothing"), config, tmp_path / "other")


def test_missing_input_is_one_message(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run prepare first") as caught:
        train.run(RunPaths(tmp_path), tiny_config(model))
    assert str(caught.value).count("is missing") == 3
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_rank_is_the_launchers(model: Path, tmp_path: Path) -> None:
    run = prepare_run(tmp_path, model)
    with pytest.raises(RequestError, match=r"lora.target nonsense .*\n.*train-rank-0.log"):
        train.run(run, tiny_config(model, lora={"target": ["nonsense"]}))


def test_tensorboard_without_its_package_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    with pytest.raises(RequestError, match="tensorboard is not installed"):
        train.run(prepare_run(tmp_path, model), tiny_config(model, train={"tensorboard": True}))


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    run.train.mkdir()
    run.train_log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_log(run, 2, pending=False)
    assert run.train_log.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_log(run, 2, pending=True)
    assert run.train_log.read_text() == '{"step": 1}\n'


STEP = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
}


def test_several_nodes_meet_by_slurms_variables_or_by_ours() -> None:
    place = rendezvous(STEP)
    assert (place.nodes, place.node_rank, place.address) == (2, 1, "gpu03")
    assert place.port == 20000 + 123456 % 20000
    assert rendezvous({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}).nodes == 1  # no job step
    ours = {
        "YELP_HPC_NNODES": "3",
        "YELP_HPC_NODE_RANK": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "9",
    }
    place = rendezvous({**STEP, **ours})
    assert (place.nodes, place.node_rank, place.address, place.port) == (3, 2, "a", 9)
    with pytest.raises(RequestError, match="SLURM_NODEID is not set"):
        rendezvous({"YELP_HPC_NNODES": "2"})
    with pytest.raises(RequestError, match="not numbers"):
        rendezvous({"YELP_HPC_NNODES": "two"})
    with pytest.raises(RequestError, match="outside"):
        rendezvous({**STEP, "SLURM_NODEID": "2"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[03-05,9]", "n03"),
        ("a[1,3]b[2-4],c", "a1b2"),
        ("x,n[1-2]", "x"),
    ],
)
def test_first_host(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_a_passed_deadline_is_none() -> None:
    assert deadline({"YELP_HPC_DEADLINE": "50", "SLURM_JOB_END_TIME": "80"}, now=10) == 50
    assert deadline({"SLURM_JOB_END_TIME": "80"}, now=10) == 80
    assert deadline({"SLURM_JOB_END_TIME": "80"}, now=90) is None
    assert deadline(dict(os.environ) | {"YELP_HPC_DEADLINE": ""}, now=1e12) is None
    with pytest.raises(RequestError):
        deadline({"YELP_HPC_DEADLINE": "soon"}, now=0)


GLM = Path(__file__).parents[1] / "models" / "golden" / "model"


def test_precision_auto_is_kept_by_every_later_stage_and_machine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"max_steps": 2, "evaluate_every": 99}
    adapters = []
    for precision in ("auto", "bf16"):
        asked = tiny_config(
            model, train={"precision": precision, **steps}, infer={"precision": "auto"}
        )
        run = prepare_run(tmp_path / precision, model)
        write_marker(run.prepare, ["test.parquet", "tokens.json"])
        record_run(run.root, LoadedConfig(asked, {}, {}), "", [])
        with monkeypatch.context() as a_card:
            a_card.setattr("yelp_hpc.ranks.device.precision_here", lambda: ("bf16", "a card"))
            train.run(run, asked)
        marker = read_marker(run.adapter)
        assert marker and marker["fingerprint"]["train"]["precision"] == "bf16"
        adapters.append(marker["files"][WEIGHTS])
        train.run(run, load_run(run.root)[1])  # on this CPU: it is done, and with these settings
    assert adapters[0] == adapters[1]
    run, config = load_run(tmp_path / "auto")
    infer.run(run, config, "tuned")
    assert provenance_of(read_schema(run.shard("tuned", 0, 1)))["precision"] == "bf16"


@pytest.mark.parametrize(("weights", "precision"), [("fp32", "fp32"), ("fp16", "fp16")])
def test_chatglm3_trains_alike_however_it_is_packed(
    model: Path, tmp_path: Path, weights: str, precision: str
) -> None:
    """The report's architecture, number formats and adapted module."""
    found = []
    for max_tokens in (64, 4096):
        run = prepare_run(tmp_path / str(max_tokens), model, train=16)
        config = tiny_config(
            GLM,
            model={"path": str(GLM), "precision": weights},
            lora={"target": ["query_key_value"]},
            train={"precision": precision, "max_tokens": max_tokens, "epochs": 2},
        )
        train_here(run, config)
        found.append(losses(run))
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], abs=1e-5 if precision == "fp32" else 5e-3)
    assert found[0][-1] < found[0][0]
