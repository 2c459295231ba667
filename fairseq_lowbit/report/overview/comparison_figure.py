"""The one figure of a comparison: agreement by layer, error rates, accuracy by storage."""

from collections.abc import Mapping
from itertools import chain, cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from fairseq_lowbit.evaluation.compare import Comparison
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.report.style import INK, PALETTE, TEACHER, as_bytes, new_figure, styled
from fairseq_lowbit.runs.columns import (
    COSINE,
    MASKED_ACCURACY,
    PROBES,
    SNR,
    STORAGE,
    Column,
    ModelRecord,
)


@styled()
def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Writes the figure, PNG or PDF by its suffix."""
    figure = new_figure(17, 3.8)
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.8, 1))
    records = {row.name: row.figures() for row in comparison.rows}
    colors = dict(zip(records, chain([TEACHER], cycle(PALETTE)), strict=False))
    for panel, column in zip(axes, (COSINE, SNR)):
        _draw_layers(panel, records, colors, column)
    _draw_probes(axes[2], comparison, colors)
    _draw_storage(axes[3], records, colors)
    handles = [Line2D([], [], color=c, marker="o", label=n) for n, c in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    with atomic_write(path, "wb") as file:
        file.write(as_bytes(figure, path.suffix.lstrip(".")))


def _draw_layers(
    axes: Axes, records: Mapping[str, ModelRecord], colors: Mapping[str, str], column: Column
) -> None:
    axes.set(title=column.label, xlabel="layer", ylabel=column.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, record in records.items():
        values = column.layers(record)
        axes.plot(range(1, len(values) + 1), values, "o-", color=colors[name])


def _draw_probes(axes: Axes, comparison: Comparison, colors: Mapping[str, str]) -> None:
    """The error rates of every model side by side, and those of an untrained network."""
    known = [column for column in PROBES if column.key in comparison.teacher.probes]
    axes.set(title="error of probes", ylabel="%")
    axes.set_xticks(range(len(known)), [column.label.replace(" ", "\n") for column in known])
    for index, row in enumerate(comparison.rows):
        record, shift = row.figures(), 0.6 * (index / len(comparison.rows) - 0.5)
        for place, column in enumerate(known):
            axes.errorbar(
                place + shift,
                column.value(record),
                column.spread(record),
                fmt="o",
                capsize=2,
                color=colors[row.name],
            )
    for place, column in enumerate(known):
        rate = 100 * comparison.untrained_probes[column.key].rate.value
        label = None if place else "untrained network"
        axes.plot(place, rate, "_", markersize=14, color=INK, label=label)
    if known:
        axes.legend()


def _draw_storage(
    axes: Axes, records: Mapping[str, ModelRecord], colors: Mapping[str, str]
) -> None:
    axes.set(title=MASKED_ACCURACY.label, xlabel=STORAGE.axis, ylabel=MASKED_ACCURACY.unit)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    sizes = sorted({STORAGE.value(record) for record in records.values()})
    axes.set_xticks(sizes, [f"{size:.2f}" for size in sizes], rotation=45)
    measured = {n: r for n, r in records.items() if MASKED_ACCURACY.value(r) is not None}
    for name, record in measured.items():
        axes.plot(STORAGE.value(record), MASKED_ACCURACY.value(record), "o", color=colors[name])
    if measured:
        chance = 100 * next(iter(measured.values()))["masked_chance"]
        axes.axhline(chance, color=INK, linestyle=":", label="most frequent label")
        axes.legend()
