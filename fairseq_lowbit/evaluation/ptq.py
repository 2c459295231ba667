"""Post-training quantization: the calibration pass and nothing else."""

from dataclasses import dataclass

import numpy as np
import torch

from fairseq_lowbit.data.calibration_audio import CalibrationAudio
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.utterances import read_usable
from fairseq_lowbit.models import LoadedModel, start_from
from fairseq_lowbit.models.extractor import receptive_field
from fairseq_lowbit.models.protocols import SpeechModel
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.quantization import Criterion
from fairseq_lowbit.quantization.calibration import MSE

DEFAULT_AUDIO = CalibrationAudio()


@dataclass(frozen=True)
class Calibrated:
    """A model that calibration alone has quantized, in eval mode.

    Attributes:
        clipped: by module, the share of its weights that squashing clipped.
    """

    model: SpeechModel
    clipped: dict[str, float]


def post_training_quantized(
    teacher: LoadedModel,
    precision: Precision,
    manifest: Manifest,
    criterion: Criterion = MSE,
    audio: CalibrationAudio = DEFAULT_AUDIO,
) -> Calibrated:
    """The teacher at another precision, calibrated on files of ``manifest`` that ``audio`` draws.

    Raises:
        LowbitError: an unknown precision; no usable file among those drawn.
    """
    model = teacher.model.untrained(precision)
    start_from(model, teacher)
    clipped = calibrate(
        model, _batches(model, manifest, audio, teacher.normalize), model.final_output, criterion
    )
    return Calibrated(model.eval(), clipped)


def _batches(
    model: SpeechModel, manifest: Manifest, audio: CalibrationAudio, normalize: bool
) -> list[torch.Tensor]:
    """[batch, samples] each, of the usable files among those drawn."""
    shortest = receptive_field(model.conv_layers)
    audio.require(shortest)
    lines = np.flatnonzero(manifest.sizes >= shortest)
    drawn = [lines[batch].tolist() for batch in audio.draw(manifest.sizes[lines])]
    read = [read_usable(manifest, batch, normalize).values() for batch in drawn]
    batches = [_unpadded(list(waves), audio.samples()) for waves in read if waves]
    if not batches:
        raise LowbitError(f"{manifest.path}: none of the files to calibrate on is usable")
    return batches


def _unpadded(waves: list[torch.Tensor], longest: int) -> torch.Tensor:
    """Cut to their common length, [batch, samples]."""
    length = min(longest, *(len(wave) for wave in waves))
    return torch.stack([wave[:length] for wave in waves])
