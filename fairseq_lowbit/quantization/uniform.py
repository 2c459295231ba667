"""Plain uniform quantizers whose scale is computed from the values themselves: absmax, min-max."""

from typing import Any, Literal

import torch
from torch import Tensor

from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.levels import SMALLEST_SCALE, non_negative, signed
from fairseq_lowbit.quantization.quantizer import Affine, Quantizer

Range = Literal["absmax", "minmax"]


class _StraightThrough(torch.autograd.Function):
    """The decoded values forward, the identity backward: the range is that of the values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        quantizer: "UniformQuantizer",
        dtype: torch.dtype | None,
        codes: Codes | None,
    ):
        ctx.dtype = x.dtype
        if codes is None:
            return quantizer.decode_by_range(x, dtype=dtype)
        return codes.decode(dtype or x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):
        return grad_output.to(ctx.dtype), None, None, None


class UniformQuantizer(Quantizer):
    """Quantizer without parameters: a range measured anew in every call, per tensor, row or frame.

    ``absmax`` is symmetric: the signed set, scale = max|x| / hi, and at one bit mean|x|.
    ``minmax`` is affine: codes 0 .. 2^n - 1, scale = (max - min) / (2^n - 1) of the range extended
    to hold zero, and the integer zero point round(-min / scale), so zero is decoded exactly.

    Args:
        kind: which range.
        bits: 1 to 8.
        group_size: see :class:`Quantizer`.
        frame_dim: for an activation, the dimension (or dimensions) over which a frame extends:
            each frame has a scale of its own.

    >>> UniformQuantizer("absmax", bits=8, frame_dim=-1)(torch.tensor([[1.0, -0.5], [0.0, 254.0]]))
    tensor([[  1.0000,  -0.5039],
            [  0.0000, 254.0000]])
    """

    def __init__(
        self,
        kind: Range,
        bits: int,
        group_size: int | None = None,
        frame_dim: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(signed(bits) if kind == "absmax" else non_negative(bits), group_size)
        self.kind = kind
        self.dim = frame_dim if group_size is None else -1

    def forward(
        self,
        x: Tensor,
        length_ratio: Tensor | None = None,
        dtype: torch.dtype | None = None,
        codes: Codes | None = None,
    ) -> Tensor:
        values = _StraightThrough.apply(x, self, dtype, codes)
        if codes is None and not x.is_leaf:
            return values  # of an activation only the decoded values need be kept
        return self._remembered(values, codes, (x,), self.decode_by_range)

    @torch.no_grad()
    def decode_by_range(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Decoded codes of ``x`` under its own range, in its shape, without graph."""
        return self.decode(x, *self.affine(self.rows(x)), dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {super().extra_repr()}"

    def affine(self, rows: Tensor, length_ratio: Tensor | None = None) -> Affine:
        values = rows.float()
        if self.kind == "absmax":
            return Affine(self._symmetric_scale(values).clamp_min(SMALLEST_SCALE))
        lowest = self._reduce(values, torch.amin).clamp_max(0)
        highest = self._reduce(values, torch.amax).clamp_min(0)
        scale = ((highest - lowest) / self.levels.hi).clamp_min(SMALLEST_SCALE)
        return Affine(scale, zero_point=self.levels.encode(-lowest / scale))

    def _symmetric_scale(self, values: Tensor) -> Tensor:
        if self.levels.is_sign:
            return self._reduce(values.abs(), torch.mean)
        # Two reductions need no copy of the magnitudes.
        greatest, least = (self._reduce(values, f) for f in (torch.amax, torch.amin))
        return torch.maximum(greatest, -least) / self.levels.hi

    def _reduce(self, values: Tensor, function) -> Tensor:
        if self.dim is None:
            return function(values)
        return function(values, dim=self.dim, keepdim=True)
