"""yelp_hpc: fine-tune, evaluate and publish a review classifier as resumable Slurm jobs.

This package says WHAT a stage does; the sibling package `jobs` says WHERE it runs.
"""

__version__ = "0.1.0"
