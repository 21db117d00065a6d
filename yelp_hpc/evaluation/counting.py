"""What is kept of one model's answers while its shards stream by: counts, calibration, mistakes.

Reads the shards through `coverage`, a record batch at a time; a matrix of counts and a handful of
mistakes stay in memory, whatever the number of rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yelp_hpc.config import Config
from yelp_hpc.evaluation.coverage import Answers, Coverage
from yelp_hpc.evaluation.metrics import Calibration, Tally, softmax

_CHUNK = 1_000_000


@dataclass(frozen=True)
class Mistake:
    """A wrong or unparsed answer, before its texts are fetched."""

    severity: float
    position: int
    label: int
    prediction: int | None
    confidence: float | None
    path: Path


class Counting:
    """What is kept of one model's answers while its shards stream by."""

    def __init__(self, coverage: Coverage, config: Config) -> None:
        self.coverage = coverage
        self.classes = len(config.task.labels)
        self.ordinal = config.task.ordinal
        self.calibration = Calibration(config.collect.calibration_bins, self.classes)
        self.limit = config.collect.mistakes
        self.stray: Counter[tuple[int, int]] = Counter()
        self.mistakes: list[Mistake] = []
        self.unparsed: list[Mistake] = []

    def read(self) -> None:
        """Read every shard once."""
        for answers in self.coverage.read():
            self._take(answers)

    def _take(self, answers: Answers) -> None:
        outside = answers.codes == self.classes + 1
        if outside.any():
            pairs = zip(answers.labels[outside], answers.predictions[outside], strict=True)
            self.stray.update((int(label), int(value)) for label, value in pairs)
        confidence = np.zeros(len(answers.labels))
        if answers.scores is not None:
            probabilities = softmax(answers.scores)
            self.calibration.add(probabilities, answers.labels)
            confidence = probabilities.max(axis=1)
        distance = np.abs(answers.predictions - answers.labels)
        if not self.ordinal:
            distance = np.minimum(distance, 1)
        severity = np.where(answers.codes < self.classes, distance + confidence, 0.0)
        severity[distance == 0] = 0.0
        self.mistakes += self._worst(answers, severity, confidence)
        self.mistakes.sort(key=lambda mistake: (-mistake.severity, mistake.position))
        del self.mistakes[self.limit :]
        unparsed = np.flatnonzero(answers.codes == self.classes)
        first = unparsed[: max(0, 5 - len(self.unparsed))]
        self.unparsed += [self._mistake(answers, i, 0.0, None) for i in first]

    def _worst(self, answers: Answers, severity: Any, confidence: Any) -> list[Mistake]:
        count = min(self.limit, int((severity > 0).sum()))
        if not count:
            return []
        order = np.lexsort((answers.positions, -severity))[:count]
        scored = answers.scores is not None
        return [
            self._mistake(answers, i, float(severity[i]), float(confidence[i]) if scored else None)
            for i in order
        ]

    def _mistake(
        self, answers: Answers, i: Any, severity: float, confidence: float | None
    ) -> Mistake:
        unparsed = answers.codes[i] == self.classes
        prediction = None if unparsed else int(answers.predictions[i])
        position, label = int(answers.positions[i]), int(answers.labels[i])
        return Mistake(severity, position, label, prediction, confidence, answers.path)

    def tally(self) -> Tally:
        """The confusion counts of what was read."""
        values = tuple(sorted({value for _, value in self.stray}))
        own = self.classes + 1
        counts = np.zeros((self.classes, own + len(values)), dtype=np.int64)
        labels, codes = self.coverage.test.labels, self.coverage.codes
        for start in range(0, len(labels), _CHUNK):
            part = slice(start, start + _CHUNK)
            flat = labels[part].astype(np.int64) * (own + 1) + codes[part]
            cells = np.bincount(flat, minlength=self.classes * (own + 1))
            counts[:, :own] += cells.reshape(self.classes, -1)[:, :own]
        column = {value: own + i for i, value in enumerate(values)}
        for (label, value), count in self.stray.items():
            counts[label, column[value]] = count
        return Tally(counts, values)
