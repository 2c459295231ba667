"""The figure of probes: error rates of every model, and which layers the heads read."""

from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.evaluation.probing.tasks import Measure
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.report.style import (
    PALETTE,
    TEACHER,
    add_legend,
    as_bytes,
    new_figure,
    styled,
)

_Rows = Mapping[str, Mapping[str, Probe]]


@styled()
def draw_probes(rows: _Rows, measures: Sequence[Measure], path: Path) -> None:
    """Writes the figure, PNG or PDF by its suffix: above error rates with their intervals, below
    the learned weight of every layer.

    Args:
        rows: by the names of models, probes by the key of their measure; the first in the colour of
            a teacher.
        measures: what all of them have.
    """
    figure = new_figure(max(5.0, 1.9 * len(measures)), 5.0)
    panels = figure.add_gridspec(2, len(measures))
    colors = dict(zip(rows, chain([TEACHER], cycle(PALETTE)), strict=False))
    _draw_rates(figure.add_subplot(panels[0, :]), rows, measures, colors)
    for index, measure in enumerate(measures):
        axes = figure.add_subplot(panels[1, index])
        _draw_layers(axes, rows, measure, colors)
        if index == 0:
            axes.set_ylabel("weight of layer, %")
    add_legend(
        figure,
        [Line2D([], [], color=c, marker="o", label=name) for name, c in colors.items()],
    )
    with atomic_write(path, "wb") as file:
        file.write(as_bytes(figure, path.suffix.lstrip(".")))


def _draw_rates(
    axes: Axes, rows: _Rows, measures: Sequence[Measure], colors: Mapping[str, str]
) -> None:
    axes.set(title="error of heads on frozen features (95 % interval)", ylabel="%")
    axes.set_xticks(range(len(measures)), [measure.name for measure in measures])
    for index, (name, probes) in enumerate(rows.items()):
        shift = 0.6 * ((index + 0.5) / len(rows) - 0.5)
        for place, measure in enumerate(measures):
            rate = probes[measure.key].rate
            bounds = [[100 * (rate.value - rate.low)], [100 * (rate.high - rate.value)]]
            axes.errorbar(
                place + shift, 100 * rate.value, bounds, fmt="o", capsize=2, color=colors[name]
            )
    axes.set_ylim(bottom=0)


def _draw_layers(axes: Axes, rows: _Rows, measure: Measure, colors: Mapping[str, str]) -> None:
    """Layer 0 is the input of the first one."""
    axes.set(title=measure.name, xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, probes in rows.items():
        weights = [100 * weight for weight in probes[measure.key].layer_weights]
        axes.plot(range(len(weights)), weights, "o-", color=colors[name])
    axes.set_ylim(bottom=0)
