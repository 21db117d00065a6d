"""What Slurm says of the site, and the settings that `init` makes of it."""
