"""One self-contained page about runs and checkpoints: tables, curves and the insides of models."""
