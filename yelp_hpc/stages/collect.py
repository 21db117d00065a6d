"""collect: every prediction checked and counted, then metrics.json and report.html.

Reads `prepare/test.parquet`, `infer/{base,tuned}/shard-*.parquet`, and for the report page
`train/log.jsonl`, `submissions.jsonl`, `logs/attempts/` and `run.json`. Refuses to compute anything
before every test row is there exactly once for each model that the config names. No torch here.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from yelp_hpc.config import Config
from yelp_hpc.errors import StageError, all_problems
from yelp_hpc.evaluation.examples import examples_of
from yelp_hpc.evaluation.measure import measure
from yelp_hpc.evaluation.outcome import print_outcome
from yelp_hpc.progress import say
from yelp_hpc.rundir import earlier
from yelp_hpc.rundir.collected import write_collected
from yelp_hpc.rundir.files import sweep, write_bytes, write_json
from yelp_hpc.rundir.paths import RunPaths
from yelp_hpc.rundir.study import Study


def run(paths: RunPaths, config: Config) -> None:
    """Collect and print the table of base against tuned, also where nothing can be written.

    Raises:
        StageError: as `compute` and `write_collected` do.
    """
    if paths.request.is_file():  # answers that were asked for, not an evaluation
        from yelp_hpc.stages import predict

        predict.collect(paths, config)
        return
    metrics, page = compute(paths, config)
    try:  # first: whoever reads the table may stop reading (`| head`)
        write_collected(paths, metrics, page)
    finally:
        print_outcome(metrics, config.data.model_dump())
    say(f"wrote {paths.metrics} and {paths.report}")


def collect(paths: RunPaths, config: Config) -> dict[str, Any]:
    """Check coverage, compute every statistic, write metrics.json and report.html.

    Returns:
        The content of metrics.json. It depends on predictions and config alone, so that computing
        it again from the same shards gives the same bytes.

    Raises:
        StageError: as `compute` and `write_collected` do.
    """
    metrics, page = compute(paths, config)
    write_collected(paths, metrics, page)
    return metrics


def compute(paths: RunPaths, config: Config) -> tuple[dict[str, Any], str]:
    """The content of metrics.json and of report.html; neither is written.

    Raises:
        StageError: a test row is missing or doubled, a shard is torn or of another test set; the
            message names them and the commands that mend it.
    """
    from yelp_hpc.evaluation.report import report_page

    sweep(paths.root)
    with suppress(OSError):  # a folder that one may only read: they are read where they lie
        earlier.move_in(paths)
    metrics, counted = measure(paths, config)
    examples = {name: examples_of(paths, counting) for name, counting in counted.items()}
    return metrics, report_page(paths, metrics, examples)


def run_study(study: Study) -> None:
    """Rank a study's trials and print the leaderboard.

    Raises:
        StageError: no run is finished; or, once what is finished was ranked, that some are not.
    """
    from yelp_hpc.evaluation.across.leaderboard_shown import print_leaderboard

    found = rank(study)
    print_leaderboard(found)
    say(f"wrote {study.leaderboard} and {study.paths.report}")
    if found["unfinished"]:
        problems = [f"{name}: {why}" for name, why in found["unfinished"].items()]
        raise StageError(all_problems("these runs of the study are not finished:", problems))


def rank(study: Study) -> dict[str, Any]:
    """Compute a study's leaderboard of what is finished; write leaderboard.json and report.html.

    Raises:
        StageError: no run is finished.
    """
    from yelp_hpc.evaluation.across.leaderboard import leaderboard
    from yelp_hpc.evaluation.across.leaderboard_shown import leaderboard_page

    sweep(study.root)
    found = leaderboard(study)
    write_bytes(study.paths.report, leaderboard_page(found).encode())
    write_json(study.leaderboard, found)
    return found
