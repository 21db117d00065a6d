"""Processes of one training: started, connected, stopped together."""
