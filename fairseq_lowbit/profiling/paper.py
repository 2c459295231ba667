"""Table 1 of Yeh et al., arXiv 2301.00652: the cells that are known, to stand beside ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SOURCE = "Yeh et al., arXiv 2301.00652, Table 1: SUPERB ASR, no language model, LibriSpeech 960 h"
# What a cell is, and its unit.
CELLS = {
    "wer": "WER %",
    "wer_hubert_loss": "WER %, HuBERT loss",
    "storage_mb": "storage MB",
    "gflops": "GFLOPs",
    "gquantops": "QuantOps Gbit",
    "runtime": "runtime",
}
# Unit of the paper's QuantOps. The paper does not name it; only this one fits its model.
GIBI = 2**30 / 1e9
UNITS = (
    "QuantOps: by the arithmetic below, the paper's figures are in units of 2^30 (Gibit); ours are "
    "in 1e9 (Gbit). Behind = stands\nthe paper's figure in Gbit; the difference is ours less that."
)
ORIGINS = (
    "published: read in the paper. derived: by arithmetic that agrees with every published cell. "
    "guessed: may not be the paper's.\nReasons were found by arithmetic, as the paper does not say "
    "how it counted."
)


@dataclass(frozen=True)
class Cell:
    """A figure of the table.

    Attributes:
        value: or the lower end of what is known.
        upper: the upper end; None where one value is known.
        unit: of the value, in ours.
        digits: behind its decimal point, as printed.
        note: why an honest count differs.
    """

    value: float
    upper: float | None = None
    unit: float = 1.0
    digits: int = 2
    origin: Literal["published", "derived", "guessed"] = "published"
    note: str | None = None

    @property
    def converted(self) -> float:
        """The value in our unit."""
        return self.value * self.unit

    def difference(self, ours: float) -> float:
        """How far ``ours`` lies above the cell, or below; 0 inside of what is known."""
        upper = self.value if self.upper is None else self.upper
        return ours - min(max(ours, self.converted), upper * self.unit)

    def describe_difference(self, ours: float) -> str:
        """The difference, also in percent; ``0.00`` if the digits of the cell do not show it."""
        difference, half = self.difference(ours), 0.5 * 10**-self.digits
        if abs(difference) < half * self.unit:
            return "0.00"
        places = 1 if half < 0.001 * self.value else 0
        return f"{difference:+.2f} ({difference / self.converted:+.{places}%})"

    def __str__(self) -> str:
        ends = (self.value,) if self.upper is None else (self.value, self.upper)
        return " to ".join(f"{end:.{self.digits}f}" for end in ends)

    def describe(self) -> str:
        """As published, with the value in our unit where the units differ."""
        same = f" Gibit = {self.converted:.{self.digits}f}" if self.unit == GIBI else ""
        return f"{self}{same}"


@dataclass(frozen=True)
class PaperRow:
    """One row.

    Attributes:
        name: as in the table.
        precision: of this package.
        model: group of ``config/model``.
        cells: the known ones, by the keys of :data:`CELLS`; sizes in 1e6 bytes, FLOPs in 1e9 and
            QuantOps in 2^30 for 10 s of audio, runtime relative to HuBERT-FastConv.
        without_final_projection: its stored size leaves out ``final_proj``.
    """

    name: str
    precision: str = "float"
    model: str = "fastconv_base"
    cells: Mapping[str, Cell] = field(default_factory=dict)
    without_final_projection: bool = False


# Every sum below is checked in tests/profiling/test_paper.py.
_FLOAT = (
    "the paper's figure takes 500 frames, where the convolutions give 499, and 2 * 768^2 "
    "multiply-accumulates per frame and layer for the attention products, where they are 2 * 768 * "
    "frames: extractor 6.59 + positional conv 4.72 + projection 0.39 + linears 84.93 + attention "
    "14.16 = 110.79 G. Counted: 6.59 + 4.71 + 0.39 + 84.76 + 9.18 = 105.64 G"
)
_BASE = (
    "as for HuBERT-FastConv, with an extractor of 49.08 G: 153.28 G in the paper's way, 1.38 times "
    "its 110.79. Counted: 148.12 G, 1.40 times 105.64"
)
_DISTIL = (
    "not explained by the paper: the extractor of HuBERT Base and two layers are 70.70 G in its "
    "way, 0.64 of its 110.79 (counted: 69.84 G, 0.66 of 105.64); 0.73 would be 80.88 G"
)
_FEED_FORWARD = (
    "the paper's figure is that of the two feed-forward linears of each layer alone, at 500 frames "
    "and in units of 2^30: 12 * 2 * 8 * 768^2 * 500 / 2^30 = 52.73, times 8 bits 421.88. Its "
    "storage has all linears quantized. Counted: 84.76 G operations"
)
_BITL_FLOPS = (
    "not explained by the paper: 28.50 less than its 110.79, while the linears are 84.93 (the "
    "feed-forward ones 56.62, the others 28.31). Counted: extractor 6.59 + positional conv 4.71 + "
    "projection 0.39 + attention 9.18 = 20.87 G"
)
_BITL_RUNTIME = "follows from the row's FLOPs and QuantOps: (82.29 + 52.73 / 66.5) / 110.79 = 0.75"
_BITLA_QUANTOPS = (
    "not explained by the paper: 4.5 times the 421.88 of the feed-forward linears, while all "
    "linears and the attention products, in the paper's way, are 1.75 times as much. Counted: "
    "(84.76 + 9.18) G operations of 8 bits"
)
_BITLA_FLOPS = (
    "extractor 6.59 + positional conv 4.72 + projection 0.39 = 11.70 G in the paper's way; the "
    "other 0.12 are not explained by the paper. Counted: 11.69 G"
)
_BITLA_W2_RUNTIME = (
    "not explained by the paper: with the 11.82 G of W1A1, 0.15 leaves 282 to 356 Gibit at K = "
    "66.5 and the 0.12 of W1A1 61 to 135, but two bits cost twice as much as one. Counted: 187.89 "
    "and 93.94 Gbit"
)
_BITLA_W1_RUNTIME = "counted, 0.124 at K = 66.5, which rounds to it"


def _derived(value: float, note: str | None = None, digits: int = 2) -> Cell:
    return Cell(value, digits=digits, origin="derived", note=note)


def _quantops(
    value: float, note: str, origin: Literal["published", "derived", "guessed"] = "published"
) -> Cell:
    return Cell(value, unit=GIBI, origin=origin, note=note)


_SQWQ = {"gquantops": _quantops(421.88, _FEED_FORWARD)}

TABLE = (
    PaperRow(
        "HuBERT Base",
        model="hubert_base",
        cells={
            "wer": Cell(6.42),
            "storage_mb": Cell(189.1, upper=189.4, digits=1),
            "gflops": _derived(153, _BASE, digits=0),
            "runtime": Cell(1.38, note=_BASE),
        },
    ),
    PaperRow(
        "HuBERT-FastConv",
        cells={
            "wer": Cell(7.06),
            "storage_mb": Cell(184.42),
            "gflops": Cell(110.79, note=_FLOAT),
            "runtime": Cell(1.0),
        },
    ),
    PaperRow(
        "DistilHuBERT",
        model="distilhubert",
        cells={
            "wer": Cell(13.37),
            "storage_mb": Cell(46.98),
            "runtime": Cell(0.73, note=_DISTIL),
        },
        without_final_projection=True,
    ),
    PaperRow("SqWQ W8", "sqwq_w8", cells={"storage_mb": Cell(99.65), **_SQWQ}),
    PaperRow("SqWQ W4", "sqwq_w4", cells={"storage_mb": Cell(57.19), **_SQWQ}),
    PaperRow(
        "SqWQ W2",
        "sqwq_w2",
        cells={"wer": Cell(12.56), "storage_mb": _derived(35.95), **_SQWQ},
    ),
    PaperRow("SqWQ W1", "sqwq_w1", cells={"storage_mb": _derived(25.34), **_SQWQ}),
    PaperRow(
        "BiT-L W8A8",
        "bitl_w8a8",
        cells={
            "wer": Cell(7.03),
            "storage_mb": _derived(99.49),
            "gquantops": _quantops(421.88, _FEED_FORWARD, "derived"),
        },
    ),
    PaperRow(
        "BiT-L W2A2",
        "bitl_w2a2",
        cells={"wer": Cell(10.80), "storage_mb": _derived(35.79)},
    ),
    PaperRow(
        "BiT-L W1A1",
        "bitl_w1a1",
        cells={
            "storage_mb": Cell(25.17),
            "gflops": Cell(82.29, note=_BITL_FLOPS),
            "gquantops": _quantops(52.73, _FEED_FORWARD),
            "runtime": Cell(0.75, note=_BITL_RUNTIME),
        },
    ),
    PaperRow(
        "BiT-LA W8A8",
        "bitla_w8a8",
        cells={
            "wer": Cell(7.07),
            "storage_mb": _derived(99.54),
            "gquantops": _quantops(1898.44, _BITLA_QUANTOPS, "guessed"),
        },
    ),
    PaperRow(
        "BiT-LA W2A2",
        "bitla_w2a2",
        cells={
            "wer": Cell(12.68),
            "storage_mb": Cell(35.84),
            "runtime": Cell(0.15, note=_BITLA_W2_RUNTIME),
        },
    ),
    PaperRow(
        "BiT-LA W1A1",
        "bitla_w1a1",
        cells={
            "wer": Cell(15.96),
            "wer_hubert_loss": Cell(18.93),
            "storage_mb": Cell(25.23),
            "gflops": Cell(11.82, note=_BITLA_FLOPS),
            "runtime": Cell(0.12, note=_BITLA_W1_RUNTIME),
        },
    ),
)


def paper_wer(precision: str, loss: str) -> float | None:
    """HuBERT-FastConv's word error rate in %; None where it is not known.

    Args:
        precision: a name without rules, ``float`` for the teacher.
        loss: ``distillation`` or ``hubert``.
    """
    rows = (r for r in TABLE if r.precision == precision and r.model == "fastconv_base")
    key = "wer_hubert_loss" if loss == "hubert" and precision != "float" else "wer"
    cell = next((row.cells.get(key) for row in rows), None)
    return None if cell is None else cell.value
