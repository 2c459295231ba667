"""Quality against cost, the Pareto front marked."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from fairseq_lowbit.report.drawing import Drawing
from fairseq_lowbit.report.overview.choice import front, note_on_grey, placed, standing_out
from fairseq_lowbit.report.style import FAINT, INK, MUTED, add_legend, new_figure, styled
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.runs.columns import DISTILLATION_LOSS, QUALITIES, RUNTIME, STORAGE, Column

_AXES = (STORAGE, RUNTIME)
_MARKERS = {True: "D", False: "o"}  # of float and of quantized models
_FEWEST = 2
_LOG_RATIO = 1.5


def tradeoff_drawings(subjects: Sequence[Subject], colors: Mapping[str, str]) -> list[Drawing]:
    """A figure for every quality and cost that are known of two models or more; of the validation
    loss if nothing was measured."""
    drawings = _drawings(subjects, colors, QUALITIES)
    return drawings or _drawings(subjects, colors, [DISTILLATION_LOSS])


def _drawings(
    subjects: Sequence[Subject], colors: Mapping[str, str], qualities: Sequence[Column]
) -> list[Drawing]:
    pairs = ((quality, cost) for quality in qualities for cost in _AXES)
    return [
        _drawing(known, colors, cost, quality)
        for quality, cost in pairs
        if len(known := placed(subjects, cost, quality)) >= _FEWEST
    ]


@styled()
def _drawing(
    subjects: Sequence[Subject], colors: Mapping[str, str], cost: Column, quality: Column
) -> Drawing:
    figure = new_figure(height=3.4)
    axes = figure.subplots()
    best = front(subjects, cost, quality)
    _draw_front(axes, best, cost, quality)
    for subject in subjects:
        axes.errorbar(
            cost.value(subject.record),
            quality.value(subject.record),
            quality.spread(subject.record),
            fmt=_MARKERS[subject.is_float],
            color=colors[subject.name],
            markeredgecolor=INK if subject in best else "white",
            markeredgewidth=1.1 if subject in best else 0.5,
            elinewidth=1,
            zorder=2 if colors[subject.name] == FAINT else 3,
        )
    axes.set(xlabel=cost.axis, ylabel=quality.axis)
    axes.margins(0.08)
    _set_cost_scale(axes, [cost.value(subject.record) for subject in subjects])
    shown = standing_out(subjects, colors)
    add_legend(figure, [_mark(s, colors[s.name]) for s in shown])
    has_spread = any(quality.spread(subject.record) is not None for subject in subjects)
    spreads = " Bars: the 95 % interval." if has_spread else ""
    points = ", ".join(
        f"{s.name}: {quality.text(s.record)} {quality.unit} at {cost.text(s.record)} {cost.unit}"
        for s in best
    )
    notes = f"{spreads}{note_on_grey(subjects, colors)}"
    return Drawing(
        f"{quality.key}_{cost.key}",
        f"{quality.label[0].upper()}{quality.label[1:]} and {cost.label}",
        "Each point is a model, a diamond in float. The line is the Pareto front: no model is both "
        f"cheaper and better than a ringed one.{notes}",
        figure,
        f"On the Pareto front {points}",
    )


def _draw_front(axes: Axes, best: Sequence[Subject], cost: Column, quality: Column) -> None:
    """A staircase: the best quality at each cost."""
    costs = [cost.value(subject.record) for subject in best]
    qualities = [quality.value(subject.record) for subject in best]
    axes.plot(costs, qualities, drawstyle="steps-post", color=MUTED, linewidth=1, zorder=1)


def _set_cost_scale(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis with readable ticks, unless the costs are nearly the same."""
    if min(costs) > 0 and max(costs) > _LOG_RATIO * min(costs):
        axes.set_xscale("log")
        ticks = (1, 2, 5) if max(costs) > 10 * min(costs) else (1, 1.5, 2, 3, 4, 5, 7)
        axes.xaxis.set_major_locator(LogLocator(subs=ticks))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())


def _mark(subject: Subject, color: str) -> Line2D:
    marker = _MARKERS[subject.is_float]
    return Line2D([], [], linestyle="", marker=marker, color=color, label=subject.name)
