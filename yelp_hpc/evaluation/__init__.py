"""From predictions to counts, metrics, their uncertainty and the report; no torch."""
