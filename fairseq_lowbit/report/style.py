"""How every figure of a report looks, on the page and in print."""

import io
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import ceil
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow, which is hard to see on white, and two darker ones:
# colour-blind readers can distinguish neighbours.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#332288",
    "#882255",
)
INK, MUTED, FAINT, GRID = "#1f2328", "#59636e", "#b8bfc6", "#e4e7ea"
# Of teachers and float models, of their quantized counterparts, and of levels and limits.
TEACHER, STUDENT, LEVEL = "#59636e", "#0072B2", "#D55E00"
# Of maps.
SEQUENTIAL = "cividis"
# Width in inches: two figures stand side by side on a wide screen and on paper.
NARROW = 5.0

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "image.cmap": SEQUENTIAL,
    "image.interpolation": "nearest",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    # Text as outlines and ids by content, so that a figure looks the same everywhere.
    "svg.fonttype": "path",
    "svg.hashsalt": "fairseq_lowbit",
    "pdf.fonttype": 42,
}
_DPI = 160
# fontTools logs every font that it writes into a PDF.
logging.getLogger("fontTools").setLevel(logging.WARNING)
# Estimates of a legend's size: an entry's mark and gaps are as wide as some characters.
_CHARACTERS_PER_INCH, _HANDLE = 14, 6
_ROW_HEIGHT = 0.18  # inches


def styled() -> AbstractContextManager:
    """The style of all figures, as a context or as a decorator of a function that draws."""
    return matplotlib.rc_context(_RC)


def new_figure(width: float = NARROW, height: float = 3.2) -> Figure:
    """An empty figure, sizes in inches; under :func:`styled`."""
    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Adds a legend below all axes, for which the figure grows; none for a single name."""
    if len(handles) < 2:
        return
    labels = [shortened(str(handle.get_label())) for handle in handles]
    longest = max(map(len, labels)) + _HANDLE
    columns = int(figure.get_figwidth() * _CHARACTERS_PER_INCH / longest)
    columns = min(max(1, columns), 4)
    figure.set_figheight(figure.get_figheight() + _ROW_HEIGHT * ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def shortened(name: str, most: int = 40) -> str:
    """Cuts the middle of a long name, since runs of a sweep differ at either end."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[head + 1 - most :]}"


def as_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as ``svg``, ``png`` or ``pdf``; the first call fixes its layout for all others."""
    # Without a date, so that the same figure makes the same file.
    undated = {
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
        "png": None,
    }
    file = io.BytesIO()
    with styled():
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(file, format=kind, dpi=_DPI, metadata=undated[kind])
    return file.getvalue()
