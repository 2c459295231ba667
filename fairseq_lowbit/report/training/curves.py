"""What training left over its updates: the terms of the loss, the health of quantizers."""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.folder import PROGRESS_FILE, read_health, read_progress

_MOST_POINTS = 400


@dataclass
class Curve:
    """Values over updates, in rising order of the updates."""

    updates: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def thinned(self, most: int = _MOST_POINTS) -> "Curve":
        """At most ``most`` means of equally many neighbours, without values that are not finite."""
        points = [
            (update, value)
            for update, value in zip(self.updates, self.values, strict=True)
            if math.isfinite(value)
        ]
        size = max(1, math.ceil(len(points) / most))
        chunks = [points[start : start + size] for start in range(0, len(points), size)]
        return Curve(
            [chunk[-1][0] for chunk in chunks],
            [sum(value for _, value in chunk) / len(chunk) for chunk in chunks],
        )


@dataclass
class Training:
    """The loss terms of one run, or of one stage.

    Attributes:
        train: term -> curve, means over the logged intervals.
        valid: term -> curve on the first validation set, by which fairseq keeps the best.
    """

    train: dict[str, Curve] = field(default_factory=dict)
    valid: dict[str, Curve] = field(default_factory=dict)

    @property
    def terms(self) -> list[str]:
        """The total first, an accuracy last."""
        named = dict.fromkeys([*self.train, *self.valid])
        return sorted(named, key=lambda term: (term == "accuracy", term != "loss"))


@dataclass(frozen=True)
class HealthCurve:
    """A figure of all quantizers, or layers, at each recorded update.

    Attributes:
        worst: of the one that does worst, since a median hides it.
    """

    updates: tuple[int, ...]
    median: tuple[float, ...]
    worst: tuple[float, ...]


def read_training(folder: Path) -> Training:
    """The curves of a run, or of a stage of one.

    Args:
        folder: of its checkpoints.

    Raises:
        LowbitError: no progress is recorded there.
    """
    records = read_progress(folder)
    if not records:
        raise LowbitError(
            f"{folder} holds no {PROGRESS_FILE} with losses: no curves. A run of an earlier "
            "version has its losses in hydra_train.log only"
        )
    validations = [record for record in records if record["phase"] == "valid"]
    return Training(
        _curves(record for record in records if record["phase"] == "train"),
        _curves(v for v in validations if v["split"] == validations[0]["split"]),
    )


def _curves(records: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for record in records:
        for term in filter(_is_term, record["terms"]):
            curve = curves.setdefault(term, Curve())
            curve.updates.append(record["update"])
            curve.values.append(record["terms"][term])
    return curves


def _is_term(key: str) -> bool:
    is_loss = key == "loss" or key.startswith("loss_") or key.endswith("_loss")
    return is_loss or key == "accuracy"


def read_health_curves(folder: Path) -> dict[str, HealthCurve]:
    """The health of a run over its updates.

    Args:
        folder: of its checkpoints.

    Returns:
        ``sqnr_db``, ``clipped`` and ``levels_used`` of the quantizers, and ``centered_std`` of the
        layers; empty without records, without the first three for a model in float, and without
        the last for a task that does not know its layers.
    """
    rows: dict[str, list[tuple[float, ...]]] = {}
    for record in read_health(folder):
        with suppress(KeyError, TypeError, ValueError):
            for key, row in _health_rows(record).items():
                rows.setdefault(key, []).append((record["update"], *row))
    return {key: HealthCurve(*zip(*found, strict=True)) for key, found in rows.items()}


def _health_rows(record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Median and worst of what one record says."""
    rows = {}
    if layers := record["centered_std"]:
        rows["centered_std"] = (median(layers), min(layers))
    for key, worst in (("sqnr_db", min), ("clipped", max), ("levels_used", min)):
        if values := [entry[key] for entry in record["quantizers"]]:
            rows[key] = (median(values), worst(values))
    return rows
