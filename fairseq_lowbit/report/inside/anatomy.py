"""The insides of a quantized model on one utterance: noise, levels, ranges, weights, attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.models.encoder import EncoderLayer
from fairseq_lowbit.models.extractor import receptive_field
from fairseq_lowbit.nn import is_calibrated
from fairseq_lowbit.report.inside.attention import LayerAttention, layer_attention
from fairseq_lowbit.report.inside.quantizers import QuantizerAnatomy, watching
from fairseq_lowbit.report.inside.weights import WeightAnatomy, first_middle_last, weight_anatomies

MAX_SECONDS = 4.0
# Fields of an architecture in which student and teacher have to agree, besides the front-end.
_SHAPE = (
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "layer_norm_first",
    "conv_pos",
    "conv_pos_groups",
    "final_dim",
)


@dataclass(frozen=True)
class Anatomy:
    """What :func:`dissect` found.

    Attributes:
        seconds: of the audio that was looked at.
        layers: encoder layers of the model.
        quantizers: in the order of the forward; empty for a float model.
        weights: of a choice of operators; empty without weight quantizers.
        attention: of the first, the middle and the last layer.
    """

    seconds: float
    layers: int
    quantizers: tuple[QuantizerAnatomy, ...]
    weights: tuple[WeightAnatomy, ...]
    attention: tuple[LayerAttention, ...]


@torch.no_grad()
def dissect(student: LoadedModel, teacher: LoadedModel | None, waveform: Tensor) -> Anatomy:
    """Looks into a model in one pass over an utterance, of a long one over its middle.

    Student and teacher advance layer by layer together; of values a sample is kept and of attention
    only the maps that are shown.

    Args:
        student: of any precision, float included, in eval mode.
        teacher: of the student's shape, to compare attention and weights with.
        waveform: [1, samples] at 16 kHz, all valid, normalized if the model wants it; at most
            ``MAX_SECONDS`` from its middle are looked at, so that frames stay visible.

    Raises:
        LowbitError: a teacher of another shape; an uncalibrated model or one whose numbers are not
            finite; audio too short for two frames.
    """
    _check(student, teacher, waveform)
    waveform = _middle(waveform)
    found: list[QuantizerAnatomy] = []
    with watching(student.model, found):
        attention = _advance_together(student, teacher, waveform)
    return Anatomy(
        seconds=waveform.shape[1] / SAMPLE_RATE,
        layers=student.model.shape.encoder_layers,
        quantizers=tuple(found),
        weights=weight_anatomies(student.model, teacher and teacher.model),
        attention=attention,
    )


def _check(student: LoadedModel, teacher: LoadedModel | None, waveform: Tensor) -> None:
    if teacher is not None:
        _refuse_other_shape(student, teacher)
        _refuse_unusable(teacher)
    _refuse_unusable(student)
    needed = receptive_field(student.model.conv_layers) + student.model.samples_per_frame
    if waveform.dim() != 2 or len(waveform) != 1 or waveform.shape[1] < needed:
        raise LowbitError(
            f"audio of shape {list(waveform.shape)}: want one utterance [1, samples] of at least "
            f"{needed} samples at {SAMPLE_RATE} Hz"
        )


def _refuse_unusable(loaded: LoadedModel) -> None:
    for name, parameter in loaded.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LowbitError(
                f"{loaded.path}: {name} holds numbers that are not finite, so its training has "
                "diverged; take an earlier checkpoint"
            )
    if not is_calibrated(loaded.model):
        raise LowbitError(
            f"{loaded.path} holds quantizers that were never calibrated: train it, or write it "
            "anew with fairseq-lowbit ptq"
        )


def _refuse_other_shape(student: LoadedModel, teacher: LoadedModel) -> None:
    own, wanted = student.model.shape, teacher.model.shape
    fields = [name for name in _SHAPE if getattr(own, name) != getattr(wanted, name)]
    if student.model.conv_layers != teacher.model.conv_layers:
        fields.insert(0, "conv_feature_layers")
    if fields:
        raise LowbitError(
            f"{student.path} has {fields[0]} {getattr(own, fields[0])} and its teacher "
            f"{teacher.path} has {getattr(wanted, fields[0])}: they are compared head by head and "
            "weight by weight, so give the teacher that it was distilled from"
        )


def _middle(waveform: Tensor) -> Tensor:
    samples = int(MAX_SECONDS * SAMPLE_RATE)
    start = max(0, (waveform.shape[1] - samples) // 2)
    return waveform[:, start : start + samples]


def _advance_together(
    student: LoadedModel, teacher: LoadedModel | None, waveform: Tensor
) -> tuple[LayerAttention, ...]:
    """Runs both models whole; the attention of some layers."""
    pair = [loaded for loaded in (student, teacher) if loaded is not None]
    states = [loaded.model.begin(loaded.model.extract(waveform)) for loaded in pair]
    frame_seconds = student.model.samples_per_frame / SAMPLE_RATE
    shown = first_middle_last(range(student.model.shape.encoder_layers))
    found = []
    for index in range(student.model.shape.encoder_layers):
        steps = [
            _step(loaded.model.layers[index], x) for loaded, x in zip(pair, states, strict=True)
        ]
        states = [x for x, _ in steps]
        if index in shown:
            maps = [probabilities[0] for _, probabilities in steps]
            found.append(layer_attention(index, frame_seconds, *maps))
    student.model.project_final(states[0])  # the last quantizers there may be
    return tuple(found)


def _step(layer: EncoderLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a layer, and the probabilities as it uses them (decoded, where they are
    quantized), [1, heads, frames, frames]."""
    quantizer, decoded = layer.self_attn.probabilities_quantizer, []
    if quantizer is None:
        return layer(x, None, "probabilities")
    handle = quantizer.register_forward_hook(lambda *call: decoded.append(call[2]))
    try:
        return layer(x).x, decoded[0]
    finally:
        handle.remove()
