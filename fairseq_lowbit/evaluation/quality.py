"""Measuring one model on held-out audio: size, agreement with a teacher, labels, words."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.data.label_file import LabelFile
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.agreement import Agreement, agreement, valid_frames
from fairseq_lowbit.evaluation.masked import MaskedAccuracy, masked_accuracy
from fairseq_lowbit.evaluation.probe import Probe, pooled, word_probe
from fairseq_lowbit.evaluation.utterances import Utterances, chosen_lines, read_batches
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.models.protocols import HiddenStates, SpeechModel

SECONDS = 300.0
# Shares of the audio that words to train and to test the probe on may take, of the seconds.
_WORD_SHARES = {"train": 0.8, "test": 0.5}
WordSets = tuple[tuple[list[Utterances], list[str]], tuple[list[Utterances], list[str]]]


@dataclass(frozen=True)
class Quality:
    """What was measured of one model.

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
class Candidate:
    """A model to compare with the teacher."""

    name: str
    model: SpeechModel
    is_calibrated_only: bool = False

    @classmethod
    def of(cls, loaded: LoadedModel, name: str | None = None) -> "Candidate":
        """A checkpoint, by default under the name of its precision."""
        precision = loaded.model.plan.precision.name
        return cls(name or precision, loaded.model, loaded.is_calibrated_only)


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


def read_held_out(data: Path, teacher: LoadedModel, seconds: float = SECONDS) -> HeldOut:
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


class Reference:
    """A teacher on held-out audio: what models are measured against."""

    def __init__(self, teacher: LoadedModel, held_out: HeldOut) -> None:
        self._teacher, self._held_out = teacher.model, held_out

    def check_comparable(self, candidate: Candidate) -> None:
        """Raises LowbitError when the candidate's layers are not those of the teacher."""
        own, wanted = (
            f"{len(m.layers)} layers of {m.features} features, "
            f"{int(m.frame_lengths(torch.tensor(SAMPLE_RATE)))} frames in a second"
            for m in (candidate.model, self._teacher)
        )
        if own != wanted:
            raise LowbitError(
                f"{candidate.name} has {own}, the teacher {wanted}: they are compared layer by "
                "layer"
            )

    def measure_teacher(self, name: str) -> Quality:
        """The teacher's own row, without an agreement."""
        return self._row(Candidate(name, self._teacher), None)

    def measure(self, candidate: Candidate) -> Quality:
        """A candidate's row.

        Raises:
            LowbitError: see :meth:`check_comparable`.
        """
        self.check_comparable(candidate)
        frames = valid_frames(candidate.model, self._held_out.audio)
        return self._row(candidate, agreement(frames, self._frames))

    def measure_untrained(self) -> Probe | None:
        """The word probe on a network of the teacher's shape with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._teacher.untrained().eval()
        return _probe(model, self._held_out.words)

    @cached_property
    def _frames(self) -> list[Tensor]:
        return valid_frames(self._teacher, self._held_out.audio)

    def _row(self, candidate: Candidate, close: Agreement | None) -> Quality:
        model, masked, labels = candidate.model, None, self._held_out.labels
        if labels is not None:
            masked = masked_accuracy(model, self._teacher, self._held_out.audio, labels)
        probe = _probe(model, self._held_out.words)
        megabytes = model.plan.bytes / 1e6
        return Quality(
            candidate.name, candidate.is_calibrated_only, megabytes, close, masked, probe
        )


def read_quality(values: dict[str, Any]) -> Quality:
    """Back from JSON, where tuples are lists.

    Raises:
        KeyError, TypeError: these are not the values of a row.
    """
    parts = {"agreement": Agreement, "masked": MaskedAccuracy, "probe": Probe}
    built = {
        key: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[key].items()})
        for key, kind in parts.items()
        if values[key] is not None
    }
    return Quality(**{**values, **built})


def _labels(data: Path, embeddings: Tensor | None) -> LabelFile | None:
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


def _probe(model: HiddenStates, words: WordSets | None) -> Probe | None:
    if words is None:
        return None
    sets = []
    for batches, names in words:
        features, lines = pooled(model, batches)
        sets.append((features, [names[line] for line in lines]))
    return word_probe(*sets)
