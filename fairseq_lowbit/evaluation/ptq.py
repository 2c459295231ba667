"""Post-training quantization: the calibration pass and nothing else."""

import random
from dataclasses import dataclass

import torch

from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.utterances import read_usable
from fairseq_lowbit.models import Hubert, LoadedModel, start_from
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.quantization import Criterion
from fairseq_lowbit.quantization.calibration import MSE

_BATCHES = 8
_BATCH_SIZE = 4
_MAX_SAMPLES = 160_000


@dataclass(frozen=True)
class Calibrated:
    """A model that calibration alone has quantized, in eval mode.

    Attributes:
        clipped: by module, the share of its weights that squashing clipped.
    """

    model: Hubert
    clipped: dict[str, float]


def post_training_quantized(
    teacher: LoadedModel, precision: Precision, manifest: Manifest, criterion: Criterion = MSE
) -> Calibrated:
    """The teacher at another precision, calibrated on seeded files of ``manifest``.

    Raises:
        LowbitError: an unknown precision; no usable file among those drawn.
    """
    model = Hubert(teacher.model.shape, precision=precision)
    start_from(model, teacher)
    generator = random.Random(1)
    count = min(_BATCH_SIZE, len(manifest))
    picks = [generator.sample(range(len(manifest)), count) for _ in range(_BATCHES)]
    drawn = [_unpadded(manifest, lines, teacher.normalize) for lines in picks]
    batches = [batch for batch in drawn if len(batch)]
    if not batches:
        raise LowbitError(f"{manifest.path}: none of the files to calibrate on is usable")
    clipped = calibrate(model, batches, model.final_output, criterion)
    return Calibrated(model.eval(), clipped)


def _unpadded(manifest: Manifest, lines: list[int], normalize: bool) -> torch.Tensor:
    """The usable files among ``lines`` cut to their common length, [batch, samples]."""
    audio = list(read_usable(manifest, lines, normalize).values())
    length = min([_MAX_SAMPLES, *(len(wave) for wave in audio)])
    return torch.stack([wave[:length] for wave in audio]) if audio else torch.empty(0, 0)
