"""Calibration: the scale (and shift) that fits given values.

A pass of its own, run before the optimizer exists; a forward never initialises anything. The same
pass alone is post-training quantization.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.quantization.levels import SMALLEST_SCALE, LevelSet

CRITERIA = ("mse", "absmax", "percentile")
_COARSE_SCALES = 48
_REFINED_SCALES = 17
_SHIFTS = 13
_WEIGHT_SAMPLE = 131_072
# Values that are decoded at once while candidates are compared, 4 MB.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Criterion:
    """What makes a scale fit.

    Attributes:
        name: ``mse`` (least squared error), ``absmax`` (nothing clipped) or ``percentile``
            (that percentage of the magnitudes not clipped). At one bit the sign set has
            mean|x| in any case, the optimum of the first.
        percentile: above 0, up to 100.

    Raises:
        LowbitError: a criterion or a percentile that does not exist.
    """

    name: str = "mse"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        if self.name not in CRITERIA:
            raise LowbitError(
                f"calibration criterion {self.name!r}; allowed are {', '.join(CRITERIA)}"
            )
        if not 0 < self.percentile <= 100:
            raise LowbitError(f"calibration percentile {self.percentile}; want above 0, up to 100")


MSE = Criterion()


@dataclass
class Calibrator:
    """Collects an evenly spaced sample of the values a quantizer sees and fits its scale to it.

    Args:
        criterion: what makes the scale fit.
        max_values: values kept of each batch, and values fitted to: every batch has its share.
    """

    criterion: Criterion = MSE
    max_values: int = 16_384
    _samples: list[Tensor] = field(default_factory=list)

    def fit(self, x: Tensor, levels: LevelSet, with_shift: bool) -> tuple[Tensor, Tensor | None]:
        """Adds ``x`` to the sample and returns scale () and shift () or None, fp32."""
        self._samples.append(thin(x, self.max_values))
        sample = thin(torch.cat(self._samples), self.max_values)
        scale, shift = fit_scale(sample[None], levels, with_shift, self.criterion)
        return scale[0], None if shift is None else shift[0]


def thin(x: Tensor, max_values: int) -> Tensor:
    """Up to ``max_values`` of x's values, evenly spaced, flat fp32."""
    step = -(-x.numel() // max_values)
    # A step that shares a factor with a dimension would see some of its channels only.
    while step > 1 and math.gcd(step, x.numel()) != 1:
        step += 1
    return x.detach().reshape(-1)[::step].float()


def fit_scale(
    values: Tensor, levels: LevelSet, with_shift: bool = False, criterion: Criterion = MSE
) -> tuple[Tensor, Tensor | None]:
    """Scale (and shift) with which ``decode(encode(values))`` fits ``values``.

    Args:
        values: [rows, n] fp32, each row with a scale of its own.
        with_shift: search a shift too (the threshold of the non-negative set); it stays 0 under
            any criterion but mse.

    Returns:
        scale [rows] > 0 and shift [rows] or None. For the sign set scale = mean |x|, the exact
        optimum. An all-zero row gets shift 0 and scale 1, which any other would do as well as, but
        the smallest one where zero is no level.
    """
    if levels.is_sign:
        return values.abs().mean(1).clamp_min(SMALLEST_SCALE), None
    peak = _peak(values, criterion) / levels.highest
    is_zero = peak == 0
    scale = torch.where(is_zero, 1.0, peak)
    offset = torch.zeros_like(scale)
    if criterion.name == "mse":
        scale, offset = _least_error(values, levels, scale, with_shift)
    any_scale = 1.0 if levels.has_zero else SMALLEST_SCALE
    scale, shift = torch.where(is_zero, any_scale, scale), torch.where(is_zero, 0.0, offset * scale)
    return scale, shift if with_shift else None


def _peak(values: Tensor, criterion: Criterion) -> Tensor:
    """The magnitude per row that the outermost level shall reach."""
    magnitudes = values.abs()
    if criterion.name == "percentile":
        peak = magnitudes.quantile(criterion.percentile / 100, dim=1)
        return torch.where(peak > 0, peak, magnitudes.amax(1))  # zeros may be more than that share
    return magnitudes.amax(1)


def _least_error(
    values: Tensor, levels: LevelSet, peak: Tensor, with_shift: bool
) -> tuple[Tensor, Tensor]:
    """Scale and, in units of it, offset of least squared error: a coarse grid below the scale
    that clips nothing, then a fine one around the best."""
    factors = torch.logspace(-2.5, 0, _COARSE_SCALES, device=values.device)
    offsets = [0.0]
    if with_shift:
        # Smallest first: among equal errors, as for nearly constant values, the first one wins, and
        # a far shift would clip everything and stop its gradient.
        offsets = sorted(torch.linspace(-1.0, 1.0, _SHIFTS).tolist(), key=abs)
    scale, offset = _search(values, levels, peak, torch.zeros_like(peak), factors, offsets)
    width = 10 ** (2.5 / (_COARSE_SCALES - 1))
    factors = torch.logspace(-1, 1, _REFINED_SCALES, base=width, device=values.device)
    offsets = [o / ((_SHIFTS - 1) / 2) for o in offsets]
    return _search(values, levels, scale, offset, factors, offsets)


def _search(
    values: Tensor,
    levels: LevelSet,
    scale: Tensor,
    offset: Tensor,
    factors: Tensor,
    offsets: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Best of scale * factor and offset + step, row by row; the shift is offset * scale. Of equals
    the first one, with the first factor that has one."""
    scales = factors.repeat_interleave(len(offsets))[:, None] * scale
    steps = torch.tensor(offsets, device=values.device).repeat(len(factors))
    shifts = offset + steps[:, None]
    best_error = torch.full_like(scale, math.inf)
    best_scale, best_offset = scale, offset
    count = max(1, _AT_ONCE // values.numel())
    for candidates, candidate_offsets in zip(scales.split(count), shifts.split(count), strict=True):
        errors = _errors(values, levels, candidates, candidate_offsets)
        error, index = errors.min(0, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)[0]
        best_scale = torch.where(better, candidates.gather(0, index), best_scale)[0]
        best_offset = torch.where(better, candidate_offsets.gather(0, index), best_offset)[0]
    return best_scale, best_offset


def _errors(values: Tensor, levels: LevelSet, scales: Tensor, offsets: Tensor) -> Tensor:
    """Mean squared error of every candidate on each row, [candidates, rows]; infinite where it is
    no number."""
    column, shift = scales[..., None], (scales * offsets)[..., None]
    u = (values - shift).div_(column)
    decoded = levels.value_(levels.encode(u, u)).mul_(column)
    return decoded.sub_(values).square_().mean(-1).nan_to_num_(nan=math.inf, posinf=math.inf)


def fit_weight_scale(
    weight: Tensor, levels: LevelSet, group_size: int | None, criterion: Criterion = MSE
) -> Tensor:
    """Scale () of a weight, or with ``group_size`` [rows, 1] of its rows."""
    weight = weight.detach().float()
    if group_size is not None:
        return fit_scale(weight.reshape(-1, group_size), levels, criterion=criterion)[0][:, None]
    # Neither a mean nor a maximum needs a grid, so they need no sample either.
    is_exact = levels.is_sign or criterion.name == "absmax"
    values = weight.reshape(-1) if is_exact else thin(weight, _WEIGHT_SAMPLE)
    return fit_scale(values[None], levels, criterion=criterion)[0].reshape(())
