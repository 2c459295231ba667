"""Training runs on disk: a run folder's layout and marks, reading and comparing runs."""
