"""yelp_hpc: fine-tune, evaluate and publish a review classifier as resumable Slurm jobs.

In Python: `Classifier` answers for texts, `load_run` gives a run's results, `submit` submits. This
package says WHAT a stage does; the sibling package `jobs` says WHERE it runs.
"""

from importlib import import_module

TYPE_CHECKING = False  # `typing` would be looked for in the working directory first
if TYPE_CHECKING:
    from typing import Any

    from yelp_hpc.api.classifier import Classifier as Classifier
    from yelp_hpc.api.classifier import Prediction as Prediction
    from yelp_hpc.api.run import Run as Run
    from yelp_hpc.api.run import load_run as load_run
    from yelp_hpc.api.submission import Handle as Handle
    from yelp_hpc.api.submission import submit as submit

__version__: str

_PUBLIC = {
    "Classifier": "classifier",
    "Prediction": "classifier",
    "Run": "run",
    "load_run": "run",
    "Handle": "submission",
    "submit": "submission",
}
"""Name → its module in `yelp_hpc.api`."""
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> "Any":
    """A public name, looked up when it is asked for: nothing is imported for a start."""
    if name == "__version__":
        from yelp_hpc.own_files import version

        return version()
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"yelp_hpc.api.{_PUBLIC[name]}"), name)


def __dir__() -> "list[str]":
    return sorted({*globals(), *_PUBLIC})
