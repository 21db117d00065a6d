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
import warnings
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
    read_jsonl,
    read_marker,
    sha256_file,
    sweep,
)
from yelp_hpc.rundir.paths import RunPaths

if TYPE_CHECKING:
    from yelp_hpc.ranks.world import World
    from yelp_hpc.training.loop import Training


def run(paths: RunPaths, config: Config) -> None:
    """Train the adapter, or go on where an earlier start stopped; does nothing when it is there.

    Raises:
        RequestError: prepare's files are missing, a setting cannot be met here, or the run
            directory holds another training.
        StageError: a rank failed, the training diverged, the disk is full.
        SavedForRequeue: asked to stop by a signal or a deadline; the state is saved.
    """
    check_request(paths, config)
    sweep(paths.root, paths.train, paths.adapter, paths.checkpoints)
    fingerprint = training_fingerprint(paths, config)
    if is_complete(paths.adapter):
        marker = read_marker(paths.adapter) or {}
        check_fingerprint(marker.get("fingerprint", {}), fingerprint, paths.adapter)
        _draw(paths)
        print(f"train: already done ({paths.adapter}, step {marker.get('step')})", file=sys.stderr)
        return
    from yelp_hpc.models.local import model_folder

    payload = {
        "run": str(paths.root),
        "config": config.model_dump(mode="json"),
        "model": str(model_folder(config.model)),
        "fingerprint": fingerprint,
    }
    command = own_module("yelp_hpc.stages.train")
    launch(command, json.dumps(payload).encode(), config.train.nproc, paths.logs)
    _draw(paths)


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
    train = config.train.model_dump(mode="json", exclude=set(FREE_TRAIN_SETTINGS))
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

    draw_loss(read_jsonl(log), picture)


# --- a rank -------------------------------------------------------------------------------------


def train_rank(payload: dict[str, Any], stop: StopRequest) -> None:
    """What each rank does: build, restore, train; rank 0 writes the adapter."""
    paths, config = RunPaths(payload["run"]), config_from_dict(payload["config"])
    import torch

    # New names that transformers 5.6 does not have yet.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    from yelp_hpc.ranks.world import join_world
    from yelp_hpc.training.checkpoint import read_checkpoint, write_adapter
    from yelp_hpc.training.log import truncate_log

    world = join_world(config)
    training = build(paths, config, Path(payload["model"]), payload["fingerprint"], world, stop)
    step = torch.tensor([-1], device=world.device)
    if world.first:
        training.store.sweep()
        folder, skipped = training.store.newest()
        for warning in skipped:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if folder is not None:
            found = read_json(folder / "state.json")
            check_fingerprint(found["fingerprint"], payload["fingerprint"], folder)
            step[0] = found["step"]
    if world.size > 1:
        torch.distributed.broadcast(step, 0)
    if int(step) >= 0:
        snapshot = read_checkpoint(paths.checkpoint(int(step)))
        # A matrix product may round otherwise with another number of threads.
        torch.set_num_threads(snapshot.state["threads"])
        training.restore(snapshot)
        if world.first:
            print(f"train: going on from step {int(step)}", file=sys.stderr, flush=True)
    if world.first:
        truncate_log(paths, max(int(step), 0), training.progress.pending is not None)
        training.board = _board(paths, config, training)
    training.run()
    if world.first:
        write_adapter(
            paths.adapter,
            training.adapter(),
            training.adapter_config,
            step=training.progress.step,
            best=training.progress.best,
            fingerprint=payload["fingerprint"],
        )
        print(f"train: done, adapter in {paths.adapter}", file=sys.stderr, flush=True)


def build(
    paths: RunPaths,
    config: Config,
    model_path: Path,
    fingerprint: dict[str, Any],
    world: World,
    stop: StopRequest,
) -> Training:
    """The model with its adapter, the optimizer, the schedule and the data, at step 0."""
    import torch
    from transformers.optimization import (
        get_constant_schedule_with_warmup,
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
    )

    from yelp_hpc.data.answer_tree import answer_tree, scored_answers
    from yelp_hpc.data.packing import DataPlan, largest_microbatch
    from yelp_hpc.models.load import load_model
    from yelp_hpc.models.packed.batch import prepare_model
    from yelp_hpc.models.packed.dropout import use_sequence_dropout
    from yelp_hpc.training.adapter import adapter_config, add_lora
    from yelp_hpc.training.checkpoint import CheckpointStore
    from yelp_hpc.training.data import read_rows
    from yelp_hpc.training.loop import Training

    settings = config.train
    tokens = read_json(paths.tokens)
    train, validation = (read_rows(paths.split(s), tokens) for s in ("train", "validation"))
    if not len(train):
        raise RequestError(f"{paths.split('train')} holds no rows")
    plan = DataPlan(
        len(train), settings.global_batch, settings.epochs, config.seed, settings.max_steps
    )
    model = add_lora(load_model(model_path, config.model.precision), config).to(world.device)
    dropout = use_sequence_dropout(model, config.seed)
    own = [train.own_length(row) for row in range(len(train))]
    tokens_at_once = largest_microbatch(
        plan, own, world.size, settings.max_tokens, train.prefix_length
    )
    if needs_checkpointing(model, config, world, tokens_at_once):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = prepare_model(model)
    if settings.compile:
        model.get_base_model().compile(dynamic=True)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    if settings.schedule == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, settings.warmup_steps)
    else:
        cosine = settings.schedule == "cosine"
        shape = get_cosine_schedule_with_warmup if cosine else get_linear_schedule_with_warmup
        schedule = shape(optimizer, settings.warmup_steps, plan.steps)
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
    )


def needs_checkpointing(model: Any, config: Config, world: World, tokens: int) -> bool:
    """Whether the layers' activations must be computed twice to fit the memory.

    `auto` estimates what the largest micro-batch of `tokens` keeps (about 20 hidden and 5
    intermediate vectors a token and layer) and compares it with 80 % of the free memory of the GPU
    or of this rank's share of the host.
    """
    import torch

    setting = config.train.gradient_checkpointing
    if setting != "auto":
        return setting == "on"
    shape = model.config
    hidden = shape.hidden_size
    layers = getattr(shape, "num_hidden_layers", None) or shape.num_layers
    inner = getattr(shape, "intermediate_size", None) or getattr(
        shape, "ffn_hidden_size", 4 * hidden
    )
    size = 4 if config.train.precision == "fp32" else 2
    wanted = tokens * layers * (20 * hidden + 5 * inner) * size
    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo") as file:  # noqa: PTH123 (no file of ours)
            found = [line for line in file if line.startswith("MemAvailable")]
        free = int(found[0].split()[1]) * 1024 if found else pages
        free //= config.train.nproc
    return bool(wanted > 0.8 * free)


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
