"""Post-training quantization: the calibration pass and nothing else."""

import random

import torch

from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.utterances import read_usable
from fairseq_lowbit.models import Hubert, LoadedModel, start_from
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision

_BATCHES = 8
_BATCH_SIZE = 4
_MAX_SAMPLES = 160_000


def post_training_quantized(teacher: LoadedModel, precision: str, manifest: Manifest) -> Hubert:
    """The teacher at another precision, calibrated on seeded files of ``manifest``.

    Raises:
        LowbitError: an unknown precision; no usable file among those drawn.
    """
    model = Hubert(teacher.model.shape, precision=Precision(precision))
    start_from(model, teacher)
    generator = random.Random(1)
    count = min(_BATCH_SIZE, len(manifest))
    picks = [generator.sample(range(len(manifest)), count) for _ in range(_BATCHES)]
    drawn = [_unpadded(manifest, lines, teacher.normalize) for lines in picks]
    batches = [batch for batch in drawn if len(batch)]
    if not batches:
        raise LowbitError(f"{manifest.path}: none of the files to calibrate on is usable")
    calibrate(model, batches, model.hidden_states)
    return model.eval()


def _unpadded(manifest: Manifest, lines: list[int], normalize: bool) -> torch.Tensor:
    """The usable files among ``lines`` cut to their common length, [batch, samples]."""
    audio = list(read_usable(manifest, lines, normalize).values())
    length = min([_MAX_SAMPLES, *(len(wave) for wave in audio)])
    return torch.stack([wave[:length] for wave in audio]) if audio else torch.empty(0, 0)
