"""How close a student's layers are to its teacher's on held-out audio."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.evaluation.utterances import Utterances, layer_outputs
from fairseq_lowbit.models.protocols import HiddenStates


@dataclass(frozen=True)
class Agreement:
    """Per layer 1..L.

    Attributes:
        cosine: mean cosine between frames, each model's features centred over all frames, so
            that a common offset does not count as agreement.
        snr_db: 10 log10(sum |teacher - mean|^2 / sum |teacher - student|^2).
    """

    cosine: tuple[float, ...]
    snr_db: tuple[float, ...]


def valid_frames(model: HiddenStates, batches: Sequence[Utterances]) -> list[Tensor]:
    """All valid frames of every layer 1..L, [frames, dim] each."""
    per_batch = []
    for batch in batches:
        outputs, valid = layer_outputs(model, batch)
        per_batch.append([output[valid].float() for output in outputs])
    return [torch.cat(frames) for frames in zip(*per_batch, strict=True)]


def agreement(student: list[Tensor], teacher: list[Tensor]) -> Agreement:
    """Compares the frames that :func:`valid_frames` collected from the same batches."""
    pairs = list(zip(student, teacher, strict=True))
    return Agreement(
        tuple(_centered_cosine(s, t) for s, t in pairs), tuple(_snr_db(s, t) for s, t in pairs)
    )


def _centered_cosine(student: Tensor, teacher: Tensor) -> float:
    student, teacher = student - student.mean(0), teacher - teacher.mean(0)
    return float(F.cosine_similarity(student, teacher, dim=-1).mean())


def _snr_db(student: Tensor, teacher: Tensor) -> float:
    signal = (teacher - teacher.mean(0)).square().sum()
    noise = (teacher - student).square().sum()
    return float(10 * torch.log10(signal / noise.clamp_min(1e-12)))
