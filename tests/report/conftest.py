"""Runs as training leaves them, of models with random weights: see tests/evaluation/conftest.py."""

from pathlib import Path

from tests.evaluation.conftest import data, make_run, model, save, teacher

__all__ = ["data", "make_run", "model", "save", "teacher"]

_TERMS = ("loss", "loss_final", "loss_layers", "loss_attention")


def log_line(tag: str, message: str) -> str:
    return f"[2026-01-02 03:04:05,678][{tag}][INFO] - {message}\n"


def write_log(folder: Path, updates: int) -> None:
    """What fairseq logs of updates and one validation, with losses that fall."""
    lines = [log_line("fairseq_cli.train", "{'_name': None}")]
    for update in range(1, updates + 1):
        losses = [(term, 1 / update) for term in _TERMS]
        inner = ", ".join(f"{term}={value:.4g}" for term, value in losses)
        lines.append(
            log_line("train_inner", f"epoch 001:  {update:5d} / 99 {inner}, num_updates={update}")
        )
    valid = " | ".join(f"{term} {1.1 * value:.4g}" for term, value in losses)
    message = f"epoch 001 | valid on 'valid' subset | {valid} | num_updates {updates}"
    lines.append(log_line("valid", message))
    (folder / "hydra_train.log").write_text("".join(lines))
