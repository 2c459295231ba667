"""Attention maps side by side."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from fairseq_lowbit.report.drawing import Drawing, numbers
from fairseq_lowbit.report.inside.attention import LayerAttention
from fairseq_lowbit.report.style import NARROW, SEQUENTIAL, new_figure


def attention_drawing(layers: Sequence[LayerAttention]) -> Drawing:
    """A head per row, teacher and student beside each other; without a teacher a layer per row."""
    is_pair = layers[0].moved is not None
    rows = [row for layer in layers for row in _map_rows(layer)]
    figure = new_figure(NARROW, 0.4 + 1.85 * len(rows))
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex=True, sharey=True)
    for panels, (label, maps) in zip(grid, rows, strict=True):
        _draw_maps(figure, panels, maps, layers[0].frame_seconds)
        panels[0].set_ylabel(f"{label}\nattending at, s" if label else "attending at, s")
    for axes in grid[-1]:
        axes.set_xlabel("attended to at, s")
    return Drawing("attention", *_attention_text(is_pair), figure, _moved(layers))


def _moved(layers: Sequence[LayerAttention]) -> str:
    shares = {
        f"layer {layer.layer + 1}, head {head.head + 1}": 100 * layer.moved[head.head]
        for layer in layers
        if layer.moved is not None
        for head in layer.heads
    }
    return numbers(shares, "attention moved", "%") if shares else ""


def _attention_text(is_pair: bool) -> tuple[str, str]:
    reading = (
        "Each row of a map is a frame of the audio, its colours how it spreads its attention over "
        "all frames, on a square-root scale"
    )
    if not is_pair:
        return "attention", (
            f"{reading}. Of the first, the middle and the last layer the head with the least "
            "entropy per row (most focused) and the median one."
        )
    return "attention of teacher and student", (
        f"{reading} that is the same for both. The student's is shown as it is used, quantized if "
        "it is. Moved: the share that lies elsewhere than the teacher's (half the summed absolute "
        "difference), by which the most different and the median head of a layer are chosen. Sum: "
        "of a row, where quantization moved it off 1."
    )


def _map_rows(layer: LayerAttention) -> list[tuple[str, list[tuple[str, Tensor]]]]:
    """A label, and titles and maps beside each other: teacher and student of a head, or without a
    teacher the heads of the layer."""
    names = [f"layer {layer.layer + 1}, head {head.head + 1}" for head in layer.heads]
    if layer.moved is None:
        return [
            ("", [(f"{n}: {h.chosen}", h.student) for n, h in zip(names, layer.heads, strict=True)])
        ]
    return [
        (
            f"{head.chosen} head",
            [(f"{name}: teacher", head.teacher), (_student_title(layer, head.head), head.student)],
        )
        for name, head in zip(names, layer.heads, strict=True)
    ]


def _student_title(layer: LayerAttention, head: int) -> str:
    title = f"student: {layer.moved[head]:.0%} moved"
    row_sum = layer.row_sums[head]
    return title if abs(row_sum - 1) < 0.005 else f"{title}, sum {row_sum:.2f}"


def _draw_maps(
    figure: Figure, panels: np.ndarray, maps: list[tuple[str, Tensor]], frame_seconds: float
) -> None:
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    # A few peaks would leave everything else dark.
    most = max(float(values.quantile(0.998)) for _, values in maps)
    norm = PowerNorm(0.5, 0, most)
    for axes, (title, values) in zip(panels, maps):
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
