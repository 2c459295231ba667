"""What training left over its updates: the loss terms in the log, the health of quantizers.

The log is what every run leaves, whatever else is switched off, and it needs no reader but this.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.folder import is_run, read_health

# Hydra's way to write a line, around fairseq's.
_LINE = re.compile(r"\[[^]]*\]\[(?P<tag>[^]]+)\]\[INFO\] - (?P<message>.*)")
_STAGE = re.compile(r"stage (?P<number>\d+) of (?P<of>\d+) \((?P<precision>\S+)\): \d+ updates")
_INNER, _EPOCH = "train_inner", "train"
_NOT_TERMS = ("loss_scale", "best_loss")
_MOST_POINTS = 400


@dataclass
class Curve:
    """Values over updates, in rising order of the updates."""

    updates: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, update: int, value: float) -> None:
        """Replaces what stands at and behind ``update``: a resumed run makes it once more."""
        while self.updates and self.updates[-1] >= update:
            self.updates.pop()
            self.values.pop()
        self.updates.append(update)
        self.values.append(value)

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
        train: term -> curve, means of the updates between two lines of the log.
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
class Band:
    """A figure of all quantizers, or layers, at each recorded update.

    Attributes:
        worst: of the one that does worst, since a median hides it.
    """

    updates: tuple[int, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    worst: tuple[float, ...]


def read_training(folder: Path) -> Training:
    """The curves of a run, or of a stage of one.

    Args:
        folder: see :func:`fairseq_lowbit.runs.folder.find_runs`.

    Raises:
        LowbitError: there is no log, or nothing about the training in it.
    """
    run = next((place for place in (folder, *folder.parents) if is_run(place)), folder)
    logs = sorted(run.glob("*.log"))
    if not logs:
        raise LowbitError(f"{run} holds no training log (hydra_train.log): no curves")
    lines = (line for log in logs for line in log.read_text(errors="replace").splitlines())
    stage = folder.name if folder != run else ""
    training = parse_log(lines).get(stage)
    if training is None:
        raise LowbitError(f"{logs[0]} holds no losses yet: no curves")
    return training


def parse_log(lines: Iterable[str]) -> dict[str, Training]:
    """The curves in a log of ``fairseq-hydra-train``, whose format is simple, json or tqdm.

    Returns:
        folder name of a stage (``stage1_bitla_w2a2``), empty for the last one and for a run without
        stages -> its curves. Stages without any are left out.
    """
    logged: dict[str, dict[str, dict[str, Curve]]] = {}
    stage = ""
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        begun = _STAGE.match(match["message"])
        if begun:
            is_last = begun["number"] == begun["of"]
            stage = "" if is_last else f"stage{begun['number']}_{begun['precision']}"
        values = _values(match["tag"], match["message"])
        if values and "num_updates" in values:
            curves = logged.setdefault(stage, {}).setdefault(match["tag"], {})
            for term in filter(_is_term, values):
                curves.setdefault(term, Curve()).add(int(values["num_updates"]), values[term])
    trainings = {stage: _training(tags) for stage, tags in logged.items()}
    return {stage: training for stage, training in trainings.items() if training.terms}


def _training(tags: Mapping[str, dict[str, Curve]]) -> Training:
    # Without lines within an epoch, as beside a progress bar, the means of epochs have to do.
    train = tags.get(_INNER) or tags.get(_EPOCH, {})
    valid = next((curves for tag, curves in tags.items() if tag not in (_INNER, _EPOCH)), {})
    return Training(train, valid)


def _values(tag: str, message: str) -> dict[str, float]:
    """The numbers of a line; empty for a line that is not about the training."""
    if message.startswith("{"):
        with suppress(json.JSONDecodeError):
            pairs = json.loads(message).items()
            return _numbers((key.removeprefix(f"{tag}_"), value) for key, value in pairs)
        return {}
    if not message.startswith("epoch "):
        return {}
    if " | " in message:
        return _numbers(text.split(" ", 1) for text in message.split(" | ") if text.count(" ") == 1)
    return _numbers(re.findall(r"(\w+)=([^,\s]+)", message))


def _numbers(pairs: Iterable[Sequence[Any]]) -> dict[str, float]:
    numbers = {}
    for key, value in pairs:
        with suppress(TypeError, ValueError):
            numbers[key] = float(value)
    return numbers


def _is_term(key: str) -> bool:
    is_loss = key == "loss" or key.startswith("loss_") or key.endswith("_loss")
    return key == "accuracy" or (is_loss and key not in _NOT_TERMS)


def read_bands(folder: Path) -> dict[str, Band]:
    """The health of a run over its updates.

    Args:
        folder: of its checkpoints.

    Returns:
        ``sqnr_db``, ``clipped`` and ``levels_used``, each with median and quartiles of all
        quantizers, and ``centered_std`` with median and extremes of the layers; empty without
        records, without the first three for a model in float, and without the last for a task
        that does not know its layers.
    """
    rows: dict[str, list[tuple[float, ...]]] = {}
    for record in read_health(folder):
        with suppress(KeyError, TypeError, ValueError):
            for key, row in _health_rows(record).items():
                rows.setdefault(key, []).append((record["update"], *row))
    return {key: Band(*zip(*found, strict=True)) for key, found in rows.items()}


def _health_rows(record: dict[str, Any]) -> dict[str, tuple[float, float, float, float]]:
    """Middle, low, high and worst of what one record says."""
    rows = {}
    if layers := record["centered_std"]:
        rows["centered_std"] = (median(layers), min(layers), max(layers), min(layers))
    for key, worst in (("sqnr_db", min), ("clipped", max), ("levels_used", min)):
        values = [entry[key] for entry in record["quantizers"]]
        if len(values) > 1:
            low, middle, high = quantiles(values, n=4, method="inclusive")
            rows[key] = (middle, low, high, worst(values))
    return rows
