"""The one figure of a comparison: agreement and word probe by layer, masked accuracy by storage."""

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
    SNR,
    STORAGE,
    WORD_PROBE,
    Column,
    ModelRecord,
)


@styled()
def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Writes the figure, PNG or PDF by its suffix."""
    figure = new_figure(15, 3.8)
    axes = figure.subplots(1, 4)
    records = {row.name: row.figures() for row in comparison.rows}
    colors = dict(zip(records, chain([TEACHER], cycle(PALETTE)), strict=False))
    for panel, column in zip(axes, (COSINE, SNR, WORD_PROBE)):
        _draw_layers(panel, records, colors, column)
    if comparison.untrained_probe is not None:
        untrained = [100 * value for value in comparison.untrained_probe.mean]
        layers = range(1, len(untrained) + 1)
        axes[2].plot(layers, untrained, ":", color=INK, label="untrained network")
        axes[2].legend()
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
        layers, spreads = range(1, len(values) + 1), column.layer_spreads(record)
        bars = spreads if None not in spreads else None
        axes.errorbar(layers, values, bars, fmt="o-", capsize=3, color=colors[name])


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
