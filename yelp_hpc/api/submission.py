"""`submit`: the command of that name as a function, and a handle on what it submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yelp_hpc.api.run import Run, load_run
from yelp_hpc.config import Config, LoadedConfig, load_config
from yelp_hpc.errors import RequestError, StageError, in_shell
from yelp_hpc.jobs import chain
from yelp_hpc.jobs.cluster import ClusterConfig, load_cluster
from yelp_hpc.jobs.status import WORST_FIRST, JobStatus, collect_status, render
from yelp_hpc.jobs.submission import Submission
from yelp_hpc.jobs.watch.follow import follow
from yelp_hpc.progress import say
from yelp_hpc.rundir import manifest
from yelp_hpc.rundir.manifest import Asked
from yelp_hpc.rundir.paths import STAGES, RunPaths
from yelp_hpc.settings import check_values


@dataclass(frozen=True, repr=False)
class Status:
    """The state of a run, as `python -m yelp_hpc status` shows it."""

    stages: tuple[JobStatus, ...]
    slurm: str = ""
    """Why Slurm did not answer, if it did not."""

    @property
    def state(self) -> str:
        """`done`, or the worst of the stages: failed, cancelled, stopped, running, waiting."""
        states = {stage.state for stage in self.stages}
        return next((state for state in (*WORST_FIRST, "absent") if state in states), "done")

    def __repr__(self) -> str:
        return render(self.stages, self.slurm)


@dataclass(frozen=True, repr=False)
class Handle:
    """What `submit` submitted. It keeps nothing in memory: another process may make it anew."""

    path: Path
    """The run directory."""
    stage: str
    """What was asked for: a stage, or all."""
    jobs: tuple[Submission, ...] = ()
    """The jobs of this submission; none when there was nothing to do."""

    def status(self) -> Status:
        """The state of each stage, from the markers first, then Slurm."""
        _, config = manifest.load_run(self.path)
        lines, problem = collect_status(self.path, config)
        return Status(tuple(lines), problem)

    def wait(self) -> Handle:
        """Wait until every job has ended; returns itself.

        Raises:
            RequestError: the first job that failed refused its input.
            SavedForRequeue: what did not end saved its state and was stopped; no job failed.
            StageError: a job failed, was lost, or never can start.
        """
        queued = [job for job in self.jobs if not job.job.startswith("local-")]
        if queued:
            follow(RunPaths(self.path), queued, say)
        return self

    def result(self) -> Run:
        """Wait, and give the run.

        Raises:
            RequestError, SavedForRequeue: as `wait`.
            StageError: as `wait`; or a stage of this submission is not done.
        """
        self.wait()
        lacking = [
            f"{line.name} ({line.state})"
            for line in self.status().stages
            if line.state != "done" and self.stage in ("all", line.name.partition("-")[0])
        ]
        if lacking:
            raise StageError(
                f"not done: {', '.join(lacking)}; see "
                f"`python -m yelp_hpc logs --run {in_shell(self.path)}`"
            )
        return load_run(self.path)

    def cancel(self) -> list[str]:
        """Cancel every live job of the run; returns their ids. What is done is kept.

        Raises:
            StageError: the Slurm controller does not answer.
        """
        return chain.cancel(self.path)

    def __repr__(self) -> str:
        jobs = ", ".join(f"{job.name} {job.job}" for job in self.jobs) or "nothing was to be done"
        return f"Handle({str(self.path)!r}, {self.stage}: {jobs})"


def submit(
    config: str | Path | Config | Mapping[str, Any],
    run: str | Path,
    stage: str = "all",
    *,
    overrides: Sequence[str] = (),
    cluster: str | Path | ClusterConfig | None = None,
    executor: str = "slurm",
) -> Handle:
    """Submit what is still to be done of a stage, or of all of them.

    On Slurm this returns at once; with the executor `local` the stages run here, to their end.

    Args:
        config: a YAML file, the name of a packaged one (`demo`), or its content.
        run: the run directory.
        stage: prepare, train, infer, collect, publish or all.
        overrides: `section.key=value`, as `--set` takes them.
        cluster: a cluster file, the name of a packaged one, or its content; None: its defaults.
        executor: slurm or local.

    Raises:
        RequestError: the request is wrong; the message has every problem, nothing was written.
            Locally: a stage refused its input.
        StageError: the controller does not answer; locally: a stage failed.
        SavedForRequeue: locally: stopped by a signal after saving.
    """
    if stage not in (*STAGES, "all"):
        raise RequestError(f"stage is {stage!r}: one of {', '.join((*STAGES, 'all'))}")
    if executor not in ("slurm", "local"):
        raise RequestError(f"executor is {executor!r}: slurm or local")
    if isinstance(config, str | Path):
        file, loaded = str(config), load_config(config, overrides)
    else:
        if overrides:
            raise RequestError("overrides belong to a config file; change the config that is given")
        file, loaded = "(Python)", _loaded(config)
    settings = cluster if isinstance(cluster, ClusterConfig) else load_cluster(cluster)
    path = Path(run).expanduser().resolve()
    jobs = chain.submit(
        stage,
        path,
        loaded.config,
        settings,
        executor=executor,
        asked=Asked(loaded, file, overrides),
    )
    return Handle(path, stage, tuple(jobs))


def _loaded(config: Config | Mapping[str, Any]) -> LoadedConfig:
    if isinstance(config, Config):
        return LoadedConfig(config, config.model_dump(mode="json"), {})
    return LoadedConfig(check_values(Config, dict(config), Path("config")), dict(config), {})
