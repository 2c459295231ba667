"""Noise, clipping and use of levels of a model's quantizers, as maps by layer and operator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fairseq_lowbit.monitoring.health import QuantizerHealth, split_layer
from fairseq_lowbit.report.drawing import Drawing, numbers
from fairseq_lowbit.report.style import INK, NARROW, SEQUENTIAL, new_figure

# Labels of the quantizers in a layer, in the order in which data passes them.
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
    """Quantizers by row and column; where there is none a cell is missing."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], QuantizerHealth]


def _tables(quantizers: Sequence[QuantizerHealth]) -> list[_Table]:
    """Weights and activations by layer and operator, then what lies outside of the layers."""
    inside = [q for q in quantizers if q.layer is not None]
    outside = [q for q in quantizers if q.layer is None]
    tables = (
        _table("weights", _WEIGHTS, [q for q in inside if _is_weight(q)]),
        _table("activations", _ACTIVATIONS, [q for q in inside if not _is_weight(q)]),
        _table_outside(outside),
    )
    return [table for table in tables if table.cells]


def _table(title: str, labels: dict[str, str], members: list[QuantizerHealth]) -> _Table:
    places = [place for place in labels if any(_place(q) == place for q in members)]
    layers = range(1 + max((q.layer for q in members), default=0))
    cells = {(q.layer, places.index(_place(q))): q for q in members}
    return _Table(title, [str(n + 1) for n in layers], [labels[place] for place in places], cells)


def _table_outside(members: list[QuantizerHealth]) -> _Table:
    modules = list(dict.fromkeys(_place(q).rpartition(".")[0] for q in members))
    cells = {
        (modules.index(_place(q).rpartition(".")[0]), int(not _is_weight(q))): q for q in members
    }
    return _Table(
        "outside the layers", [short_name(m) for m in modules], ["weight", "input"], cells
    )


def _place(quantizer: QuantizerHealth) -> str:
    """Module and operand inside of its layer, ``fc1.weight`` or ``self_attn.query``."""
    return split_layer(quantizer.name)[1].removesuffix("_quantizer")


def _is_weight(quantizer: QuantizerHealth) -> bool:
    return quantizer.name.endswith("weight_quantizer")


def short_name(module: str) -> str:
    """The label of a module outside of the layers."""
    return module.removeprefix("feature_extractor.").removeprefix("encoder.").removesuffix(".0")


def quantizer_drawings(quantizers: Sequence[QuantizerHealth]) -> list[Drawing]:
    """Maps of noise, of clipping and of the use of levels."""
    return [_noise_drawing(quantizers), _clipping_drawing(quantizers), _levels_drawing(quantizers)]


def _noise_drawing(quantizers: Sequence[QuantizerHealth]) -> Drawing:
    def shade(table: _Table) -> Normalize:
        values = [q.sqnr_db for q in table.cells.values()]
        middle, half = (max(values) + min(values)) / 2, max(3.0, (max(values) - min(values)) / 2)
        return Normalize(middle - half, middle + half)

    return Drawing(
        "sqnr",
        "signal-to-quantization-noise ratio by layer",
        "Power of what a quantizer is given over the power of its error, in dB: 6 dB more is half "
        "the error. Bright is better, each map on a scale of its own.",
        _maps(quantizers, lambda q: q.sqnr_db, lambda q: f"{q.sqnr_db:.1f}", shade),
        _in_numbers(quantizers, lambda q: q.sqnr_db, "SQNR", "dB"),
    )


def _clipping_drawing(quantizers: Sequence[QuantizerHealth]) -> Drawing:
    return Drawing(
        "clipping",
        "clipped values by layer",
        "The share of values more than half a step beyond the outermost level. Dark is better: "
        "much clipping means a scale that is too small, none together with few levels in use one "
        "that is too large.",
        _maps(
            quantizers,
            lambda q: q.clipped,
            lambda q: f"{q.clipped:.0%}",
            lambda table: Normalize(0, 1),
        ),
        _in_numbers(quantizers, lambda q: 100 * q.clipped, "clipped values", "%"),
    )


def _levels_drawing(quantizers: Sequence[QuantizerHealth]) -> Drawing:
    return Drawing(
        "levels",
        "use of the levels by layer",
        "The entropy of how often each level occurs, in bits: how much of the bits that are stored "
        "carries information. Bright: all of it; dark: nearly all values fall on one level.",
        _maps(
            quantizers,
            lambda q: q.entropy / q.bits,
            lambda q: f"{q.entropy:.2f}/{q.bits}",
            lambda table: Normalize(0, 1),
        ),
        _in_numbers(quantizers, lambda q: 100 * q.entropy / q.bits, "share of the bits used", "%"),
    )


def _in_numbers(
    quantizers: Sequence[QuantizerHealth],
    value: Callable[[QuantizerHealth], float],
    name: str,
    unit: str,
) -> str:
    return numbers({q.name.removesuffix("_quantizer"): value(q) for q in quantizers}, name, unit)


def _maps(
    quantizers: Sequence[QuantizerHealth],
    value: Callable[[QuantizerHealth], float],
    text: Callable[[QuantizerHealth], str],
    shade: Callable[[_Table], Normalize],
) -> Figure:
    """The tables below each other, a coloured cell with a text per quantizer."""
    tables = _tables(quantizers)
    heights = [_ROW * len(table.rows) for table in tables]
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
