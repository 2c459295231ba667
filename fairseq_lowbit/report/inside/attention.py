"""Attention maps of a student beside its teacher's, of heads chosen by how far they are apart."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadMaps:
    """The attention of one head, as it weights the values: decoded where it is quantized.

    Attributes:
        head: from 0.
        chosen: why this one, in a few words.
        student, teacher: [frames, frames] fp32 on the CPU, a row per attending frame; the teacher's
            is None without one.
    """

    head: int
    chosen: str
    student: Tensor
    teacher: Tensor | None


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer.

    Attributes:
        layer: from 0.
        frame_seconds: from one frame to the next.
        moved: per head, half the absolute difference to the teacher summed over keys, mean over
            frames: the share of the attention that is elsewhere, 0 to 1 for rows that sum to 1.
            None without a teacher.
        row_sums: per head, the mean of the student's row sums, which quantization moves off 1.
        heads: the two that are shown; one where the layer has no more.
    """

    layer: int
    frame_seconds: float
    moved: tuple[float, ...] | None
    row_sums: tuple[float, ...]
    heads: tuple[HeadMaps, ...]


def layer_attention(
    layer: int, frame_seconds: float, student: Tensor, teacher: Tensor | None = None
) -> LayerAttention:
    """Compares maps [heads, frames, frames] and keeps two heads: the one that differs most from the
    teacher's and the median one; without a teacher the most focused one (least entropy of its rows)
    and the median one."""
    moved = None
    if teacher is None:
        rank, extreme = focus(student), "most focused"
    else:
        rank = moved = (student - teacher).abs().sum(-1).mean(-1) / 2
        extreme = "most different"
    order = rank.argsort(descending=True, stable=True).tolist()
    chosen = {extreme: order[0], "median": order[len(order) // 2]}
    if len(order) == 1:
        chosen = {"only": 0}
    return LayerAttention(
        layer=layer,
        frame_seconds=frame_seconds,
        moved=None if moved is None else tuple(moved.tolist()),
        row_sums=tuple(student.sum(-1).mean(-1).tolist()),
        heads=tuple(
            HeadMaps(
                head, why, _kept(student[head]), None if teacher is None else _kept(teacher[head])
            )
            for why, head in chosen.items()
        ),
    )


def focus(maps: Tensor) -> Tensor:
    """Per head, less the mean entropy of the rows in bits, [heads]; rows need not sum to 1."""
    rows = maps / maps.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(rows).sum(-1).mean(-1).neg() / torch.log(torch.tensor(2.0))


def _kept(attention: Tensor) -> Tensor:
    """A copy of its own, since a slice would keep all heads alive."""
    return attention.float().cpu().clone()
