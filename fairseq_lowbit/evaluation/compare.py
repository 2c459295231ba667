"""The comparison table: a teacher, post-training quantization and trained students side by side."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from fairseq_lowbit.data.label_file import LabelFile
from fairseq_lowbit.data.manifest import atomic_write, read_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.agreement import Agreement, agreement, valid_frames
from fairseq_lowbit.evaluation.masked import MaskedAccuracy, masked_accuracy
from fairseq_lowbit.evaluation.probe import Probe, pooled, word_probe
from fairseq_lowbit.evaluation.utterances import Utterances, chosen_lines, read_batches
from fairseq_lowbit.models import Hubert, LoadedModel

TRAINED_FACTOR = 3.0
_SCORES = ("last-layer cosine", "SNR dB", "masked accuracy %")
# Shares of the audio that words to train and to test the probe on may take, of --seconds.
_WORD_SHARES = {"train": 0.8, "test": 0.5}
WordSets = tuple[tuple[list[Utterances], list[str]], tuple[list[Utterances], list[str]]]


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        is_calibrated_only: post-training quantization, no training.
        storage_mb: stored bytes of all parameters in 1e6, float ones at 16 bits.
        agreement: with the teacher; None for the teacher itself.
        masked: None without labels.
        probe: None without word sets.
    """

    name: str
    is_calibrated_only: bool
    storage_mb: float
    agreement: Agreement | None
    masked: MaskedAccuracy | None
    probe: Probe | None


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    rows: the teacher first.
    untrained_probe: of a network of the teacher's shape with random weights.
    """

    rows: tuple[Row, ...]
    untrained_probe: Probe | None

    @property
    def teacher(self) -> Row:
        return self.rows[0]

    def findings(self) -> list[str]:
        """What the table does and does not show, in sentences."""
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
        """``comparison.json`` in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "comparison.json") as file:
            json.dump({**asdict(self), "findings": self.findings()}, file, indent=1)


@dataclass(frozen=True)
class Candidate:
    """A model to compare with the teacher."""

    name: str
    model: Hubert
    is_calibrated_only: bool = False


@dataclass(frozen=True)
class HeldOut:
    """What every model is measured on.

    Attributes:
        labels: None when the folder has none, or the teacher no label embeddings.
        words: batches and words to train and to test the probe on; None without word sets.
    """

    audio: list[Utterances]
    labels: LabelFile | None
    words: WordSets | None


def read_held_out(data: Path, teacher: LoadedModel, seconds: float) -> HeldOut:
    """Reads a seeded choice of a data folder's held-out files.

    Args:
        data: folder with ``test.tsv``, ``test.km`` (masked accuracy; optional) and the word sets
            ``words_{train,test}.{tsv,wrd}`` (probe; optional).
        seconds: audio to measure on.

    Raises:
        LowbitError: missing or unusable data; labels of another kind than the teacher's.
    """
    manifest = read_manifest(data / "test.tsv")
    audio = list(read_batches(manifest, chosen_lines(manifest, seconds), teacher.normalize))
    labels = _labels(data, getattr(teacher.model, "label_embs_concat", None))
    return HeldOut(audio, labels, _words(data, seconds, teacher.normalize))


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
    for candidate in candidates:
        _check_comparable(candidate, teacher.model)
    reference = valid_frames(teacher.model, held_out.audio)
    progress("FP teacher")
    rows = [_row(Candidate("FP teacher", teacher.model), None, teacher.model, held_out)]
    for candidate in candidates:
        progress(candidate.name)
        close = agreement(valid_frames(candidate.model, held_out.audio), reference)
        rows.append(_row(candidate, close, teacher.model, held_out))
    progress("untrained network")
    return Comparison(tuple(rows), _probe(_untrained(teacher), held_out.words))


def _check_comparable(candidate: Candidate, teacher: Hubert) -> None:
    own, wanted = (
        f"{m.shape.encoder_layers} layers of {m.shape.encoder_embed_dim} features, one frame in "
        f"{math.prod(stride for _, _, stride in m.conv_layers)} samples"
        for m in (candidate.model, teacher)
    )
    if own != wanted:
        raise LowbitError(
            f"{candidate.name} has {own}, the teacher {wanted}: they are compared layer by layer"
        )


def _row(candidate: Candidate, close: Agreement | None, teacher: Hubert, held_out: HeldOut) -> Row:
    masked, model = None, candidate.model
    if held_out.labels is not None:
        masked = masked_accuracy(model, teacher, held_out.audio, held_out.labels)
    probe = _probe(model, held_out.words)
    megabytes = model.plan.bytes / 1e6
    return Row(candidate.name, candidate.is_calibrated_only, megabytes, close, masked, probe)


def comparison_table(comparison: Comparison) -> Table:
    """One row per model; layers 1..L side by side in a cell."""
    layers = len(comparison.rows[-1].agreement.cosine) if len(comparison.rows) > 1 else 0
    table = Table(title=f"held-out audio, layers 1..{layers} from left", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("MB", "masked acc.", "centred cosine", "SNR dB", "word probe % (3 seeds)"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparison.rows:
        close, probe = row.agreement, row.probe
        table.add_row(
            row.name,
            f"{row.storage_mb:.2f}",
            "-" if row.masked is None else f"{row.masked.accuracy:.1%}",
            "-" if close is None else " ".join(f"{value:.3f}" for value in close.cosine),
            "-" if close is None else " ".join(f"{value:4.1f}" for value in close.snr_db),
            "-" if probe is None else _probe_cell(probe),
        )
    return table


def _probe_cell(probe: Probe) -> str:
    pairs = zip(probe.mean, probe.std, strict=True)
    return " ".join(f"{100 * mean:.1f}±{100 * std:.1f}" for mean, std in pairs)


def _training_findings(rows: Sequence[Row]) -> list[str]:
    """For every trained row, whether it beats the best calibrated one at all."""
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


def _scores(row: Row) -> list[float]:
    """What ``_SCORES`` names; without labels the last one is missing."""
    masked = [] if row.masked is None else [100 * row.masked.accuracy]
    return [row.agreement.cosine[-1], row.agreement.snr_db[-1], *masked]


def _probe_findings(rows: Sequence[Row]) -> list[str]:
    """Neighbouring rows whose last layers the probe cannot tell apart, in one sentence."""
    alike = []
    for first, second in pairwise(rows):
        gap = abs(first.probe.mean[-1] - second.probe.mean[-1])
        spread = float(np.hypot(first.probe.std[-1], second.probe.std[-1]))
        if gap <= 2 * spread:
            alike.append(f"{first.name} from {second.name} ({gap:.1%} apart, ±{2 * spread:.1%})")
    if not alike:
        return []
    return [f"At the last layer the word probe does not separate {'; '.join(alike)}."]


def _labels(data: Path, embeddings: torch.Tensor | None) -> LabelFile | None:
    path = data / "test.km"
    if embeddings is None or not path.is_file():
        return None
    labels = LabelFile(path, data / "dict.km.txt")
    if len(embeddings) != labels.classes:
        raise LowbitError(
            f"{data} has {labels.classes} label classes and the teacher {len(embeddings)}: "
            "evaluate on the labels the teacher was trained on"
        )
    return labels


def _words(data: Path, seconds: float, normalize: bool) -> WordSets | None:
    if not (data / "words_test.tsv").is_file():
        return None
    return tuple(
        _word_set(data, split, share * seconds, normalize) for split, share in _WORD_SHARES.items()
    )


def _word_set(
    data: Path, split: str, seconds: float, normalize: bool
) -> tuple[list[Utterances], list[str]]:
    manifest = read_manifest(data / f"words_{split}.tsv")
    words = (data / f"words_{split}.wrd").read_text().split()
    if len(words) != len(manifest):
        raise LowbitError(f"{data}/words_{split}.wrd: {len(words)} words, {len(manifest)} files")
    return list(read_batches(manifest, chosen_lines(manifest, seconds), normalize)), words


def _probe(model: Hubert, words: WordSets | None) -> Probe | None:
    if words is None:
        return None
    sets = []
    for batches, names in words:
        features, lines = pooled(model, batches)
        sets.append((features, [names[line] for line in lines]))
    return word_probe(*sets)


def _untrained(teacher: LoadedModel) -> Hubert:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Hubert(teacher.model.shape).eval()
