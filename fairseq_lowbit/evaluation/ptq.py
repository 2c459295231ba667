"""Post-training quantization: the calibration pass and nothing else."""

import random
from pathlib import Path

import torch
from torch.nn import functional as F

from fairseq_lowbit.data.audio import read_audio
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.models import Hubert, LoadedModel, start_from
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision

_BATCHES = 8
_BATCH_SIZE = 4
_MAX_SAMPLES = 160_000


def post_training_quantized(teacher: LoadedModel, precision: str, manifest: Manifest) -> Hubert:
    """The teacher at another precision, calibrated on seeded files of ``manifest``."""
    model = Hubert(teacher.model.shape, precision=Precision(precision))
    start_from(model, teacher)
    generator = random.Random(1)
    count = min(_BATCH_SIZE, len(manifest))
    batches = []
    for _ in range(_BATCHES):
        names = generator.sample(manifest.names, count)
        batches.append(_unpadded([manifest.root / name for name in names], teacher.normalize))
    calibrate(model, batches, model.hidden_states)
    return model.eval()


def _unpadded(paths: list[Path], normalize: bool) -> torch.Tensor:
    """The files cut to their common length, [batch, samples]."""
    audio = [torch.from_numpy(read_audio(path)) for path in paths]
    length = min(_MAX_SAMPLES, *(len(wave) for wave in audio))
    batch = torch.stack([wave[:length] for wave in audio])
    return F.layer_norm(batch, batch.shape[1:]) if normalize else batch
