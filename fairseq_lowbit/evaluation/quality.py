"""Measuring one model on held-out audio: size, agreement with a teacher, labels, probes."""

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
from fairseq_lowbit.evaluation.probing.data import ProbeData, read_probe_data
from fairseq_lowbit.evaluation.probing.measure import measure_probes
from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.evaluation.probing.tasks import TASKS
from fairseq_lowbit.evaluation.utterances import Utterances, chosen_lines, read_batches
from fairseq_lowbit.models import LoadedModel, device_of
from fairseq_lowbit.models.protocols import SpeechModel

SECONDS = 300.0


@dataclass(frozen=True)
class Quality:
    """Measurements of one model on held-out audio.

    Attributes:
        is_calibrated_only: post-training quantization, no training.
        storage_mb: stored bytes of all parameters in 1e6, float ones at 16 bits.
        agreement: with the teacher; None for the teacher itself.
        masked: None without labels.
        probes: error rates by the key of their measure, such as ``phone_error``; without those
            that the data has no targets for.
    """

    name: str
    is_calibrated_only: bool
    storage_mb: float
    agreement: Agreement | None
    masked: MaskedAccuracy | None
    probes: dict[str, Probe]

    def figures(self) -> dict[str, Any]:
        """Plain data: each figure of the last layer, and of all layers as ``<key>_layers``; of a
        probe its rate, and half of its interval as ``<key>_margin``."""
        found: dict[str, Any] = {"storage_mb": self.storage_mb}
        if self.masked is not None:
            found |= {"masked_accuracy": self.masked.accuracy, "masked_chance": self.masked.chance}
        layers = {}
        if self.agreement is not None:
            layers |= {"cosine": self.agreement.cosine, "snr_db": self.agreement.snr_db}
        for key, values in layers.items():
            found |= {key: values[-1], f"{key}_layers": values}
        for key, probe in self.probes.items():
            rate = probe.rate
            found |= {key: rate.value, f"{key}_margin": (rate.high - rate.low) / 2}
        return found


@dataclass(frozen=True)
class Candidate:
    """A model to compare with the teacher."""

    name: str
    model: SpeechModel
    is_calibrated_only: bool = False

    @classmethod
    def of(cls, loaded: LoadedModel, name: str | None = None) -> "Candidate":
        """A candidate from a checkpoint, by default named by its precision."""
        precision = loaded.model.plan.precision.name
        return cls(name or precision, loaded.model, loaded.is_calibrated_only)


@dataclass(frozen=True)
class HeldOut:
    """The audio, labels and probes that every model is measured on.

    Attributes:
        labels: None when the folder has none, or the teacher no label embeddings.
        probes: what heads are trained and tested on; without tasks where there are no targets.
    """

    audio: list[Utterances]
    labels: LabelFile | None
    probes: ProbeData


def read_held_out(data: Path, teacher: LoadedModel, seconds: float = SECONDS) -> HeldOut:
    """Reads a random but reproducible choice of a data folder's held-out files.

    Args:
        data: folder with ``test.tsv``, ``test.km`` (masked accuracy; optional) and targets of
            probes (optional), see :func:`read_probe_data`.
        seconds: audio to measure on.

    Raises:
        LowbitError: missing or unusable data; labels other than those the teacher was trained on.
    """
    manifest = read_manifest(data / "test.tsv")
    audio = list(read_batches(manifest, chosen_lines(manifest, seconds), teacher.normalize))
    labels = _labels(data, getattr(teacher.model, "label_embs_concat", None))
    return HeldOut(audio, labels, read_probe_data(data, TASKS, seconds, teacher.normalize))


class Reference:
    """A teacher on held-out audio, with which other models are compared."""

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
                f"{candidate.name} has {own}, the teacher {wanted}: both are compared layer by "
                "layer, so they have to agree"
            )

    def measure_teacher(self, name: str) -> Quality:
        """The quality of the teacher itself, which has no agreement."""
        return self._measure(Candidate(name, self._teacher), None)

    def measure(self, candidate: Candidate) -> Quality:
        """The quality of a candidate.

        Raises:
            LowbitError: see :meth:`check_comparable`.
        """
        self.check_comparable(candidate)
        frames = valid_frames(candidate.model, self._held_out.audio)
        return self._measure(candidate, agreement(frames, self._frames))

    def measure_untrained(self) -> dict[str, Probe]:
        """The probes on a network of the teacher's shape with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._teacher.untrained().eval().to(device_of(self._teacher))
        return measure_probes(model, self._held_out.probes)

    @cached_property
    def _frames(self) -> list[Tensor]:
        return valid_frames(self._teacher, self._held_out.audio)

    def _measure(self, candidate: Candidate, close: Agreement | None) -> Quality:
        model, masked, labels = candidate.model, None, self._held_out.labels
        if labels is not None:
            masked = masked_accuracy(model, self._teacher, self._held_out.audio, labels)
        probes = measure_probes(model, self._held_out.probes)
        megabytes = model.plan.bytes / 1e6
        return Quality(
            candidate.name, candidate.is_calibrated_only, megabytes, close, masked, probes
        )


def read_quality(values: dict[str, Any]) -> Quality:
    """Reads a quality back from JSON, where tuples are lists.

    Raises:
        KeyError, TypeError: these are not the values of a :class:`Quality`.
    """
    parts = {"agreement": Agreement, "masked": MaskedAccuracy}
    built = {
        key: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values[key].items()})
        for key, kind in parts.items()
        if values[key] is not None
    }
    probes = {key: Probe.from_json(probe) for key, probe in values["probes"].items()}
    return Quality(**{**values, **built, "probes": probes})


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
