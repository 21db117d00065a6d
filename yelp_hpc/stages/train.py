"""Stage train: LoRA fine-tuning on the answer tokens, one process per rank.

Reads `prepare/{train,validation}.parquet` and `prepare/tokens.json`; writes `train/checkpoints/`,
`train/log.jsonl`, `train/adapter/` (a PEFT adapter) and `train/loss.png`. `run` starts the ranks
(this module as `python -m yelp_hpc.stages.train`), which go on from the newest good checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.config import FREE_TRAIN_SETTINGS, Config, config_from_dict
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.own_files import own_module
from yelp_hpc.ranks.launch import launch
from yelp_hpc.ranks.rank import StopRequest, run_rank
from yelp_hpc.rundir.files import (
    is_complete,
    read_json,
    read_marker,
    sha256_file,
    sweep,
)
from yelp_hpc.rundir.manifest import settle_precision
from yelp_hpc.rundir.node_faults import recorded_faults
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.record import training_log

if TYPE_CHECKING:
    from yelp_hpc.ranks.world import World
    from yelp_hpc.training.loop import Training


def run(paths: RunPaths, config: Config) -> None:
    """Train the adapter, or go on where an earlier start stopped; does nothing when it is there.

    Or take the one that `train.adapter` names.

    Raises:
        RequestError: prepare's files are missing, a setting cannot be met here, or the run
            directory holds another training.
        StageError: a rank failed, the training diverged, the disk is full.
        SavedForRequeue: asked to stop by a signal or a deadline; the state is saved. `NodeFault`:
            this node's hardware failed, which is recorded.
    """
    check_request(paths, config)
    sweep(paths.root, paths.train, paths.adapter, paths.checkpoints)
    if config.train.adapter is not None:
        from yelp_hpc.models.local import model_folder
        from yelp_hpc.training.existing import take_adapter

        take_adapter(paths, config, model_folder(config.model))
        return
    from yelp_hpc.ranks.device import precision_here

    config = settle_precision(paths, config, "train", precision_here)
    fingerprint = training_fingerprint(paths, config)
    if config.train.start is not None:
        from yelp_hpc.models.local import model_folder
        from yelp_hpc.training.start import begin

        fingerprint = begin(paths, config, model_folder(config.model), fingerprint)
    if is_complete(paths.adapter):
        marker = read_marker(paths.adapter) or {}
        check_fingerprint(marker.get("fingerprint") or {}, fingerprint, paths.adapter)
        _draw(paths)
        print(f"train: already done ({paths.adapter}, step {marker.get('step')})", file=sys.stderr)
        return
    ranks = ranks_of_node(config)
    from yelp_hpc.models.checkpoint import check_folder
    from yelp_hpc.models.local import model_folder

    folder = model_folder(config.model)
    check_folder(folder, tokenizer=False)
    payload = {
        "run": str(paths.root),
        "config": config.model_dump(mode="json"),
        "model": str(folder),
        "fingerprint": fingerprint,
    }
    command = own_module("yelp_hpc.stages.train")
    with recorded_faults(paths):
        launch(command, json.dumps(payload).encode(), ranks, paths.logs)
    _draw(paths)


def ranks_of_node(config: Config) -> int:
    """`train.nproc`, or one rank for each GPU of this node.

    Raises:
        RequestError: more ranks than GPUs, or GPUs that cannot be used.
    """
    from yelp_hpc.ranks.device import usable_gpus

    gpus = usable_gpus()
    if config.train.nproc == "auto":
        return max(1, gpus)
    if gpus and config.train.nproc > gpus:
        raise RequestError(
            f"train.nproc is {config.train.nproc}, but this node shows {gpus} GPUs: "
            "one rank needs one GPU"
        )
    return config.train.nproc


def check_request(paths: RunPaths, config: Config) -> None:
    """Look for what training needs, before any rank starts.

    Raises:
        RequestError: lists what is missing.
    """
    problems = [
        f"{path} is missing: run prepare first"
        for path in (paths.tokens, paths.split("train"), paths.split("validation"))
        if not path.is_file()
    ]
    if config.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        problems.append(
            "train.tensorboard is on, but the package tensorboard is not installed: "
            "install it or set train.tensorboard=false"
        )
    if problems:
        raise RequestError(all_problems("train cannot start:", problems))


def training_fingerprint(paths: RunPaths, config: Config) -> dict[str, Any]:
    """What a training depends on; a checkpoint of another one is never resumed."""
    train = config.train.model_dump(mode="json", exclude={*FREE_TRAIN_SETTINGS, "adapter"})
    return {
        "seed": config.seed,
        "model": config.model.model_dump(mode="json"),
        "lora": config.lora.model_dump(mode="json"),
        "train": train,
        "data": {
            name: sha256_file(path)
            for name, path in (
                ("train", paths.split("train")),
                ("validation", paths.split("validation")),
                ("tokens", paths.tokens),
            )
        },
    }


def check_fingerprint(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Compare the settings of the training that `where` holds with those wanted.

    Raises:
        RequestError: names each setting in which it is another training's.
    """
    problems = []
    for section, value in wanted.items():
        other = found.get(section)
        if other == value:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            problems += [
                f"{section}.{key}: {other.get(key)} there, {value[key]} now"
                for key in value
                if other.get(key) != value[key]
            ]
        else:
            problems.append(f"{section}: {other} there, {value} now")
    if problems:
        headline = f"{where} belongs to another training; use a new run directory, or undo:"
        raise RequestError(all_problems(headline, problems))


def _draw(paths: RunPaths) -> None:
    """Draw loss.png unless it is newer than the log."""
    log, picture = paths.train_log, paths.loss_png
    if not log.exists() or (picture.exists() and picture.stat().st_mtime >= log.stat().st_mtime):
        return
    from yelp_hpc.training.loss_plot import draw_loss

    draw_loss(training_log(paths), picture)


# --- a rank -------------------------------------------------------------------------------------


def train_rank(payload: dict[str, Any], stop: StopRequest) -> None:
    """What each rank does: build, restore, train; rank 0 writes the adapter."""
    paths, config = RunPaths(payload["run"]), config_from_dict(payload["config"])

    from yelp_hpc.ranks.device import device_name
    from yelp_hpc.ranks.world import join_world
    from yelp_hpc.training.checkpoint import CheckpointStore, read_checkpoint, write_adapter
    from yelp_hpc.training.log import truncate_log

    world = join_world()
    fingerprint = {**payload["fingerprint"], "device": device_name(world.device)}
    step = -1
    if world.first:
        store = CheckpointStore(paths.checkpoints, config.train.keep_checkpoints)
        store.sweep()
        folder, skipped = store.newest()
        for warning in skipped:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if folder is not None:
            found = read_json(folder / "state.json")
            check_fingerprint(found["fingerprint"], payload["fingerprint"], folder)
            before = found["fingerprint"].get("device", fingerprint["device"])
            if before != fingerprint["device"]:
                print(
                    f"warning: {folder} was computed on {before}, this is {fingerprint['device']}: "
                    "the training goes on, its last digits may be others",
                    file=sys.stderr,
                    flush=True,
                )
            step = found["step"]
    step = world.agree(step)
    training = build(paths, config, Path(payload["model"]), fingerprint, world, stop, max(step, 0))
    if step >= 0:
        training.restore(read_checkpoint(paths.checkpoint(step)))
        if world.first:
            print(f"train: going on from step {step}", file=sys.stderr, flush=True)
    if world.first:
        truncate_log(paths, max(step, 0), training.progress.pending is not None)
        training.board = _board(paths, config, training)
    training.run()
    if world.first:
        write_adapter(
            paths.adapter,
            training.adapter(),
            training.adapter_config,
            step=training.progress.step,
            best=training.progress.best,
            fingerprint=fingerprint,
            budgets=read_json(paths.budgets),
        )
        print(f"train: done, adapter in {paths.adapter}", file=sys.stderr, flush=True)


def build(
    paths: RunPaths,
    config: Config,
    model_path: Path,
    fingerprint: dict[str, Any],
    world: World,
    stop: StopRequest,
    step: int = 0,
) -> Training:
    """The model with its adapter, the optimizer, the schedule and the data, as at step 0.

    `step`: from which it will go on; a budget that is new holds from there.
    """
    import torch
    from transformers.optimization import (
        get_constant_schedule_with_warmup,
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
    )

    from yelp_hpc.data.answer_tree import answer_tree, scored_answers
    from yelp_hpc.data.packing import DataPlan
    from yelp_hpc.models.load import load_model
    from yelp_hpc.models.packed.dropout import use_sequence_dropout
    from yelp_hpc.stages.budgets import settle_budgets
    from yelp_hpc.stages.door import take_the_way
    from yelp_hpc.training.adapter import adapter_config, add_lora
    from yelp_hpc.training.budget import budget_at
    from yelp_hpc.training.checkpoint import CheckpointStore, load_adapter
    from yelp_hpc.training.data import read_rows
    from yelp_hpc.training.loop import Training, peft_name, recompute_layers
    from yelp_hpc.training.start import start_weights

    settings = config.train
    tokens = read_json(paths.tokens)
    train, validation = (read_rows(paths.split(s), tokens) for s in ("train", "validation"))
    if not len(train):
        raise RequestError(f"{paths.split('train')} holds no rows")
    plan = DataPlan(
        len(train), settings.global_batch, settings.epochs, config.seed, settings.max_steps
    )
    own = [train.own_length(row) for row in range(len(train))]
    budgets = world.agree(
        settle_budgets(paths, config, model_path, plan, own, train.prefix_length, world, step)
        if world.first
        else None
    )
    torch.set_num_threads(budgets[0].threads)
    model = add_lora(load_model(model_path, settings.precision), config).to(world.device)
    if settings.start is not None:
        named = {peft_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        load_adapter(named, start_weights(paths))
    dropout = use_sequence_dropout(model, config.seed)
    checked = [validation.own_length(row) for row in range(len(validation))]
    longest = train.prefix_length + max([*own, *checked])
    found = take_the_way(model, config, model_path, longest, gradients=True)
    if budget_at(budgets, step).recompute and found.way != "alone":  # a row's masks are drawn once
        recompute_layers(model)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    warm = settings.warmup(plan.steps)
    if settings.schedule == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, warm)
    else:
        cosine = settings.schedule == "cosine"
        shape = get_cosine_schedule_with_warmup if cosine else get_linear_schedule_with_warmup
        schedule = shape(optimizer, warm, plan.steps)
    return Training(
        config=config,
        paths=paths,
        world=world,
        model=model,
        dropout=dropout,
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16"),
        plan=plan,
        train=train,
        validation=validation,
        store=CheckpointStore(paths.checkpoints, settings.keep_checkpoints),
        stop=stop,
        tree=answer_tree(scored_answers(tokens)),
        adapter_config=adapter_config(model, config),
        fingerprint=fingerprint,
        budgets=budgets,
    )


def _board(paths: RunPaths, config: Config, training: Training) -> Any:
    if not config.train.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    # Events of steps that are about to be repeated are hidden.
    return SummaryWriter(paths.train / "tensorboard", purge_step=training.progress.step + 1)


def main() -> int:
    """One rank; what to train comes on standard input. Returns the exit code."""
    payload = json.loads(sys.stdin.buffer.read())
    return run_rank(lambda stop: train_rank(payload, stop))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown, which may wait for ranks that are gone.
    os._exit(code)
