"""Rows, prompts and the plan of which row is computed when and where."""
