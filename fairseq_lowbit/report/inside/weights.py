"""Histograms of weights with the levels they are quantized to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn

from fairseq_lowbit.monitoring.health import split_layer
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.quantization import Codes
from fairseq_lowbit.quantization.calibration import thin
from fairseq_lowbit.report.drawing import Drawing
from fairseq_lowbit.report.inside.quantizer_maps import short_name
from fairseq_lowbit.report.style import LEVEL, NARROW, STUDENT, TEACHER, new_figure

Item = TypeVar("Item")
_BINS = 96
# A larger weight is drawn from an even sample of this size.
_MAX_VALUES = 131_072
# Up to this many levels have a line each.
_FEW_LEVELS = 16
# The operators of a layer that are shown, if they are quantized.
_SHOWN = ("self_attn.q_proj", "fc1", "fc2")
_TAILS = 0.0005


@dataclass(frozen=True)
class WeightAnatomy:
    """One operator's weight, in units of its levels: over its scale, or squashed by tanh.

    Attributes:
        module: its name.
        levels: 2^bits, ascending.
        shares: of the weights at each level.
        edges: of the histogram's bins, evenly spaced.
        student: density per bin. The area is 1 less the share of values beyond the edges.
        teacher: the same of the teacher's weight in the student's units; None without a teacher.
    """

    module: str
    levels: tuple[float, ...]
    shares: tuple[float, ...]
    edges: tuple[float, ...]
    student: tuple[float, ...]
    teacher: tuple[float, ...] | None

    @property
    def layer(self) -> int | None:
        """Encoder layer, from 0; None outside the encoder layers."""
        return split_layer(self.module)[0]

    @property
    def operator(self) -> str:
        """The module's name in its layer."""
        return split_layer(self.module)[1]


def weight_anatomies(student: nn.Module, teacher: nn.Module | None) -> tuple[WeightAnatomy, ...]:
    """The weights of a few quantized operators: of the first, the middle and the last layer the
    query projection and the feed-forward network, or what else is quantized."""
    names = [
        name
        for name, module in student.named_modules()
        if isinstance(module, Operator) and module.weight_quantizer is not None
    ]
    return tuple(
        _weight_anatomy(name, student.get_submodule(name), teacher and teacher.get_submodule(name))
        for name in _shown(names)
    )


def first_middle_last(items: Sequence[Item]) -> list[Item]:
    """The first, the middle and the last of ``items``, each once."""
    return [items[i] for i in sorted({0, (len(items) - 1) // 2, len(items) - 1}) if items]


def _shown(names: Sequence[str]) -> list[str]:
    by_operator: dict[str, list[str]] = {}
    for name in names:
        layer, operator = split_layer(name)
        if layer is not None:
            by_operator.setdefault(operator, []).append(name)
    if not by_operator:
        return first_middle_last(names)
    operators = [name for name in _SHOWN if name in by_operator] or list(by_operator)[:3]
    return [name for operator in operators for name in first_middle_last(by_operator[operator])]


def _weight_anatomy(name: str, own: Operator, teacher: Operator | None) -> WeightAnatomy:
    stored, quantizer = own.stored_weight(), own.weight_quantizer
    codes = quantizer.codes(stored)
    values = _in_levels(quantizer.target(stored), codes)
    levels = codes.levels.all_values().tolist()
    counts = codes.level_counts()
    span = _span(values, levels)
    teachers = None
    if teacher is not None:
        teachers = _density(_in_levels(_float_weight(teacher), codes), span)
    return WeightAnatomy(
        module=name,
        levels=tuple(levels),
        shares=tuple((counts / counts.sum()).tolist()),
        edges=tuple(torch.linspace(*span, _BINS + 1).tolist()),
        student=_density(values, span),
        teacher=teachers,
    )


def _in_levels(weight: Tensor, codes: Codes) -> Tensor:
    """``weight`` in units of the levels of ``codes``, flat."""
    position = weight.reshape(codes.integers.shape) / codes.scale
    if codes.zero_point is not None:
        position += codes.zero_point
    return thin(position, _MAX_VALUES)


def _float_weight(operator: Operator) -> Tensor:
    stored = operator.stored_weight()
    return stored if operator.weight_quantizer is None else operator.weight_quantizer.target(stored)


def _span(values: Tensor, levels: Sequence[float]) -> tuple[float, float]:
    """A range that holds every level and nearly every value."""
    margin = (levels[1] - levels[0]) / 2
    tails = values.quantile(values.new_tensor([_TAILS, 1 - _TAILS]))
    lowest, highest = tails.tolist()
    return min(lowest, levels[0] - margin), max(highest, levels[-1] + margin)


def _density(values: Tensor, span: tuple[float, float]) -> tuple[float, ...]:
    counts = torch.histc(values.float().cpu(), _BINS, *span)
    width = (span[1] - span[0]) / _BINS
    return tuple((counts / (values.numel() * width)).tolist())


def weights_drawing(weights: Sequence[WeightAnatomy]) -> Drawing:
    """Operators below each other, their layers beside each other."""
    rows: dict[str | None, list[WeightAnatomy]] = {}
    for weight in weights:  # modules outside of the layers share a row
        rows.setdefault(None if weight.layer is None else weight.operator, []).append(weight)
    columns = max(len(row) for row in rows.values())
    figure = new_figure(NARROW, 0.7 + 1.4 * len(rows))
    for panels, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows.values()):
        for axes in panels[len(row) :]:
            axes.set_axis_off()
        for axes, weight in zip(panels, row):
            _draw_weight(axes, weight)
    _add_legend(figure, weights)
    return Drawing(
        "weights",
        "weights against their levels",
        "Distribution of the weight over its scale; of a squashed weight P, of tanh(P). Peaks "
        "half-way between two levels are weights that training pushes to and fro; beyond the "
        "outermost levels of a learned scale no gradient reaches them. Dots: the levels, as high "
        "as the density of the weights that fall on them.",
        figure,
    )


def _draw_weight(axes: Axes, weight: WeightAnatomy) -> None:
    axes.set_title(_title(weight))
    axes.stairs(weight.student, weight.edges, fill=True, color=STUDENT, alpha=0.35)
    axes.stairs(weight.student, weight.edges, color=STUDENT, linewidth=1)
    if weight.teacher is not None:
        axes.stairs(weight.teacher, weight.edges, color=TEACHER, linewidth=1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(weight.edges[0], weight.edges[-1])
    axes.locator_params(axis="x", nbins=4)
    # What is clipped piles up in the outermost bins.
    axes.set_ylim(0, 1.25 * (max(weight.student[1:-1]) or 1))
    heights = np.array(weight.shares) / (weight.levels[1] - weight.levels[0])
    is_few = len(heights) <= _FEW_LEVELS
    if is_few:
        axes.vlines(weight.levels, 0, heights, color=LEVEL, linewidth=1.2)
    axes.plot(weight.levels, heights, "o", color=LEVEL, markersize=4 if is_few else 1)


def _title(weight: WeightAnatomy) -> str:
    if weight.layer is None:
        return short_name(weight.module)
    return f"layer {weight.layer + 1}, {weight.operator.removeprefix('self_attn.')}"


def _add_legend(figure: Figure, weights: Sequence[WeightAnatomy]) -> None:
    handles = [Patch(color=STUDENT, alpha=0.35, label="weight")]
    if any(weight.teacher is not None for weight in weights):
        handles.append(Line2D([], [], color=TEACHER, linewidth=1, label="teacher's weight"))
    handles.append(Line2D([], [], color=LEVEL, marker="o", markersize=4, label="levels"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
