"""The insides of a quantized model on one utterance: its quantizers, weights and attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import LoadedModel, device_of
from fairseq_lowbit.models.encoder import EncoderLayer
from fairseq_lowbit.models.protocols import SpeechModel
from fairseq_lowbit.monitoring.health import QuantizerHealth, watching
from fairseq_lowbit.nn import is_calibrated
from fairseq_lowbit.report.inside.attention import HeadAttention, most_moved_head
from fairseq_lowbit.report.inside.weights import WeightAnatomy, first_middle_last, weight_anatomies

# Besides the front-end, student and teacher have to agree in these fields of their shape.
_SHAPE = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads")


@dataclass(frozen=True)
class Anatomy:
    """What :func:`dissect` found.

    Attributes:
        frame_seconds: from one frame to the next.
        quantizers: in the order of the forward; empty for a float model.
        weights: of a choice of operators; empty without weight quantizers.
        attention: of the first, the middle and the last layer; empty without a teacher.
    """

    frame_seconds: float
    quantizers: tuple[QuantizerHealth, ...]
    weights: tuple[WeightAnatomy, ...]
    attention: tuple[HeadAttention, ...]


@torch.no_grad()
def dissect(student: LoadedModel, teacher: LoadedModel | None, waveform: Tensor) -> Anatomy:
    """Examines a model in one pass over an utterance.

    Args:
        student: of any precision, float included, in eval mode.
        teacher: of the student's shape, to compare attention and weights with.
        waveform: [1, samples] at 16 kHz, all valid, normalized if the model wants it; of a few
            seconds, so that frames stay visible.

    Raises:
        LowbitError: a teacher of another shape; an uncalibrated model or one whose numbers are not
            finite.
    """
    if teacher is not None:
        _refuse_other_shape(student, teacher)
        _refuse_unusable(teacher)
    _refuse_unusable(student)
    waveform = waveform.to(device_of(student.model))
    layers = first_middle_last(range(student.model.shape.encoder_layers))
    with watching(student.model) as found:
        own = _attention_maps(student.model, waveform, layers)
    heads: list[HeadAttention] = []
    if teacher is not None:
        others = _attention_maps(teacher.model, waveform, layers)
        heads = [most_moved_head(*maps) for maps in zip(layers, own, others, strict=True)]
    return Anatomy(
        frame_seconds=student.model.samples_per_frame / SAMPLE_RATE,
        quantizers=tuple(found),
        weights=weight_anatomies(student.model, teacher and teacher.model),
        attention=tuple(heads),
    )


def _refuse_unusable(loaded: LoadedModel) -> None:
    for name, parameter in loaded.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LowbitError(
                f"{loaded.source}: {name} holds numbers that are not finite, so its training has "
                "diverged; take an earlier checkpoint"
            )
    if not is_calibrated(loaded.model):
        raise LowbitError(
            f"{loaded.source} holds quantizers that were never calibrated: train it, or write it "
            "anew with fairseq-lowbit ptq"
        )


def _refuse_other_shape(student: LoadedModel, teacher: LoadedModel) -> None:
    own, wanted = student.model.shape, teacher.model.shape
    fields = [name for name in _SHAPE if getattr(own, name) != getattr(wanted, name)]
    if student.model.conv_layers != teacher.model.conv_layers:
        fields.insert(0, "conv_feature_layers")
    if fields:
        raise LowbitError(
            f"{student.source} has {fields[0]} {getattr(own, fields[0])} and its teacher "
            f"{teacher.source} has {getattr(wanted, fields[0])}: they are compared head by "
            "head and weight by weight, so give the teacher that it was distilled from"
        )


def _attention_maps(model: SpeechModel, waveform: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Runs all of ``model``; the attention of some layers, [heads, frames, frames] each."""
    x, maps = model.begin(model.extract(waveform)), []
    for index, layer in enumerate(model.layers):
        x, probabilities = _step(layer, x)
        if index in layers:
            maps.append(probabilities[0])
    model.project_final(x)  # which may be quantized too
    return maps


def _step(layer: EncoderLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer, and the attention probabilities that it uses (decoded, where they are
    quantized), [1, heads, frames, frames]."""
    quantizer, decoded = layer.self_attn.probabilities_quantizer, []
    if quantizer is None:
        return layer(x, None, "probabilities")
    handle = quantizer.register_forward_hook(lambda *call: decoded.append(call[2]))
    try:
        return layer(x).x, decoded[0]
    finally:
        handle.remove()
