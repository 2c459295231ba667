"""Calibration: the scale (and shift) of least squared error, found on a grid.

A pass of its own, run before the optimizer exists; a forward never initialises anything. The same
pass alone is post-training quantization.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_lowbit.quantization.levels import LevelSet

_COARSE_SCALES = 48
_REFINED_SCALES = 17
_SHIFTS = 13
_WEIGHT_SAMPLE = 131_072


@dataclass
class Calibrator:
    """Collects an evenly spaced sample of the values a quantizer sees and fits its scale to it.

    Args:
        max_values: values kept of each batch, and values fitted to: every batch has its share.
    """

    max_values: int = 16_384
    _samples: list[Tensor] = field(default_factory=list)

    def fit(self, x: Tensor, levels: LevelSet, with_shift: bool) -> tuple[Tensor, Tensor | None]:
        """Adds ``x`` to the sample and returns scale () and shift () or None, fp32."""
        self._samples.append(thin(x, self.max_values))
        sample = thin(torch.cat(self._samples), self.max_values)
        scale, shift = fit_scale(sample[None], levels, with_shift)
        return scale[0], None if shift is None else shift[0]


def thin(x: Tensor, max_values: int) -> Tensor:
    """Up to ``max_values`` of x's values, evenly spaced, flat fp32."""
    step = -(-x.numel() // max_values)
    # A step that shares a factor with a dimension would see some of its channels only.
    while step > 1 and math.gcd(step, x.numel()) != 1:
        step += 1
    return x.detach().reshape(-1)[::step].float()


def fit_scale(
    values: Tensor, levels: LevelSet, with_shift: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scale (and shift) of least squared error of ``decode(encode(values))`` against ``values``.

    Args:
        values: [rows, n] fp32, each row with a scale of its own.
        with_shift: search a shift too (the threshold of the non-negative set).

    Returns:
        scale [rows] > 0 and shift [rows] or None. For the sign set scale = mean |x|, the exact
        optimum. An all-zero row gets scale 1 and shift 0, since any scale fits it.
    """
    if levels.kind == "sign":
        scale = values.abs().mean(1)
        return torch.where(scale > 0, scale, 1.0), None
    peak = values.abs().amax(1) / levels.hi
    is_zero = peak == 0
    scale = torch.where(is_zero, 1.0, peak)
    offset = torch.zeros_like(scale)
    factors = torch.logspace(-2.5, 0, _COARSE_SCALES, device=values.device)
    offsets = [0.0]
    if with_shift:
        # Smallest first: among equal errors, as for nearly constant values, the first one wins, and
        # a far shift would clip everything and stop its gradient.
        offsets = sorted(torch.linspace(-1.0, 1.0, _SHIFTS).tolist(), key=abs)
    scale, offset = _search(values, levels, scale, offset, factors, offsets)
    width = 10 ** (2.5 / (_COARSE_SCALES - 1))
    factors = torch.logspace(-1, 1, _REFINED_SCALES, base=width, device=values.device)
    offsets = [o / ((_SHIFTS - 1) / 2) for o in offsets]
    scale, offset = _search(values, levels, scale, offset, factors, offsets)
    scale, shift = torch.where(is_zero, 1.0, scale), torch.where(is_zero, 0.0, offset * scale)
    return scale, shift if with_shift else None


def _search(
    values: Tensor,
    levels: LevelSet,
    scale: Tensor,
    offset: Tensor,
    factors: Iterable[Tensor],
    offsets: Iterable[float],
) -> tuple[Tensor, Tensor]:
    """Best of scale * factor and offset + step, row by row; the shift is offset * scale."""
    best_error = torch.full_like(scale, math.inf)
    best_scale, best_offset = scale, offset
    for factor, step in itertools.product(factors, offsets):
        candidate, candidate_offset = scale * factor, offset + step
        column, shift = candidate[:, None], (candidate * candidate_offset)[:, None]
        decoded = levels.encode((values - shift) / column) * column
        error = (decoded - values).square().mean(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, candidate, best_scale)
        best_offset = torch.where(better, candidate_offset, best_offset)
    return best_scale, best_offset


def fit_weight_scale(weight: Tensor, levels: LevelSet, scale_shape: tuple[int, ...]) -> Tensor:
    """Scale of a weight, per tensor or, with ``scale_shape`` (out, 1, ..), per output channel."""
    weight = weight.detach().float()
    if scale_shape:
        rows = weight.flatten(1)
    elif levels.kind == "sign":
        rows = weight.reshape(1, -1)  # a mean needs no grid, so no sample either
    else:
        rows = thin(weight, _WEIGHT_SAMPLE)[None]
    return fit_scale(rows, levels)[0].reshape(scale_shape)
