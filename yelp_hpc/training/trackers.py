"""The curves of a training in the trackers that people use, written from `train/log.jsonl`.

Reads the log and run.json; writes `trackers/NAME/`, anew each time: one run of the tracker for one
run directory, however often the training was requeued. Needs the tracker's own package alone, no
torch: it runs on the host. Nothing is sent anywhere.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from yelp_hpc.config import Config, Tracker
from yelp_hpc.errors import RequestError, StageError, all_problems, first_line
from yelp_hpc.own_files import pip_install
from yelp_hpc.rundir.files import read_json, remove, write_json
from yelp_hpc.rundir.paths import TRACKERS, RunPaths
from yelp_hpc.rundir.record import training_log

Line = Mapping[str, float]
Writer = Callable[[Path, str, str, Config, Sequence[tuple[int, Line]]], None]
"""Writes into a new folder: the run's id, its name, its configuration, `(step, scalars)`."""


def scalars(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, Line]]:
    """`(step, name → number)` of each line of the log, in the order of the steps."""
    found = {}
    for line in log:
        if type(line.get("step")) is int:
            numbers = {k: float(v) for k, v in line.items() if type(v) in (int, float)}
            found[line["step"]] = {f"train/{k}": v for k, v in numbers.items() if k != "step"}
    return sorted(found.items())


def missing(names: Sequence[str]) -> list[str]:
    """What to say of each tracker whose package is not installed here."""
    return [
        f"{name} needs a package: {pip_install(PACKAGES[name][1])}"
        for name in names
        if importlib.util.find_spec(PACKAGES[name][0]) is None
    ]


def track(run: RunPaths, config: Config, names: Sequence[str]) -> Iterator[str]:
    """Write the training's curves for each of `names`; yields where, and how to look at them.

    Raises:
        RequestError: a package is not installed, or there is no step yet.
        StageError: a tracker failed; its first line is named.
    """
    if problems := missing(names):
        raise RequestError(all_problems("these trackers cannot be written:", problems))
    lines = scalars(training_log(run))
    if not lines:
        raise RequestError(f"{run.train_log} has no step yet; training writes one at a time")
    title = f"{config.name} {run.root.name}"
    for name in names:
        folder = run.tracker(name)
        try:
            remove(folder)
            folder.mkdir(parents=True)
            _WRITERS[name](folder, _identity(run), title, config, lines)
        except Exception as error:  # whatever a tracker's package raises
            raise StageError(f"{name} could not write {folder}: {first_line(error)}") from error
        yield f"{name}: {len(lines)} steps\n  {PACKAGES[name][2].format(shlex.quote(str(folder)))}"


def _identity(run: RunPaths) -> str:
    """The run's id in every tracker, drawn once."""
    with suppress(StageError, KeyError, TypeError):
        return str(read_json(run.tracker("id.json"))["id"])
    made = uuid.uuid4().hex[:12]
    write_json(run.tracker("id.json"), {"id": made})
    return made


def _settings(config: Config) -> dict[str, Any]:
    """What is shown beside the curves: all that a result depends on, and no place of a token."""
    return config.model_dump(mode="json", exclude={"publish"})


def _tensorboard(
    folder: Path, identity: str, title: str, config: Config, lines: Sequence[tuple[int, Line]]
) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step, values in lines:
        value = [Summary.Value(tag=tag, simple_value=number) for tag, number in values.items()]
        writer.add_event(Event(step=step, summary=Summary(value=value)))
    writer.close()


def _wandb(
    folder: Path, identity: str, title: str, config: Config, lines: Sequence[tuple[int, Line]]
) -> None:
    import wandb

    run = wandb.init(
        project=config.name,
        id=identity,
        name=title,
        dir=str(folder),
        mode="offline",
        config=_settings(config),
        settings=wandb.Settings(
            console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True
        ),
    )
    for step, values in lines:
        run.log(dict(values), step=step)
    run.finish()


def _trackio(
    folder: Path, identity: str, title: str, config: Config, lines: Sequence[tuple[int, Line]]
) -> None:
    os.environ["TRACKIO_DIR"] = str(folder)  # read when the package is imported
    import trackio

    run = trackio.init(
        project=config.name,
        name=f"{title} {identity}",
        config=_settings(config),
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for step, values in lines:
        run.log(dict(values), step=step)
    run.finish()


def _mlflow(
    folder: Path, identity: str, title: str, config: Config, lines: Sequence[tuple[int, Line]]
) -> None:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    experiment = client.create_experiment(config.name)
    run = client.create_run(experiment, run_name=title, tags={"yelp_hpc.run": identity})
    values = _settings(config)
    params = [
        Param(f"{s}.{k}", str(v)[:500]) for s in ("train", "lora") for k, v in values[s].items()
    ]
    client.log_batch(run.info.run_id, params=params)
    metrics = [Metric(k, v, 0, step) for step, numbers in lines for k, v in numbers.items()]
    for start in range(0, len(metrics), 1000):  # as many as it takes at once
        client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
    client.set_terminated(run.info.run_id)


_WRITERS: dict[str, Writer] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard", "tensorboard --logdir {}"),
    "wandb": ("wandb", "wandb", "wandb sync {}/wandb/offline-run-*"),
    "trackio": ("trackio", "trackio", "TRACKIO_DIR={} trackio show"),
    "mlflow": ("mlflow", "mlflow-skinny", "mlflow ui --backend-store-uri {}"),
}
"""Tracker → the module, the package that brings it, and the command that shows what was written."""

assert set(TRACKERS) == set(_WRITERS) == set(PACKAGES) == set(get_args(Tracker))
