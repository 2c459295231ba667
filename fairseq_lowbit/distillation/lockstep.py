"""Teacher and student advance layer by layer together, so only one layer of the teacher's attention
maps is alive at a time (a full set is 324 MB for one 15 s utterance at base size)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_lowbit.distillation.losses import attention_error, feature_error
from fairseq_lowbit.models.protocols import LayeredEncoder
from fairseq_lowbit.nn.attention import AttentionMap


class DistillationTerms(NamedTuple):
    """The terms, each () fp32: mean over valid frames, and over layers for ``layers`` and
    ``attention``; None when they were not asked for."""

    final: Tensor
    layers: Tensor | None
    attention: Tensor | None
    front_end: Tensor | None = None


def distill(
    teacher: LayeredEncoder,
    student: LayeredEncoder,
    waveform: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    attention: AttentionMap | None = "probabilities",
    layers: bool = True,
    shared_front_end: bool = False,
    front_end: bool = False,
) -> tuple[DistillationTerms, Tensor]:
    """Runs both models over one batch and compares them.

    Args:
        teacher: frozen, of the student's shape.
        waveform: [batch, samples].
        lengths: [batch] valid samples; None without padding.
        mask: [batch, frames] shared by both; None for no masking.
        attention: compare ``probabilities`` or row-centred ``scores``. With None neither model
            computes its maps, and attention is fused where its probabilities are not quantized.
        layers: compare the outputs of the layers.
        shared_front_end: compute it once for both; see :func:`same_front_end`.
        front_end: compare the inputs of the first layer.

    Returns:
        the terms, and the number of valid frames. The final term costs next to nothing and is
        always there: it keeps every parameter in the graph, without which
        DistributedDataParallel waits for gradients that never come.
    """
    with torch.no_grad():
        teacher_frames = teacher.extract(waveform, lengths)
    frames = teacher_frames if shared_front_end else student.extract(waveform, lengths)
    valid = None if frames.padding_mask is None else frames.valid()
    with torch.no_grad():
        target = teacher.begin(teacher_frames, mask)
    x = student.begin(frames, mask)
    front_end_term = feature_error(x, target, valid) if front_end else None
    layer_terms, attention_terms = [], []
    for teacher_layer, layer in zip(teacher.layers, student.layers, strict=True):
        with torch.no_grad():
            target, target_map = teacher_layer(target, frames.padding_mask, attention)
        x, attention_map = layer(x, frames.padding_mask, attention)
        if layers:
            layer_terms.append(feature_error(x, target, valid))
        if attention is not None:
            attention_terms.append(
                attention_error(attention_map, target_map, valid, center=attention == "scores")
            )
    with torch.no_grad():
        target = teacher.project_final(target)
    final = feature_error(student.project_final(x), target, valid)
    terms = DistillationTerms(final, _mean(layer_terms), _mean(attention_terms), front_end_term)
    return terms, frames.valid().sum()


def _mean(terms: list[Tensor]) -> Tensor | None:
    return torch.stack(terms).mean() if terms else None
