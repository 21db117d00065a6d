"""yelp_hpc: fine-tune, evaluate and publish a review classifier as resumable Slurm jobs.

This package says WHAT a stage does; the sibling package `jobs` says WHERE it runs.
"""

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: nothing is imported for a start."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from yelp_hpc.own_files import version

    return version()
