"""Post-training quantization: calibration without any training."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fairseq_lowbit.data.calibration_audio import CalibrationAudio, calibration_batches
from fairseq_lowbit.data.recordings import Recordings
from fairseq_lowbit.models import LoadedModel, device_of, start_from
from fairseq_lowbit.models.extractor import receptive_field
from fairseq_lowbit.models.protocols import SpeechModel
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.quantization import Criterion
from fairseq_lowbit.quantization.calibration import MSE

logger = logging.getLogger(__name__)

DEFAULT_AUDIO = CalibrationAudio()


@dataclass(frozen=True)
class Calibrated:
    """A model that was quantized by calibration alone, in eval mode.

    Attributes:
        clipped: by module, the share of its weights that squashing clipped.
    """

    model: SpeechModel
    clipped: dict[str, float]


def post_training_quantized(
    teacher: LoadedModel,
    precision: Precision,
    recordings: Recordings,
    criterion: Criterion = MSE,
    audio: CalibrationAudio = DEFAULT_AUDIO,
) -> Calibrated:
    """The teacher at another precision, calibrated in fp32 as training calibrates before its first
    update: on what ``audio`` draws from ``recordings``. It is on the teacher's device.

    Raises:
        LowbitError: an unknown precision; too many of the files drawn are unusable.
    """
    device = device_of(teacher.model)
    model = teacher.model.untrained(precision).to(device)
    start_from(model, teacher)
    frame = receptive_field(model.conv_layers)
    batches = (batch.to(device) for batch in _batches(recordings, audio, frame))
    clipped = calibrate(model, batches, model.final_output, criterion)
    return Calibrated(model.eval(), clipped)


def _batches(recordings: Recordings, audio: CalibrationAudio, frame: int) -> Iterator[Tensor]:
    """[batch, samples] each; warns of unusable files."""
    for batch in calibration_batches(recordings, audio, frame):
        for _, reason in batch.unusable:
            logger.warning(f"left out: {reason}")
        yield batch.waveform
