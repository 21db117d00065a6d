"""A study on this machine or on Slurm: many runs, what they share made once."""
