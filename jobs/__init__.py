"""WHERE a stage runs: submitit launchers, Slurm and Apptainer. Never imports torch."""
