"""Attention maps of a student beside its teacher's, of the heads that differ most."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from fairseq_lowbit.report.drawing import Drawing, numbers
from fairseq_lowbit.report.style import NARROW, SEQUENTIAL, new_figure


@dataclass(frozen=True)
class HeadAttention:
    """The attention of one head, as it weights the values: decoded where it is quantized.

    Attributes:
        layer, head: from 0.
        moved: half the absolute difference to the teacher's map summed over keys, mean over frames:
            the share of the attention that lies elsewhere, 0 to 1 for rows that sum to 1.
        student, teacher: [frames, frames] fp32 on the CPU, a row per attending frame.
    """

    layer: int
    head: int
    moved: float
    student: Tensor
    teacher: Tensor


def most_moved_head(layer: int, student: Tensor, teacher: Tensor) -> HeadAttention:
    """Of maps [heads, frames, frames] those of the head that differs most from the teacher's."""
    moved = (student - teacher).abs().sum(-1).mean(-1) / 2
    head = int(moved.argmax())
    return HeadAttention(
        layer, head, float(moved[head]), _copy(student[head]), _copy(teacher[head])
    )


def _copy(attention: Tensor) -> Tensor:
    """Not a slice, which would keep all heads in memory."""
    return attention.float().cpu().clone()


def attention_drawing(heads: Sequence[HeadAttention], frame_seconds: float) -> Drawing:
    """A row for each head: the teacher's map beside the student's.

    Args:
        frame_seconds: from one frame to the next.
    """
    figure = new_figure(NARROW, 0.4 + 1.85 * len(heads))
    grid = figure.subplots(len(heads), 2, squeeze=False, sharex=True, sharey=True)
    for panels, head in zip(grid, heads, strict=True):
        _draw_maps(figure, panels, head, frame_seconds)
        panels[0].set_ylabel("attending at, s")
    for axes in grid[-1]:
        axes.set_xlabel("attended to at, s")
    moved = {f"{_name(head)}": 100 * head.moved for head in heads}
    return Drawing(
        "attention",
        "attention of teacher and student",
        "Each row of a map is a frame of the audio. Its colours show how it spreads its attention "
        "over all frames, on a square-root scale that is the same for both. The student's map is "
        "the one it uses, quantized if it is. Moved: the share that lies elsewhere than the "
        "teacher's (half the summed absolute difference). Of each layer the head is shown of which "
        "it is most.",
        figure,
        numbers(moved, "attention moved", "%"),
    )


def _name(head: HeadAttention) -> str:
    return f"layer {head.layer + 1}, head {head.head + 1}"


def _draw_maps(
    figure: Figure, panels: np.ndarray, head: HeadAttention, frame_seconds: float
) -> None:
    # A few peaks would leave everything else dark.
    most = max(float(values.quantile(0.998)) for values in (head.teacher, head.student))
    norm = PowerNorm(0.5, 0, most)
    titles = f"{_name(head)}: teacher", f"student: {head.moved:.0%} moved"
    for axes, title, values in zip(panels, titles, (head.teacher, head.student), strict=True):
        seconds = len(values) * frame_seconds
        image = axes.imshow(
            values.numpy(),
            norm=norm,
            cmap=SEQUENTIAL,
            aspect="auto",
            extent=(0, seconds, seconds, 0),
            interpolation="antialiased",
        )
        if values.min() == values.max():
            axes.text(seconds / 2, seconds / 2, "uniform", color="white", ha="center", va="center")
        axes.set_title(title)
        axes.grid(False)
        axes.locator_params(nbins=5)
    bar = figure.colorbar(image, ax=panels.tolist(), fraction=0.04, pad=0.02)
    ticks = [0, most / 4, most]
    bar.set_ticks(ticks, labels=[f"{100 * tick:.2g}%" for tick in ticks])
    bar.outline.set_visible(False)
