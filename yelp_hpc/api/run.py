"""`load_run`: the results of a run directory as Python objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yelp_hpc.api.classifier import Classifier
from yelp_hpc.config import Config
from yelp_hpc.errors import StageError, in_shell
from yelp_hpc.rundir import manifest
from yelp_hpc.rundir.files import read_object
from yelp_hpc.rundir.paths import RunPaths

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, repr=False)
class Run:
    """A run directory: what was asked for, and what came of it."""

    path: Path
    """The run directory."""
    config: Config
    """The configuration that it was made with."""

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of run.json: code, packages, image, model, data."""
        return read_object(RunPaths(self.path).run_json)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json: `metrics["models"]["tuned"]["f1"]["macro"]`.

        Raises:
            StageError: it is not there yet, or torn.
        """
        path = RunPaths(self.path).metrics
        if not path.is_file():
            raise StageError(
                f"{path} is not there yet; see "
                f"`python -m yelp_hpc status --run {in_shell(self.path)}`"
            )
        return read_object(path)

    @cached_property
    def predictions(self) -> pa.Table:
        """A row for each test row, as `export --predictions` writes them.

        `row`, `text` (the review), `truth`, `truth_name`, and each model's `MODEL_answer`,
        `MODEL_name`, `MODEL_p_LABEL` …; `.to_pandas()` makes a DataFrame.

        Raises:
            StageError: a row has no answer or two, or a shard cannot be used.
        """
        import pyarrow as pa

        from yelp_hpc.evaluation.joined import joined, joined_schema

        tables = list(joined(RunPaths(self.path), self.config))
        return pa.concat_tables(tables) if tables else joined_schema(self.config).empty_table()

    def classifier(self, model: str = "tuned") -> Classifier:
        """The run's model as a `Classifier`; raises as that does."""
        return Classifier(self.path, model)

    def __repr__(self) -> str:
        said = f"Run({str(self.path)!r}, {self.config.name}: {self.config.model.path}"
        try:
            models = self.metrics["models"]
            figures = [f"{name} {m['f1']['macro']:.3f}" for name, m in models.items()]
            said += f"; macro F1: {', '.join(figures)}"
        except (StageError, KeyError, TypeError, ValueError, AttributeError):
            said += "; no metrics yet"
        return f"{said})"


def load_run(path: str | Path) -> Run:
    """The run in a directory, done or not; nothing but run.json is read before it is asked for.

    Raises:
        RequestError: there is no run directory, or its run.json cannot be used.
    """
    run, config = manifest.load_run(path)
    return Run(run.root, config)
