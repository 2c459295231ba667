"""What the front-ends of teacher and student have to do with each other."""

import torch

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.models.extractor import receptive_field
from fairseq_lowbit.models.protocols import LayeredEncoder
from fairseq_lowbit.nn import is_quantized


def same_front_end(teacher: LayeredEncoder, student: LayeredEncoder) -> bool:
    """Whether both extractors are float and hold the same weights, so that one may do for both.

    Compares on the host: ask once per run, after all weights are loaded.
    """
    front_ends = [model.feature_extractor for model in (teacher, student)]
    if any(is_quantized(front_end) for front_end in front_ends):
        return False
    weights, own = (front_end.state_dict() for front_end in front_ends)
    return weights.keys() == own.keys() and all(
        torch.equal(tensor, own[name]) for name, tensor in weights.items()
    )


def refuse_other_frames(model: Hubert, teacher: LoadedModel) -> None:
    """Frames of one place in the audio are compared, so there have to be as many.

    Raises:
        LowbitError: the teacher has other frames.
    """
    frame = receptive_field(model.conv_layers)
    samples = torch.arange(frame, frame + 2 * model.samples_per_frame)
    if not torch.equal(model.frame_lengths(samples), teacher.model.frame_lengths(samples)):
        own, other = (
            f"a frame every {each.samples_per_frame} samples, the first of "
            f"{receptive_field(each.conv_layers)}"
            for each in (model, teacher.model)
        )
        raise LowbitError(
            f"model.conv_feature_layers: {own}, where teacher {teacher.source} has {other}: give a "
            "front-end with the same"
        )
