#!/usr/bin/env python
"""What quantization costs behind an activation function, with each way to place the levels.

    python scripts/activation_errors.py

The values are the function of a normal distribution, by its quantiles and not by chance.
"""

from collections.abc import Iterator

import torch
from rich.table import Table
from torch import Tensor

from fairseq_lowbit.precision import InputKind
from fairseq_lowbit.quantization import LevelSet, non_negative, signed
from fairseq_lowbit.quantization.calibration import fit_scale
from fairseq_lowbit.terminal import print_table

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
QUANTILES = 2048
# Mean and standard deviation of what the function reads.
NORMALS = ((0.0, 1.0), (-1.0, 1.0))


def main() -> None:
    table = Table(title="relative squared error of the best fit, by bits", title_justify="left")
    for head in ("values", "levels", *map(str, WIDTHS)):
        table.add_column(head, justify="left" if head in ("values", "levels") else "right")
    for kind in (InputKind.GELU, InputKind.SILU):
        for mean, std in NORMALS:
            values = activations(kind, mean, std)
            for name, levels in ways(kind):
                errors = (f"{relative_error(values, each):.4f}" for each in levels)
                table.add_row(f"{kind} of N({mean:g}, {std:g})", name, *errors)
    print_table(table)


def ways(kind: InputKind) -> Iterator[tuple[str, list[LevelSet]]]:
    """Three ways to place levels, each with a set for every width."""
    yield "signed (sign at 1 bit)", [signed(bits) for bits in WIDTHS]
    yield "non-negative", [non_negative(bits) for bits in WIDTHS]
    yield "non-negative with origin", [non_negative(bits, kind.origin) for bits in WIDTHS]


def activations(kind: InputKind, mean: float, std: float) -> Tensor:
    """The function ``kind`` of evenly spaced quantiles of a normal distribution."""
    shares = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    normal = mean + std * torch.special.ndtri(shares)
    return getattr(torch.nn.functional, kind)(normal).float()


def relative_error(values: Tensor, levels: LevelSet) -> float:
    """Sum of squared errors over sum of squares, with the scale and shift of calibration."""
    x = values - levels.origin
    scale, shift = fit_scale(x[None], levels, with_shift=levels.lowest == 0)
    x = x if shift is None else x - shift
    decoded = levels.value(levels.encode(x / scale)) * scale + levels.origin
    return float((decoded - values).square().sum() / values.square().sum())


if __name__ == "__main__":
    main()
