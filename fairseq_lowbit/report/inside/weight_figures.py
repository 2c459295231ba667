"""Histograms of weights with the levels they are quantized to."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fairseq_lowbit.report.drawing import Drawing
from fairseq_lowbit.report.inside.quantizer_figures import short_name
from fairseq_lowbit.report.inside.quantizers import FEW_LEVELS
from fairseq_lowbit.report.inside.weights import Histogram, WeightAnatomy
from fairseq_lowbit.report.style import INK, LEVEL, MUTED, NARROW, STUDENT, TEACHER, new_figure


def weights_drawing(weights: Sequence[WeightAnatomy]) -> Drawing:
    """Operators below each other, their layers beside each other."""
    rows = [
        (row, draw)
        for row in _weight_rows(weights)
        for draw in (_draw_stored, _draw_encoded)
        if draw is _draw_encoded or any(weight.stored is not None for weight in row)
    ]
    columns = max(len(row) for row, _ in rows)
    figure = new_figure(NARROW, 0.7 + 1.4 * len(rows))
    for panels, (row, draw) in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        for axes in panels:
            axes.set_axis_off()
        for axes, weight in zip(panels, row):
            draw(axes, weight)
    _weights_legend(figure, weights)
    is_squashed = any(weight.stored is not None for weight in weights)
    return Drawing("weights", *_weights_text(is_squashed), figure)


def _weight_rows(weights: Sequence[WeightAnatomy]) -> list[list[WeightAnatomy]]:
    """An operator in several layers a row; what lies outside of the layers together."""
    rows: dict[str | None, list[WeightAnatomy]] = {}
    for weight in weights:
        operator = None if weight.layer is None else weight.operator
        rows.setdefault(operator, []).append(weight)
    return list(rows.values())


def _weights_text(is_squashed: bool) -> tuple[str, str]:
    dots = "Dots: the levels, as high as the density of the weights that fall on them"
    if is_squashed:
        return (
            "weights before and after squashing",
            "Above, the stored weight P, the thresholds between its levels (dotted) and the spread "
            "that training holds it to (dashed). Below, the squashed "
            f"weight tanh(P), which evenly spaced levels serve better. {dots}.",
        )
    return (
        "weights against their levels",
        "Distribution of the weight over its scale. Peaks half-way between two levels are weights "
        "that training pushes to and fro; beyond the outermost levels of a learned scale no "
        f"gradient reaches them. {dots}.",
    )


def _draw_stored(axes: Axes, weight: WeightAnatomy) -> None:
    if weight.stored is None:
        return
    axes.set_title(_weight_title(weight))
    _draw_histogram(axes, weight.stored, "P")
    axes.set_xticks([-3, 0, 3])
    levels = np.array(weight.levels)
    if len(levels) <= FEW_LEVELS:
        for threshold in np.arctanh((levels[1:] + levels[:-1]) / 2):
            axes.axvline(threshold, color=LEVEL, linestyle=":", linewidth=1)
    x = np.array(weight.stored.edges)
    spread = weight.squash_std
    normal = np.exp(-((x / spread) ** 2) / 2) / (spread * np.sqrt(2 * np.pi))
    axes.plot(x, normal, color=INK, linestyle="--", linewidth=1)


def _draw_encoded(axes: Axes, weight: WeightAnatomy) -> None:
    if weight.stored is None:
        axes.set_title(_weight_title(weight))
        _draw_histogram(axes, weight.encoded, "w/scale")
        axes.locator_params(axis="x", nbins=4)
    else:
        _draw_histogram(axes, weight.encoded, "tanh P")
        axes.set_xticks([-1, 0, 1])
    heights = np.array(weight.shares) / (weight.levels[1] - weight.levels[0])
    few = len(heights) <= FEW_LEVELS
    if few:
        axes.vlines(weight.levels, 0, heights, color=LEVEL, linewidth=1.2)
    axes.plot(weight.levels, heights, "o", color=LEVEL, markersize=4 if few else 1)


def _weight_title(weight: WeightAnatomy) -> str:
    if weight.layer is None:
        return short_name(weight.module)
    return f"layer {weight.layer + 1}, {weight.operator.removeprefix('self_attn.')}"


def _draw_histogram(axes: Axes, histogram: Histogram, what: str) -> None:
    axes.set_axis_on()
    axes.stairs(histogram.student, histogram.edges, fill=True, color=STUDENT, alpha=0.35)
    axes.stairs(histogram.student, histogram.edges, color=STUDENT, linewidth=1)
    if histogram.teacher is not None:
        axes.stairs(histogram.teacher, histogram.edges, color=TEACHER, linewidth=1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(histogram.edges[0], histogram.edges[-1])
    axes.text(0.02, 0.98, what, size=8, color=MUTED, va="top", transform=axes.transAxes)
    # What is clipped piles up in the outermost bins.
    axes.set_ylim(0, 1.25 * (max(histogram.student[1:-1]) or 1))


def _weights_legend(figure: Figure, weights: Sequence[WeightAnatomy]) -> None:
    handles = [Patch(color=STUDENT, alpha=0.35, label="weight")]
    if any(w.encoded.teacher is not None for w in weights):
        handles.append(Line2D([], [], color=TEACHER, linewidth=1, label="teacher's weight"))
    handles.append(Line2D([], [], color=LEVEL, marker="o", markersize=4, label="levels"))
    if any(w.stored is not None for w in weights):
        handles.append(Line2D([], [], color=LEVEL, linestyle=":", linewidth=1, label="thresholds"))
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1, label="aim for P"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
