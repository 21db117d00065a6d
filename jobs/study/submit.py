"""Submit what a study still lacks: here one run after the other, on Slurm all at once.

On Slurm the trainings are one array; each run's other jobs are those of an ordinary chain, which
wait for their own task of it. What one run makes for others, they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from yelp_hpc.errors import (
    RequestError,
    SavedForRequeue,
    StageError,
    all_problems,
    first_line,
    problems_in,
)
from yelp_hpc.jobs import chain
from yelp_hpc.jobs.cluster import ClusterConfig
from yelp_hpc.jobs.container import with_inputs
from yelp_hpc.jobs.job import Job
from yelp_hpc.jobs.local import run_chain
from yelp_hpc.jobs.preflight import require_sound_request
from yelp_hpc.jobs.site.client import PATIENCE, require_clients
from yelp_hpc.jobs.submission import Live, Submission, living, sweep_pickles
from yelp_hpc.jobs.watch.follow import follow
from yelp_hpc.progress import say as tell
from yelp_hpc.rundir.files import read_object, sha256_file
from yelp_hpc.rundir.locks import locked
from yelp_hpc.rundir.manifest import Asked, check_asked
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.study import (
    Study,
    StudyRun,
    read_study,
    share,
    study_json,
    take_shared,
    write_study,
)
from yelp_hpc.runtime import use_programs

PARTS = {"prepare": "prepare", "base": "infer-base"}
"""Of `rundir.study.SHARED` → the job that makes it."""


@dataclass
class _Run:
    """One run on its way: what it lacks, what lives of it."""

    study: StudyRun
    paths: RunPaths
    asked: Asked
    cluster: ClusterConfig
    live: list[Live]

    def planned(self) -> list[Job]:
        """The jobs that are still to be submitted; what another run makes is not among them."""
        config = self.asked.loaded.config
        out = {PARTS[part] for part in self.study.takes} | {item.name for item in self.live}
        jobs = chain.plan("all", config, self.paths, self.cluster)
        return [job for job in jobs if job.stage != "publish" and job.name not in out]


def submit_study(
    study: Study,
    asked: Mapping[str, Asked],
    cluster: ClusterConfig,
    executor: str = "slurm",
    wait: bool = False,
    say: Callable[[str], None] = tell,
) -> None:
    """Have every run of a study made, and then its leaderboard; what is there is kept.

    Raises:
        RequestError: the name, the packages, the image, a model or the data of some run cannot be
            used, or a run was made with another configuration. Nothing was written then.
        StageError: locally or with `wait`: a run failed. The others were finished first.
        SavedForRequeue: locally: stopped by a signal after saving.
    """
    chain.checked_run(study.root)
    use_programs(cluster.programs)
    chain.refuse_unwritable(study.paths)
    if study.paths.run_json.exists():
        raise RequestError(f"{study.root} is a run directory; name another --out for the study")
    runs, problems = [], []
    for run in study.runs:
        paths, wanted = study.run(run), asked[run.name]
        try:
            own = with_inputs(cluster, wanted.loaded.config, paths.root)
            live = living(paths, PATIENCE) if paths.root.is_dir() else []
            check_asked(paths.root, wanted, chain.stages_of(live))
            one = _Run(run, paths, wanted, own, live)
            require_sound_request(one.planned(), wanted.loaded.config, own, executor)
            runs.append(one)
        except RequestError as error:
            problems += [line for line in problems_in(error) if line not in problems]
    if problems:
        raise RequestError(all_problems(f"the study {study.root} cannot be made:", problems))
    if executor == "slurm":
        require_clients(cluster.programs)
    with ExitStack() as at_work:
        at_work.enter_context(locked(study.paths.lock("study"), wait=0))
        if not study_json(study.root).exists() or _changed(study):
            write_study(study)
        for one in runs:
            one.asked.record(one.paths.root, chain.stages_of(one.live))
            share(one.paths, {part: study.run(run) for part, run in one.study.takes.items()})
        if executor == "local":
            _here(study, runs, cluster, say)
        else:
            submissions = _on_slurm(study, runs, cluster, say)
    if executor == "slurm" and wait and submissions:
        follow(study.paths, submissions[-1:], say)


def _changed(study: Study) -> bool:
    return read_study(study.root).runs != study.runs


def _here(
    study: Study, runs: list[_Run], cluster: ClusterConfig, say: Callable[[str], None]
) -> None:
    failed, did = [], False
    for number, one in enumerate(runs, 1):
        try:
            take_shared(one.paths)
            if not one.planned():
                continue
            did = True
            say(f"{one.study.name}: run {number} of {len(runs)}")
            config = one.asked.loaded.config
            chain.submit("all", one.paths.root, config, cluster, "local", say=say)
        except SavedForRequeue:
            raise
        except (StageError, RequestError) as error:
            failed.append(f"{one.study.name}: {first_line(error)}")
            say(f"{one.study.name}: failed, the others go on: {first_line(error)}")
    if not did and up_to_date(study):
        say("study: nothing to do, everything is there")
    elif len(failed) < len(runs):
        frozen, code = chain.freeze_all(study.paths, cluster)
        run_chain([Job("collect")], study.paths, cluster, frozen, code, say)
    if failed:
        raise StageError(all_problems("the rest of the study is done, but:", failed))


def up_to_date(study: Study) -> bool:
    """Whether the leaderboard was made of every run's figures as they are now."""
    try:
        made_of = read_object(study.leaderboard)["made_of"]
    except (StageError, KeyError):
        return False
    metrics = {run.name: study.run(run).metrics for run in study.runs}
    return bool(
        (study.root / "report.html").is_file()
        and all(path.is_file() for path in metrics.values())
        and made_of == {name: sha256_file(path) for name, path in metrics.items()}
    )


def _on_slurm(
    study: Study, runs: list[_Run], cluster: ClusterConfig, say: Callable[[str], None]
) -> list[Submission]:
    places = [study.paths, *(one.paths for one in runs)]
    submissions: list[Submission] = []
    with locked(study.paths.lock("submit")), chain.all_or_nothing(submissions, *places):
        for one in runs:
            take_shared(one.paths)
            one.live = living(one.paths, PATIENCE)
        own_live = living(study.paths, PATIENCE)
        planned = {one.study.name: one.planned() for one in runs}
        if not any(planned.values()):
            if any(one.live for one in runs) or any(x.name == "collect" for x in own_live):
                say("study: nothing to submit, what is missing is under way")
                return []
            if up_to_date(study):
                say("study: nothing to do, everything is there")
                return []
        sweep_pickles(study.paths)
        frozen, code = chain.freeze_all(study.paths, cluster)
        settings = {
            one.study.name: chain.freeze_all(one.paths, one.cluster)[0]
            for one in runs
            if planned[one.study.name]
        }
        ids = {one.study.name: chain.ids_here(one.live) for one in runs}

        def queue(one: _Run, job: Job) -> None:
            name = one.study.name
            of_makers = {
                PARTS[part]: ids[maker].get(PARTS[part], "")
                for part, maker in one.study.takes.items()
            }
            known = {**{k: v for k, v in of_makers.items() if v}, **ids[name]}
            submissions.append(
                chain.submit_job(job, one.paths, one.cluster, known, settings[name], code)
            )
            ids[name][job.name] = known[job.name]

        for one in runs:
            for job in planned[one.study.name]:
                if job.stage == "prepare":
                    queue(one, job)
        for before, group in _trainings(runs, planned, ids, cluster.max_array_size):
            array = Job("train", tasks=((),) * len(group), after=(("afterok", "prepare"),))
            known = {"prepare": before} if before else {}
            where = [(one.paths, settings[one.study.name]) for one in group]
            done = chain.submit_job(
                array, study.paths, group[0].cluster, known, frozen, code, where
            )
            submissions.append(done)
            say(f"train: job {done.job}, {len(group)} of the study's runs")
            for place, one in enumerate(group):
                task = f"{done.job}_{place}" if len(group) > 1 else done.job
                ids[one.study.name]["train"] = task
        for one in runs:
            for job in planned[one.study.name]:
                if job.stage not in ("prepare", "train"):
                    queue(one, job)
        last = tuple(("afterany", name) for name, found in ids.items() if "collect" in found)
        known = {name: ids[name]["collect"] for _, name in last}
        job = Job("collect", after=last)
        submissions.append(chain.submit_job(job, study.paths, cluster, known, frozen, code))
        say(f"{len(submissions)} jobs submitted; the leaderboard is job {submissions[-1].job}")
    return submissions


def _trainings(
    runs: list[_Run],
    planned: Mapping[str, list[Job]],
    ids: Mapping[str, Mapping[str, str]],
    largest: int,
) -> Iterator[tuple[str, list[_Run]]]:
    """The runs to be trained, by the prepare job that they wait for ("" for none)."""
    groups: dict[str, list[_Run]] = {}
    for one in runs:
        if any(job.stage == "train" for job in planned[one.study.name]):
            maker = one.study.takes.get("prepare", one.study.name)
            groups.setdefault(ids[maker].get("prepare", ""), []).append(one)
    for before, group in groups.items():
        for start in range(0, len(group), largest):
            yield before, group[start : start + largest]


def cancel_study(study: Study) -> list[str]:
    """Cancel every live job of the study and of its runs; returns their ids."""
    places = (study.paths, *(study.run(run) for run in study.runs))
    return chain.cancel(*(paths.root for paths in places if paths.root.is_dir()))
