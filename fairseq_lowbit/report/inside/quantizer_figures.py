"""Noise, use of levels and ranges of a model's quantizers, by layer and operator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fairseq_lowbit.quantization import signed
from fairseq_lowbit.report.drawing import Drawing, numbers
from fairseq_lowbit.report.inside.anatomy import Anatomy
from fairseq_lowbit.report.inside.quantizers import QuantizerAnatomy
from fairseq_lowbit.report.style import (
    FAINT,
    INK,
    LEVEL,
    MUTED,
    NARROW,
    SEQUENTIAL,
    STUDENT,
    new_figure,
)

# Places in a layer and what they are called, in the order in which data passes them.
_WEIGHTS = {
    "self_attn.q_proj.weight": "q_proj",
    "self_attn.k_proj.weight": "k_proj",
    "self_attn.v_proj.weight": "v_proj",
    "self_attn.out_proj.weight": "out_proj",
    "fc1.weight": "fc1",
    "fc2.weight": "fc2",
}
_ACTIVATIONS = {
    "self_attn.input": "q, k, v\ninput",
    "self_attn.q_proj.input": "q_proj\ninput",
    "self_attn.k_proj.input": "k_proj\ninput",
    "self_attn.v_proj.input": "v_proj\ninput",
    "self_attn.query": "query",
    "self_attn.key": "key",
    "self_attn.value": "value",
    "self_attn.probabilities": "proba-\nbilities",
    "self_attn.out_proj.input": "out_proj\ninput",
    "fc1.input": "fc1\ninput",
    "fc2.input": "fc2\ninput",
}
_ROW = 0.27


@dataclass(frozen=True)
class _Table:
    """Quantizers by row and column; a place without one has no cell."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], QuantizerAnatomy]


def _tables(anatomy: Anatomy) -> list[_Table]:
    """Weights and activations by layer and operator, then what lies outside of the layers."""
    layers = [str(layer + 1) for layer in range(anatomy.layers)]
    inside = [q for q in anatomy.quantizers if q.health.layer is not None]
    tables = [
        _table(title, layers, labels, [q for q in inside if q.is_weight == is_weight])
        for title, labels, is_weight in (
            ("weights", _WEIGHTS, True),
            ("activations", _ACTIVATIONS, False),
        )
    ]
    outside = [q for q in anatomy.quantizers if q.health.layer is None]
    return [table for table in (*tables, _table_outside(outside)) if table.cells]


def _table(
    title: str, layers: list[str], labels: dict[str, str], members: list[QuantizerAnatomy]
) -> _Table:
    places = [place for place in labels if any(q.place == place for q in members)]
    cells = {(q.health.layer, places.index(q.place)): q for q in members}
    return _Table(title, layers, [labels[place] for place in places], cells)


def _table_outside(members: list[QuantizerAnatomy]) -> _Table:
    modules = list(dict.fromkeys(q.place.rpartition(".")[0] for q in members))
    cells = {(modules.index(q.place.rpartition(".")[0]), int(not q.is_weight)): q for q in members}
    return _Table(
        "outside the layers", [short_name(m) for m in modules], ["weight", "input"], cells
    )


def short_name(module: str) -> str:
    """Of a module outside of the layers."""
    return module.removeprefix("feature_extractor.").removeprefix("encoder.").removesuffix(".0")


def _by_name(anatomy: Anatomy, value: Callable[[QuantizerAnatomy], float]) -> dict[str, float]:
    return {q.health.name.removesuffix("_quantizer"): value(q) for q in anatomy.quantizers}


def noise_drawing(anatomy: Anatomy) -> Drawing:
    """Signal-to-quantization-noise ratios as maps."""
    tables = _tables(anatomy)

    def shade(table: _Table) -> Normalize:
        values = [q.health.sqnr_db for q in table.cells.values()]
        middle, half = (max(values) + min(values)) / 2, max(3.0, (max(values) - min(values)) / 2)
        return Normalize(middle - half, middle + half)

    figure = _maps(
        tables, lambda q: q.health.sqnr_db, lambda q: f"{q.health.sqnr_db:.1f}", shade, lines=1
    )
    references = ", ".join(
        f"{_normal_sqnr_db(bits):.1f} dB ({_bits(bits)})"
        for bits in sorted({q.health.bits for q in anatomy.quantizers})
    )
    return Drawing(
        "sqnr",
        "signal-to-quantization-noise ratio by layer",
        "Power of what a quantizer is given over the power of its error, in dB: 6 dB more is half "
        "the error. Bright is better, each map on a scale of its own. For comparison, normally "
        f"distributed values at their best scale: {references}.",
        figure,
        numbers(_by_name(anatomy, lambda q: q.health.sqnr_db), "SQNR", "dB"),
    )


@cache
def _normal_sqnr_db(bits: int) -> float:
    """Of the normal distribution with the scale of least error, by its density on a fine grid."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    scale = torch.logspace(-2, 0.5, 800, dtype=torch.float64)[:, None]
    levels = signed(bits)
    error = (levels.value(levels.encode(x / scale)) * scale - x).square() @ density
    return float(10 * torch.log10(x.square() @ density / error.min()))


def _bits(bits: int) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"


def levels_drawing(anatomy: Anatomy) -> Drawing:
    """Effective bits and shares of levels used as maps."""

    def text(quantizer: QuantizerAnatomy) -> str:
        health = quantizer.health
        return f"{health.entropy:.2f}/{health.bits}\n{health.levels_used:.0%}"

    figure = _maps(
        _tables(anatomy),
        lambda q: q.health.entropy / q.health.bits,
        text,
        lambda table: Normalize(0, 1),
        lines=2,
    )
    return Drawing(
        "levels",
        "use of the precious bits",
        "Above, effective bits: the entropy of how often each level occurs, of the bits that are "
        "paid for. Below, the share of all levels that occur at all. Bright: every bit says "
        "something; dark: nearly all values fall on one level.",
        figure,
        numbers(_by_name(anatomy, lambda q: 100 * q.health.levels_used), "levels used", "%"),
    )


def _maps(
    tables: list[_Table],
    value: Callable[[QuantizerAnatomy], float],
    text: Callable[[QuantizerAnatomy], str],
    shade: Callable[[_Table], Normalize],
    lines: int,
) -> Figure:
    """The tables below each other, a coloured cell with ``lines`` of text per quantizer."""
    heights = [_ROW * (0.5 + 0.5 * lines) * len(table.rows) for table in tables]
    figure = new_figure(NARROW, sum(heights) + 0.75 * len(tables))
    panels = figure.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        values = np.full((len(table.rows), len(table.columns)), np.nan)
        for place, quantizer in table.cells.items():
            values[place] = value(quantizer)
        image = axes.imshow(values, norm=shade(table), cmap=SEQUENTIAL, aspect="auto")
        for (row, column), quantizer in table.cells.items():
            color = _readable_on(image.cmap(image.norm(values[row, column])))
            axes.text(column, row, text(quantizer), color=color, size=8, ha="center", va="center")
        rotation = 90 if len(table.columns) > 8 else 0
        axes.set_xticks(range(len(table.columns)), table.columns, rotation=rotation)
        axes.set_yticks(range(len(table.rows)), table.rows)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(table.title, weight="bold")
        if table.rows[0].isdigit():
            axes.set_ylabel("layer")
    return figure


def _readable_on(color: tuple[float, ...]) -> str:
    red, green, blue = color[:3]
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


@dataclass(frozen=True)
class _RangePanel:
    """Activation quantizers along an axis; ``members`` by their place on it."""

    title: str
    labels: list[str]
    members: dict[int, QuantizerAnatomy]

    @property
    def is_by_layer(self) -> bool:
        return self.labels[0].isdigit()


def ranges_drawing(anatomy: Anatomy) -> Drawing:
    """Quantiles of what activation quantizers see against their levels; there must be one."""
    panels = _range_panels(anatomy)
    places = _range_places(panels)
    rows = max(rows.stop for rows, _ in places)
    figure = new_figure(NARROW, 0.5 + 1.55 * rows)
    grid = figure.add_gridspec(rows, 2)
    for panel, place in zip(panels, places, strict=True):
        _draw_ranges(figure.add_subplot(grid[place]), panel)
    figure.supylabel("value ÷ outermost level", size=9, color=MUTED)
    figure.legend(
        handles=[
            Line2D([], [], color=STUDENT, linewidth=4, label="1 to 99% of the values"),
            Line2D([], [], color=STUDENT, linewidth=1, label="0.1 to 99.9%"),
            Patch(color=LEVEL, alpha=0.2, label="decoded levels"),
        ],
        loc="outside upper center",
        ncols=3,
    )
    clipped = _by_name(anatomy, lambda q: 100 * q.health.clipped)
    return Drawing(
        "ranges",
        "activation ranges and clipping",
        "What each activation quantizer is given (blue; the dot is the median) against what it can "
        "say (orange: its decoded levels, above 4 bits their range). 1 is its outermost level, "
        "where every frame has a scale of its own that of the frame. Numbers: the share of values "
        "more than half a step beyond the levels.",
        figure,
        numbers(
            {n: v for n, v in clipped.items() if not n.endswith(".weight")}, "clipped values", "%"
        ),
    )


def _range_places(panels: list[_RangePanel]) -> list[tuple[slice, slice]]:
    """Rows and columns of two columns: panels of a few layers beside each other."""
    places, row, is_half = [], 0, False
    for panel in panels:
        if panel.is_by_layer and len(panel.labels) <= 6:
            places.append((slice(row, row + 1), slice(int(is_half), int(is_half) + 1)))
            row, is_half = row + is_half, not is_half
        else:
            row, is_half = row + is_half, False
            places.append((slice(row, row + 1), slice(0, 2)))
            row += 1
    return places


def _range_panels(anatomy: Anatomy) -> list[_RangePanel]:
    panels = []
    for table in _tables(anatomy):
        for column, label in enumerate(table.columns):
            members = {row: q for (row, c), q in table.cells.items() if c == column}
            members = {row: q for row, q in members.items() if not q.is_weight}
            if members:
                title = label.replace("-\n", "").replace("\n", " ")
                title = title if table.rows[0].isdigit() else f"{title}, {table.title}"
                panels.append(_RangePanel(title, table.rows, members))
    return panels


def _draw_ranges(axes: Axes, panel: _RangePanel) -> None:
    places, members = list(panel.members), list(panel.members.values())
    bits = {q.health.bits for q in members}
    axes.set_title(f"{panel.title}, {_bits(*bits)}" if len(bits) == 1 else panel.title)
    top = max(max(q.quantiles[-1], q.levels[-1]) for q in members)
    bottom = min(min(q.quantiles[0], q.levels[0]) for q in members)
    height = top - bottom
    axes.set_ylim(bottom - 0.06 * height, top + 0.25 * height)
    axes.set_xlim(-0.6, len(panel.labels) - 0.4)
    axes.set_xticks(range(len(panel.labels)), panel.labels)
    if panel.is_by_layer:
        axes.set_xlabel("layer", labelpad=0)
    else:
        axes.tick_params(axis="x", rotation=90)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(visible=False, axis="x")
    axes.axhline(0, color=FAINT, linewidth=0.8)
    _draw_levels(axes, places, members)
    _draw_quantiles(axes, places, members)
    for place, quantizer in panel.members.items():
        clipped = quantizer.health.clipped
        text = "<1%" if 0 < clipped < 0.005 else f"{clipped:.0%}"
        axes.text(place, top + 0.06 * height, text, ha="center", size=8, color=INK)


def _draw_levels(axes: Axes, places: list[int], members: list[QuantizerAnatomy]) -> None:
    lowest = np.array([q.levels[0] for q in members])
    highest = np.array([q.levels[-1] for q in members])
    axes.bar(places, highest - lowest, 0.62, lowest, color=LEVEL, alpha=0.2)
    levels = np.concatenate([q.levels for q in members])
    at = np.repeat(places, [len(q.levels) for q in members])
    axes.hlines(levels, at - 0.31, at + 0.31, color=LEVEL, linewidth=1)


def _draw_quantiles(axes: Axes, places: list[int], members: list[QuantizerAnatomy]) -> None:
    far_low, low, median, high, far_high = np.array([q.quantiles for q in members]).T
    axes.vlines(places, far_low, far_high, color=STUDENT, linewidth=1)
    axes.vlines(places, low, high, color=STUDENT, linewidth=4)
    axes.plot(places, median, "o", color="white", markersize=3.5, markeredgecolor=STUDENT)
