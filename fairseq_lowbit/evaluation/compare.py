"""A comparison: a teacher, post-training quantization and trained students side by side."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fairseq_lowbit.evaluation.probe import Probe
from fairseq_lowbit.evaluation.quality import (
    Candidate,
    HeldOut,
    Quality,
    Reference,
)
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.models import LoadedModel

COMPARISON_FILE = "comparison.json"
TRAINED_FACTOR = 3.0
_SCORES = ("last-layer cosine", "SNR dB", "masked accuracy %")


@dataclass(frozen=True)
class Comparison:
    """Models measured on the same audio.

    Attributes:
        rows: the teacher first.
        untrained_probe: of a network of the teacher's shape with random weights.
    """

    rows: tuple[Quality, ...]
    untrained_probe: Probe | None

    @property
    def teacher(self) -> Quality:
        return self.rows[0]

    def findings(self) -> list[str]:
        """Sentences on what the comparison shows and what it does not."""
        notes = [*self._teacher_findings(), *_training_findings(self.rows)]
        if self.teacher.probe is not None:
            notes += _probe_findings(self.rows)
        return notes

    def _teacher_findings(self) -> list[str]:
        notes, masked, probe = [], self.teacher.masked, self.teacher.probe
        if masked is not None:
            factor = masked.accuracy / masked.chance
            verdict = "counts as trained" if factor >= TRAINED_FACTOR else "is NOT trained"
            notes.append(
                f"Teacher: masked accuracy is {factor:.1f} times the most frequent label's share "
                f"({masked.chance:.1%}); from {TRAINED_FACTOR:.0f} on it {verdict}."
            )
        if probe is not None and self.untrained_probe is not None:
            own, untrained = probe.mean[-1], self.untrained_probe.mean[-1]
            verdict = "beats" if own > untrained else "does NOT beat"
            notes.append(
                f"Teacher: its last layer's probe ({own:.1%}) {verdict} an untrained network's "
                f"({untrained:.1%})."
            )
        return notes

    def write(self, folder: Path) -> None:
        """:data:`COMPARISON_FILE` in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / COMPARISON_FILE) as file:
            json.dump({**asdict(self), "findings": self.findings()}, file, indent=1)


def compare(
    teacher: LoadedModel,
    candidates: Sequence[Candidate],
    held_out: HeldOut,
    progress: Callable[[str], None],
) -> Comparison:
    """Measures the teacher and every candidate.

    Args:
        progress: called with the name of each row before it is measured.

    Raises:
        LowbitError: a candidate whose layers are not those of the teacher.
    """
    reference = Reference(teacher, held_out)
    for candidate in candidates:
        reference.check_comparable(candidate)
    progress("FP teacher")
    rows = [reference.measure_teacher("FP teacher")]
    for candidate in candidates:
        progress(candidate.name)
        rows.append(reference.measure(candidate))
    progress("untrained network")
    return Comparison(tuple(rows), reference.measure_untrained())


def _training_findings(rows: Sequence[Quality]) -> list[str]:
    """Whether each trained model is better than the best calibrated one."""
    calibrated = [row for row in rows if row.is_calibrated_only]
    trained = [row for row in rows if row.agreement and not row.is_calibrated_only]
    notes = []
    for row in trained if calibrated else []:
        best = [max(values) for values in zip(*map(_scores, calibrated), strict=True)]
        verdicts = [
            f"{name} {own:.3g} {'beats' if own > other else 'does NOT beat'} {other:.3g}"
            for name, own, other in zip(_SCORES, _scores(row), best, strict=False)
        ]
        notes.append(f"{row.name} against the best PTQ: {', '.join(verdicts)}.")
    return notes


def _scores(row: Quality) -> list[float]:
    """The values of ``_SCORES``; without labels the last one is missing."""
    masked = [] if row.masked is None else [100 * row.masked.accuracy]
    return [row.agreement.cosine[-1], row.agreement.snr_db[-1], *masked]


def _probe_findings(rows: Sequence[Quality]) -> list[str]:
    """One sentence on neighbouring rows whose last layers the probe does not distinguish."""
    alike = []
    for first, second in pairwise(rows):
        gap = abs(first.probe.mean[-1] - second.probe.mean[-1])
        spread = float(np.hypot(first.probe.std[-1], second.probe.std[-1]))
        if gap <= 2 * spread:
            alike.append(f"{first.name} from {second.name} ({gap:.1%} apart, ±{2 * spread:.1%})")
    if not alike:
        return []
    return [f"At the last layer the word probe does not separate {'; '.join(alike)}."]
