"""The paper's figure of schedules: precision along x, a panel for every figure, seeds as bars."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fairseq_lowbit.report.style import PALETTE, TEACHER, new_figure, styled
from fairseq_lowbit.runs.columns import Column
from fairseq_lowbit.runs.schedules import CAPTION, Curve, Schedules

# Of curves; both begin anew behind the last.
_MARKERS, _COLORS = 4 * "osD^vP<>", 4 * PALETTE
# Between the points of neighbouring curves, so that their bars do not hide each other.
_STEP = 0.07


@styled()
def draw_schedules(schedules: Schedules, columns: Sequence[Column]) -> Figure:
    """A panel for every column, a line for every curve: means over seeds, a bar of one standard
    deviation each way where there are several, a gap where there is no point."""
    count = len(schedules.curves)
    figure = new_figure(3.6 * len(columns), 3.0 + 0.2 * (count + 2))
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        _draw_panel(axes, schedules, column)
    marks = [
        Line2D([], [], color=_COLORS[index], marker=_MARKERS[index], label=curve.label)
        for index, curve in enumerate(schedules.curves)
    ]
    marks.append(Line2D([], [], color=TEACHER, linestyle=":", label="teacher"))
    figure.legend(handles=marks, title=CAPTION, alignment="left", loc="outside lower left")
    return figure


def _draw_panel(axes: Axes, schedules: Schedules, column: Column) -> None:
    title = "lower" if column.lower_is_better else "higher"
    axes.set(title=f"{column.label} ({title} is better)", ylabel=column.unit)
    axes.set_xticks(range(len(schedules.bits)), [bits.upper() for bits in schedules.bits])
    middle = (len(schedules.curves) - 1) / 2
    for index, curve in enumerate(schedules.curves):
        places, values, bars = _curve(curve, schedules.bits, column)
        axes.errorbar(
            [place + _STEP * (index - middle) for place in places],
            values,
            bars,
            fmt=f"{_MARKERS[index]}-",
            capsize=3,
            color=_COLORS[index],
        )
    teacher = column.value(schedules.teacher)
    if teacher is not None:
        axes.axhline(teacher, color=TEACHER, linestyle=":")


def _curve(
    curve: Curve, bits: Sequence[str], column: Column
) -> tuple[list[int], list[float], list[float]]:
    """Places along x, values, and lengths of bars; not a number for a gap, and for the bar of a
    single seed."""
    places = [bits.index(point.bits) for point in curve.points]
    means = [point.mean(column) for point in curve.points]
    spreads = [point.spread(column) for point in curve.points]
    values, bars = ([math.nan if v is None else v for v in each] for each in (means, spreads))
    return places, values, bars
