"""A comparison: a teacher, post-training quantization and trained students side by side."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.evaluation.probing.tasks import MEASURES, Measure
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
# Pairs of rows that a sentence names.
_NAMED = 3
_SCORES = ("last-layer cosine", "SNR dB", "masked accuracy %")


@dataclass(frozen=True)
class Comparison:
    """Models measured on the same audio.

    Attributes:
        rows: the teacher first.
        untrained_probes: of a network of the teacher's shape with random weights.
    """

    rows: tuple[Quality, ...]
    untrained_probes: dict[str, Probe]

    @property
    def teacher(self) -> Quality:
        return self.rows[0]

    def findings(self) -> list[str]:
        """Sentences on what the comparison shows and what it does not."""
        training = _training_findings(self.rows)
        return [*self._teacher_findings(), *training, *_probe_findings(self.rows)]

    def _teacher_findings(self) -> list[str]:
        notes, masked = [], self.teacher.masked
        if masked is not None:
            factor = masked.accuracy / masked.chance
            verdict = "counts as trained" if factor >= TRAINED_FACTOR else "is NOT trained"
            notes.append(
                f"Teacher: masked accuracy is {factor:.1f} times the most frequent label's share "
                f"({masked.chance:.1%}); from {TRAINED_FACTOR:.0f} on it {verdict}."
            )
        known = [measure for measure in MEASURES if measure.key in self.untrained_probes]
        worse = [text for measure in known if (text := self._not_beaten(measure))]
        if worse:
            notes.append(f"Teacher: does NOT beat an untrained network in {', '.join(worse)}.")
        elif known:
            notes.append("Teacher: beats an untrained network in every probe.")
        return notes

    def _not_beaten(self, measure: Measure) -> str:
        """The error rates, where the teacher's is not beyond chance below an untrained network's;
        else empty."""
        own, other = (
            probes[measure.key] for probes in (self.teacher.probes, self.untrained_probes)
        )
        difference = own.less(other)
        if difference.is_beyond_chance and difference.interval.value < 0:
            return ""
        return f"{measure.name} ({own.rate.value:.1%} against {other.rate.value:.1%})"

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
    """A sentence on the pairs of rows that error rates do not tell apart."""
    notes = []
    for measure in MEASURES:
        known = [row for row in rows if measure.key in row.probes]
        pairs = list(combinations(known, 2))
        alike = [
            f"{first.name} and {second.name}"
            for first, second in pairs
            if not first.probes[measure.key].less(second.probes[measure.key]).is_beyond_chance
        ]
        if alike:
            notes.append(f"{measure.name} {_some(alike, len(pairs))}")
    return [f"Not told apart: by {'; by '.join(notes)}."] if notes else []


def _some(alike: Sequence[str], pairs: int) -> str:
    if len(alike) == pairs > 1:
        return "any rows"
    more = f" and {len(alike) - _NAMED} more pairs" if len(alike) > _NAMED else ""
    return ", ".join(alike[:_NAMED]) + more
