"""Runs as training leaves them, of models with random weights: see tests/evaluation/conftest.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fairseq_lowbit.models import Hubert
from tests.evaluation.conftest import data, make_run, model, save, teacher

__all__ = ["data", "make_run", "model", "save", "teacher"]

_TERMS = ("loss", "loss_final", "loss_layers", "loss_attention")


def log_line(tag: str, message: str) -> str:
    return f"[2026-01-02 03:04:05,678][{tag}][INFO] - {message}\n"


def write_log(folder: Path, updates: int, level: float = 1.0) -> None:
    """What fairseq logs, with losses that fall from ``level``."""
    lines = [log_line("fairseq_cli.train", "{'_name': None}")]
    for update in range(1, updates + 1):
        losses = [(term, level / update) for term in _TERMS]
        inner = ", ".join(f"{term}={value:.4g}" for term, value in losses)
        lines.append(
            log_line("train_inner", f"epoch 001:  {update:5d} / 99 {inner}, num_updates={update}")
        )
    valid = " | ".join(f"{term} {1.1 * value:.4g}" for term, value in losses)
    message = f"epoch 001 | valid on 'valid' subset | {valid} | num_updates {updates}"
    lines.append(log_line("valid", message))
    (folder / "hydra_train.log").write_text("".join(lines))


def write_health(folder: Path, model: Hubert, updates: int) -> None:
    """Records of every fifth update."""

    quantized = [e.module for e in model.plan.entries if e.is_quantized]
    with open(folder / "checkpoints" / "health.jsonl", "w") as file:
        for update in range(0, updates + 1, 5):
            entries = [
                {"name": name, "bits": 2, "sqnr_db": 5.0, "clipped": 0.1, "levels_used": 1.0}
                for name in quantized
            ]
            record = {"update": update, "quantizers": entries, "centered_std": [0.9, 0.8]}
            file.write(json.dumps(record) + "\n")


@pytest.fixture
def make_trained(make_run: Callable[..., Path]) -> Callable[..., Path]:
    """``make_run`` with a log and health records."""

    def make(name: str, model: Hubert, level: float = 1.0, **settings: object) -> Path:
        folder = make_run(name, model, **settings)
        write_log(folder, 10, level)
        write_health(folder, model, 10)
        return folder

    return make
