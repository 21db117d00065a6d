"""What is kept of a model's answers while its shards stream by, counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fabricated import config_of, write_shards, write_test_set
from yelp_hpc.config import Config
from yelp_hpc.evaluation.counting import Counting
from yelp_hpc.evaluation.coverage import Coverage, read_test_set
from yelp_hpc.rundir.paths import RunPaths

LABELS = [0, 4, 2, 1, 3, 0, 4, 2, 1, 3, 0, 4]
ANSWERS: list[int | None] = [None, 4, 7, None, None, 4, None, 3, 7, -1, None, None]
"""Over three shards of four rows: five unparsed and one more, three that are no class."""


def counted(
    folder: Path,
    answers: list[int | None],
    scores: list[list[float]] | None = None,
    mistakes: int = 3,
    ordinal: bool = True,
) -> Counting:
    run, config = RunPaths(folder), config_of(shards=3)
    collect = config.collect.model_copy(update={"mistakes": mistakes})
    task = config.task.model_copy(update={"ordinal": ordinal})
    config = Config.model_construct(**{**dict(config), "collect": collect, "task": task})
    write_test_set(run, LABELS)
    write_shards(run, "tuned", LABELS, answers, 3, scores)
    coverage = Coverage(run, "tuned", 3, read_test_set(run.split("test")))
    counting = Counting(coverage, config)
    counting.read()
    assert coverage.problems() == []
    return counting


@pytest.mark.parametrize("chunk", [5, 1_000_000])
def test_written_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("yelp_hpc.evaluation.counting._CHUNK", chunk)
    counting = counted(tmp_path, ANSWERS)
    found = counting.tally()
    assert found.stray == (-1, 7)
    expected = np.zeros((5, 8), dtype=np.int64)  # classes, unparsed, -1, 7
    for label, answer in zip(LABELS, ANSWERS, strict=True):
        column = {None: 5, -1: 6, 7: 7}.get(answer, answer)
        expected[label, column] += 1
    assert np.array_equal(found.counts, expected)
    assert (found.rows, found.unparsed, found.classes) == (12, 6, 5)
    # the first five that could not be read, over all shards
    unread = [(m.position, m.label, m.prediction, m.confidence) for m in counting.unparsed]
    assert unread == [(i, LABELS[i], None, None) for i in (0, 3, 4, 6, 10)]
    # the farthest first; an answer that is no class is no distance away
    wrong = [(m.position, m.label, m.prediction, m.severity) for m in counting.mistakes]
    assert wrong == [(5, 0, 4, 4.0), (7, 2, 3, 1.0)]
    assert all(m.confidence is None for m in counting.mistakes)
    assert [m.path.name[:10] for m in counting.mistakes] == ["shard-0001"] * 2
    assert counting.calibration.summary() is None


def scored(answers: list[int], sure: float) -> list[list[float]]:
    """Logits of which the answer's alone is high: the later, the surer."""
    return [[sure * (i + 1) * (c == a) for c in range(5)] for i, a in enumerate(answers)]


def test_scored_answers_are_told_by_distance_and_then_by_how_sure_they_were(
    tmp_path: Path,
) -> None:
    answers = [4, 4, 1, 3, 3, 1, 0, 2, 0, 3, 4, 0]
    counting = counted(tmp_path / "a", [*answers], scored(answers, 0.1))
    worst = [11, 10, 6]  # four apart: the surest of them first
    assert [m.position for m in counting.mistakes] == worst
    for mistake in counting.mistakes:
        high = np.exp(0.1 * (mistake.position + 1))
        assert mistake.confidence == pytest.approx(high / (high + 4))
        assert mistake.severity == pytest.approx(4 + high / (high + 4))
        assert mistake.prediction == answers[mistake.position]
    assert counting.calibration.rows.sum() == 12
    # classes without an order: any wrong answer is one away
    plain = counted(tmp_path / "b", [*answers], scored(answers, 0.1), 20, ordinal=False)
    wrong = [i for i, (a, b) in enumerate(zip(LABELS, answers, strict=True)) if a != b]
    assert [m.position for m in plain.mistakes] == wrong[::-1]
    assert all(1 < m.severity < 2 for m in plain.mistakes)
    # of equal ones the first rows of the test set
    even = counted(tmp_path / "c", [*answers], scored(answers, 0.0), 20, ordinal=False)
    assert [m.position for m in even.mistakes] == wrong
    none = counted(tmp_path / "d", [*answers], scored(answers, 0.1), 0)
    assert none.mistakes == []
