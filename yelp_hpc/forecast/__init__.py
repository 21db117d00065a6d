"""What a run will need: memory, FLOPs, time and disk, before anything is queued; no torch."""
