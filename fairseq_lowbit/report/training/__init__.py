"""The curves of runs."""
