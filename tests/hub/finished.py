"""A finished run of the tiny model, made by the real stages where they are quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import make_model, prepare_run, tiny_config
from yelp_hpc.config import Config
from yelp_hpc.rundir.files import write_json, write_marker
from yelp_hpc.rundir.paths import RunPaths

BASE = "me/tiny-base"
REPO = "me/stars"


def settings(model: Path, base: str = BASE, **publish: Any) -> Config:
    """The run's configuration: the base model by its Hub id or folder, two shards a model."""
    config = tiny_config(
        model, infer={"shards": 2}, publish={"repo_id": REPO, "license": "mit", **publish}
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"path": base})})


def finish_run(root: Path, model: Path, base: str = BASE, **sizes: Any) -> RunPaths:
    """Prepare, a random adapter, real predictions, their metrics and run.json under `root`.

    `base`: what the configuration names the model in `model`; `sizes`: of that model.
    """
    import torch
    from peft import get_peft_model_state_dict

    from yelp_hpc.models.load import load_model
    from yelp_hpc.models.local import folder_fingerprint
    from yelp_hpc.stages import collect, infer
    from yelp_hpc.stages.train import training_fingerprint
    from yelp_hpc.training.adapter import adapter_config, add_lora

    make_model(model, **sizes)
    run = prepare_run(root, model)
    write_marker(
        run.prepare,
        ["train.parquet", "validation.parquet", "test.parquet", "tokens.json"],
        summary={"fingerprint": "0" * 64},
    )
    config = settings(model, base)
    write_json(
        run.run_json,
        {
            "config": {
                "file": "x.yaml",
                "given": config.model_dump(mode="json"),
                "overrides": [],
                "resolved": config.model_dump(mode="json"),
            },
            "seed": config.seed,
            "code": {"version": "0.1.0", "git_sha": "a" * 40, "dirty": False, "diff": None},
            "packages": {"torch": torch.__version__},
            "model": {
                "path": base,
                "revision": None,
                "folder": str(model),
                "fingerprint": folder_fingerprint(model),
            },
            "data": {
                "rows": {"train": 84, "validation": 20, "test": 25},
                "fingerprint": "0" * 64,
            },
            "image": None,
        },
    )
    adapted = add_lora(load_model(model, "fp32"), config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    from yelp_hpc.training.checkpoint import write_adapter

    write_adapter(
        run.adapter,
        get_peft_model_state_dict(adapted),
        adapter_config(adapted, config),
        step=11,
        best=None,
        fingerprint=training_fingerprint(run, config),
    )
    local = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(model)})}
    )
    for name in config.infer.models:
        infer.run(run, local, model=name)
    lines = [{"step": i, "loss": 2.0 / i} for i in range(1, 12)]
    run.train_log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.loss_png.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    collect.run(run, config)
    return run
