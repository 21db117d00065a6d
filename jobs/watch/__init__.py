"""What is known of the jobs of a run, and how `--wait` follows them to their end."""
