"""The tuned model as one folder that needs no PEFT: base weights with the adapter added in.

Reads the base model's folder and `train/adapter/`; writes a model folder (safetensors, config,
tokenizer) that any tool loads, with the public record of the run, by which `Classifier` knows the
prompt and the labels.
"""

from __future__ import annotations

from pathlib import Path

from yelp_hpc.config import Config
from yelp_hpc.errors import RequestError, all_problems
from yelp_hpc.models.local import TOKENIZER_FILES
from yelp_hpc.publishing.public import allowed_folders, public_record, refuse_links
from yelp_hpc.rundir.files import (
    atomic_folder,
    damaged_files,
    read_object,
    sweep,
    write_json,
    write_marker,
)
from yelp_hpc.rundir.paths import RunPaths


def export_merged(run: RunPaths, config: Config, out: Path) -> None:
    """Write the merged model of a finished training to `out`, which must be new or empty.

    The sum `W + scaling * B A` is computed in fp32 and stored in model.precision; in fp32 the
    logits are those of the adapter on its base but for rounding.

    Raises:
        RequestError: the adapter is not there, damaged or none to merge, `out` holds something, or
            a link puts a file of the tokenizer elsewhere.
        StageError: the folder cannot be written.
    """
    problems = damaged_files(run.adapter)
    if problems:
        raise RequestError(all_problems("there is no whole adapter to merge; run train:", problems))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is there already and not empty; name a new folder")
    import torch

    from yelp_hpc.inference.predictor import with_adapter
    from yelp_hpc.models.load import TORCH_DTYPES, load_model, load_tokenizer
    from yelp_hpc.models.local import model_folder

    base = model_folder(config.model)
    copied = {name: base / name for name in TOKENIZER_FILES if (base / name).is_file()}
    refuse_links(copied, allowed_folders(run.root, base))
    model = with_adapter(load_model(base, torch.float32), run.adapter, merge=True)
    model = model.to(TORCH_DTYPES[config.model.precision])
    sweep(out.absolute().parent)
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        load_tokenizer(base).save_pretrained(temporary)
        record = read_object(run.run_json) if run.run_json.is_file() else {}
        write_json(temporary / run.run_json.name, public_record(record, config))
        write_marker(
            temporary,
            [path.name for path in temporary.iterdir()],
            base=config.model.path,
            revision=config.model.revision,
        )
