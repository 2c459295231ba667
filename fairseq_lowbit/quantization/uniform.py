"""Plain uniform quantizers whose scale is computed from the values themselves: absmax, min-max."""

from typing import Literal

import torch
from torch import Tensor

from fairseq_lowbit.quantization.blocks import blocks
from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.levels import SMALLEST_SCALE, non_negative, signed
from fairseq_lowbit.quantization.quantizer import Quantizer
from fairseq_lowbit.quantization.recompute import Recomputable

Range = Literal["absmax", "minmax"]


class _StraightThrough(Recomputable):
    """The decoded values forward, the identity backward: the range is that of the values."""

    @staticmethod
    def forward(ctx, x, quantizer: "UniformQuantizer"):
        if x.is_leaf:
            # A weight is kept anyway; of an activation only the decoded values need be.
            ctx.save_for_backward(x)
            ctx.recompute = quantizer.decode
        return quantizer.decode(x)

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
        row_size: int | None = None,
        frame_dim: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(signed(bits) if kind == "absmax" else non_negative(bits), row_size)
        self.kind = kind
        self.dim = frame_dim if row_size is None else -1

    def forward(self, x: Tensor, length_ratio: Tensor | None = None) -> Tensor:
        return _StraightThrough.apply(x, self)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decoded codes of ``x``, in its shape and dtype, without graph."""
        rows = self.rows(x)
        decoded = torch.empty_like(rows, dtype=torch.float32)
        for part, scale, zero_point, out in blocks(rows, *self._range(rows), decoded):
            code = self._encode(part, scale, zero_point, out)
            (code if zero_point is None else code.sub_(zero_point)).mul_(scale)
        return decoded.view_as(x).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Tensor, length_ratio: Tensor | None = None) -> Codes:
        rows = self.rows(x)
        scale, zero_point = self._range(rows)
        code = self._encode(rows, scale, zero_point)
        return Codes(code.to(torch.int16), scale, self.levels, x.shape, zero_point)

    def extra_repr(self) -> str:
        return f"{self.kind}, {super().extra_repr()}"

    def _range(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None where codes need no offset), fp32."""
        values = rows.float()
        if self.kind == "absmax":
            return self._symmetric_scale(values).clamp_min(SMALLEST_SCALE), None
        lowest = self._reduce(values, torch.amin).clamp_max(0)
        highest = self._reduce(values, torch.amax).clamp_min(0)
        scale = ((highest - lowest) / self.levels.hi).clamp_min(SMALLEST_SCALE)
        return scale, self.levels.encode(-lowest / scale)

    def _encode(
        self, rows: Tensor, scale: Tensor, zero_point: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """Codes, fp32, in ``out`` or a new tensor."""
        u = torch.div(rows.float(), scale, out=out)
        if zero_point is not None:
            u.round_().add_(zero_point)
        return self.levels.encode(u, u)

    def _symmetric_scale(self, values: Tensor) -> Tensor:
        if self.levels.kind == "sign":
            return self._reduce(values.abs(), torch.mean)
        # Two reductions need no copy of the magnitudes.
        greatest, least = (self._reduce(values, f) for f in (torch.amax, torch.amin))
        return torch.maximum(greatest, -least) / self.levels.hi

    def _reduce(self, values: Tensor, function) -> Tensor:
        if self.dim is None:
            return function(values)
        return function(values, dim=self.dim, keepdim=True)
