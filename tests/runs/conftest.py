"""Models with random weights and a corpus to measure them on: see tests/evaluation/conftest.py."""

from tests.evaluation.conftest import batches, data, make_run, model, save, teacher

__all__ = ["batches", "data", "make_run", "model", "save", "teacher"]
