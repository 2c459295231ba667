"""Squashed weight quantization (SqWQ; Strom, Khan and Hamza, Interspeech 2022; Yeh et al. 1.2).

W = tanh(P): a Gaussian P gives a nearly uniform W on [-1, 1], which evenly spaced levels serve
well. The stored weight of the operator is P; the effective one is exp(g) Q(tanh(P)), with one
learned log-gain g per output channel.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fairseq_lowbit.quantization import formulas
from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.execution import blocks, run
from fairseq_lowbit.quantization.levels import mid_rise
from fairseq_lowbit.quantization.quantizer import SCALE_GROUP, LearnedQuantizer

SQUASHED_GROUP = "squashed_weight"
# Standard deviation of P, up to so many weight bits. 0.84 is where tanh(N(0, s^2)) is closest to
# U(-1, 1), but at 4 and 8 bits it clips more than rounding costs (docs/numerics.md has the errors).
_SPREADS = ((2, 0.84), (4, 0.5), (8, 0.3))
_LIMIT = 0.999
_BISECTIONS = 30
_TOLERANCE = 0.01
_SMALLEST_GAIN = 1e-8


class _FakeSquash(torch.autograd.Function):
    """gain * level(encode(tanh(P))) forward; backward dQ/dW = 1 and dW/dP = 1 - W^2."""

    @staticmethod
    def forward(
        ctx,
        unsquashed,
        gain,
        quantizer: "SquashedQuantizer",
        dtype: torch.dtype | None,
        codes: Codes | None,
    ):
        ctx.save_for_backward(unsquashed, gain)
        ctx.quantizer = quantizer
        if codes is None:
            return quantizer.decode(unsquashed, gain, dtype=dtype)
        return codes.decode(dtype or unsquashed.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        unsquashed, gain = ctx.saved_tensors
        quantizer = ctx.quantizer
        rows, grad_rows = quantizer.rows(unsquashed), quantizer.rows(grad_output)
        grad_x = torch.empty_like(rows, dtype=torch.float32)
        grad_gain = torch.zeros_like(gain)
        tensors = (rows, grad_rows, gain, grad_x, grad_gain)
        run(formulas.add_squashed_gradients, quantizer.levels, *tensors)
        return grad_x.view_as(unsquashed).to(unsquashed.dtype), grad_gain, None, None, None


class SquashedQuantizer(LearnedQuantizer):
    """Weight quantizer on mid-rise levels of the squashed weight.

    Args:
        bits: 1 to 8.
        channels: output channels, each with a gain.
        group_size: weights of one output channel.
        target_std: standard deviation of P that :meth:`fit` aims at. 0.84 is where tanh(N(0, s^2))
            is closest to U(-1, 1), in Kolmogorov's distance.

    Parameter: ``log_gain`` [channels, 1].

    >>> quantizer = SquashedQuantizer(bits=2, channels=1, group_size=3, target_std=0.84)
    >>> unsquashed = quantizer.fit(torch.tensor([[-0.02, 0.01, 0.04]]))
    >>> quantizer.target(unsquashed)
    tensor([[-0.0200,  0.0100,  0.0400]])
    """

    def __init__(self, bits: int, channels: int, group_size: int, target_std: float) -> None:
        super().__init__(mid_rise(bits), group_size)
        self.target_std = target_std
        self.log_gain = nn.Parameter(torch.zeros(channels, 1, dtype=torch.float32))
        self.name_groups()

    @property
    def gain(self) -> Tensor:
        """exp(log_gain), [channels, 1]."""
        return self.log_gain.exp()

    def forward(
        self,
        x: Tensor,
        length_ratio: Tensor | None = None,
        dtype: torch.dtype | None = None,
        codes: Codes | None = None,
    ) -> Tensor:
        self.check_calibrated()
        gain = self.gain
        values = _FakeSquash.apply(x, gain, self, dtype, codes)
        return self._remembered(values, codes, (x, gain), self.decode)

    @torch.no_grad()
    def decode(self, x: Tensor, gain: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Decoded codes of ``x`` = P with these gains, in its shape, without graph."""
        rows = self.rows(x)
        decoded = torch.empty_like(rows, dtype=torch.float32)
        run(formulas.quantize_squashed, self.levels, rows, gain, decoded)
        return decoded.view_as(x).to(dtype or x.dtype)

    @torch.no_grad()
    def codes(
        self,
        x: Tensor,
        length_ratio: Tensor | None = None,
        integer_type: torch.dtype = torch.int16,
    ) -> Codes:
        self.check_calibrated()
        rows = self.rows(x)
        integers = torch.empty_like(rows, dtype=integer_type)
        run(formulas.encode_squashed_into, self.levels, rows, integers)
        return Codes(integers, self.gain, self.levels, x.shape)

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """exp(g) tanh(P), the float weight that ``x`` = P stands for."""
        return (self.rows(x).float().tanh() * self.gain).view_as(x)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> Tensor:
        """Sets the gains for a float ``weight`` and returns its P, of the same shape.

        Per channel exp(g) is the value for which the standard deviation of
        atanh(clip(weight/exp(g), +-0.999)) is ``target_std``. A channel that no gain spreads so
        far, for example a constant one, gets the gain that clips nothing.
        """
        rows = self.rows(weight).float()
        rms = rows.square().mean(1, keepdim=True).sqrt().clamp_min(_SMALLEST_GAIN)
        low, high = rms.log() - 4, rms.log() + 4
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_wide = _spread(rows, middle) > self.target_std
            low, high = torch.where(is_wide, middle, low), torch.where(is_wide, high, middle)
        is_found = (_spread(rows, high) - self.target_std).abs() < _TOLERANCE
        unclipped = 1.01 * rows.abs().amax(1, keepdim=True).clamp_min(_SMALLEST_GAIN)
        self.log_gain.copy_(torch.where(is_found, high, unclipped.log()))
        self.mark_calibrated(True)
        return _unsquash(rows, self.log_gain).view_as(weight)

    def clipped_share(self, weight: Tensor) -> float:
        """Share of a float ``weight`` that :meth:`fit` clipped."""
        return float((self.rows(weight).abs() > _LIMIT * self.gain).float().mean())

    def name_groups(self) -> None:
        self.log_gain.param_group = SCALE_GROUP


def _unsquash(rows: Tensor, log_gain: Tensor) -> Tensor:
    return torch.atanh((rows / log_gain.exp()).clamp_(-_LIMIT, _LIMIT))


def _spread(rows: Tensor, log_gain: Tensor) -> Tensor:
    return _unsquash(rows, log_gain).std(1, correction=0, keepdim=True)


def default_squash_std(bits: int) -> float:
    """The standard deviation of P that weights of so many bits are fitted and held to."""
    return next(std for most_bits, std in _SPREADS if bits <= most_bits)


def squash_penalty(weights: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Mean over tensors P of (std(P) - target_std)^2 + mean(P)^2, () fp32: keeps tanh(P) spread
    over its levels.

    Args:
        weights: each P with its target_std.
    """
    return torch.stack([_Spread.apply(p, std) for p, std in weights]).mean()


class _Spread(torch.autograd.Function):
    """The penalty of one tensor. torch's own std and its gradient take several times as long."""

    @staticmethod
    def forward(ctx, unsquashed, target_std: float):
        mean = unsquashed.mean(dtype=torch.float32)
        squares = torch.zeros_like(mean)
        for part, *_ in blocks(unsquashed):
            squares.add_((part.float() - mean).square_().sum())
        std = squares.div_(unsquashed.numel()).sqrt_()
        ctx.save_for_backward(unsquashed, mean, std)
        ctx.target_std = target_std
        return (std - target_std).square() + mean.square()

    @staticmethod
    def backward(ctx, grad_output):
        # d/dP_i = 2/N ((std - target) (P_i - mean) / std + mean)
        unsquashed, mean, std = ctx.saved_tensors
        factor = grad_output * (2 / unsquashed.numel())
        slope = (factor * (std - ctx.target_std) / std).masked_fill_(std == 0, 0)
        offset = factor * mean - slope * mean
        grad = torch.empty_like(unsquashed)
        for part, out in blocks(unsquashed, grad):
            torch.add(part.float() * slope, offset, out=out)
        return grad, None
