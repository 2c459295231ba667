"""Plain uniform quantizers whose scale is computed from the values themselves: absmax, min-max."""

from typing import Literal

import torch
from torch import Tensor

from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.levels import non_negative, signed
from fairseq_lowbit.quantization.quantizer import Quantizer

Range = Literal["absmax", "minmax"]


class _StraightThrough(torch.autograd.Function):
    """The decoded values forward, the identity backward: the range holds every value."""

    @staticmethod
    def forward(ctx, x, decoded):
        return decoded

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


class UniformQuantizer(Quantizer):
    """Quantizer without parameters: a range measured anew in every call, per tensor, row or frame.

    ``absmax`` is symmetric: the signed set, scale = max|x| / hi, and at one bit mean|x|.
    ``minmax`` is affine: codes 0 .. 2^n - 1, scale = (max - min) / (2^n - 1) of the range extended
    to hold zero, and the integer zero point round(-min / scale), so zero is decoded exactly.

    Args:
        kind: which range.
        bits: 1 to 8.
        row_size: see :class:`Quantizer`.
        frame_dim: dimension of the features of a frame, for an activation with a scale per frame.

    >>> UniformQuantizer("absmax", bits=8, frame_dim=-1)(torch.tensor([[1.0, -0.5], [0.0, 254.0]]))
    tensor([[  1.0000,  -0.5039],
            [  0.0000, 254.0000]])
    """

    def __init__(
        self, kind: Range, bits: int, row_size: int | None = None, frame_dim: int | None = None
    ) -> None:
        super().__init__(signed(bits) if kind == "absmax" else non_negative(bits), row_size)
        self.kind = kind
        self.dim = frame_dim if row_size is None else -1

    def forward(self, x: Tensor, length_ratio: Tensor | None = None) -> Tensor:
        return _StraightThrough.apply(x, self.codes(x).decode().to(x.dtype))

    @torch.no_grad()
    def codes(self, x: Tensor, length_ratio: Tensor | None = None) -> Codes:
        values = self.rows(x).float()
        scale = self._scale(values)
        u, zero_point = values / scale, None
        if self.kind == "minmax":
            zero_point = self.levels.encode(-self._least(values) / scale)
            u = u.round_().add_(zero_point)
        integers = self.levels.encode(u).to(torch.int16)
        return Codes(integers, scale, self.levels, x.shape, zero_point)

    def extra_repr(self) -> str:
        return f"{self.kind}, {super().extra_repr()}"

    def _scale(self, values: Tensor) -> Tensor:
        if self.levels.kind == "sign":
            scale = self._reduce(values.abs(), torch.mean)
        elif self.kind == "absmax":
            scale = self._reduce(values.abs(), torch.amax) / self.levels.hi
        else:
            greatest = self._reduce(values, torch.amax).clamp_min(0)
            scale = (greatest - self._least(values)) / self.levels.hi
        return torch.where(scale > 0, scale, 1.0)

    def _least(self, values: Tensor) -> Tensor:
        return self._reduce(values, torch.amin).clamp_max(0)

    def _reduce(self, values: Tensor, function) -> Tensor:
        if self.dim is None:
            return function(values)
        return function(values, dim=self.dim, keepdim=True)
