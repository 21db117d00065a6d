"""Whether a finished run holds what it says, and whether it can be had again."""
