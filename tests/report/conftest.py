"""Runs as training leaves them, of models with random weights: see tests/evaluation/conftest.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairseq_lowbit.evaluation.quality import Quality
from fairseq_lowbit.runs.collection import FIELDS
from fairseq_lowbit.runs.columns import ModelRecord
from tests.evaluation.conftest import data, make_run, model, save, teacher

__all__ = ["data", "make_run", "model", "save", "teacher"]

_TERMS = ("loss", "loss_final", "loss_layers", "loss_attention")


def progress(phase: str, update: int, terms: Mapping[str, float], split: str | None = None) -> str:
    """A line of progress.jsonl, as far as a report reads it."""
    record = {"update": update, "phase": phase, "split": split or phase, "terms": terms}
    return json.dumps(record) + "\n"


def write_progress(folder: Path, updates: int) -> None:
    """What a run in ``folder`` records of updates and one validation, with losses that fall."""
    lines = [
        progress("train", update, dict.fromkeys(_TERMS, 1 / update))
        for update in range(1, updates + 1)
    ]
    lines.append(progress("valid", updates, dict.fromkeys(_TERMS, 1.1 / updates)))
    (folder / "checkpoints" / "progress.jsonl").write_text("".join(lines))


def record_of(quality: Quality, **known: Any) -> ModelRecord:
    """A row of the report of a measured model, with what else is known of it."""
    return dict.fromkeys(FIELDS) | {"name": quality.name} | known | quality.figures()
