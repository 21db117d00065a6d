"""The run directory: its paths, how its files are written, and a reader for each."""
