"""Several runs: on the rows that they share, compared and ranked; no torch."""
