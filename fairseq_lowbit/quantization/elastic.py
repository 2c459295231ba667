"""Elastic quantization with a learned scale and threshold (BiT, arXiv 2205.13016; Yeh et al. 1.2).

u = (x - shift - origin)/scale in fp32, by division; decode = scale * level(code) + origin, with the
constant origin of the level set. Gradients after LSQ.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lowbit.quantization import formulas
from fairseq_lowbit.quantization.calibration import Calibrator
from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.execution import run
from fairseq_lowbit.quantization.levels import LevelSet
from fairseq_lowbit.quantization.quantizer import (
    SCALE_GROUP,
    SHIFT_GROUP,
    Affine,
    LearnedQuantizer,
)

SCALE_FLOOR = 1e-5


class _ScaleAndShift(torch.autograd.Function):
    """See :meth:`ElasticQuantizer.scale_and_shift`: one node for both."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, relative_shift: Tensor | None):
        unfloored = log_scale.exp()
        scale = unfloored.clamp_min(SCALE_FLOOR)
        ctx.save_for_backward(unfloored, scale, relative_shift)
        return scale, None if relative_shift is None else relative_shift * scale

    @staticmethod
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor | None):
        unfloored, scale, relative_shift = ctx.saved_tensors
        grad_log_scale = grad_scale * unfloored
        if relative_shift is None:
            return grad_log_scale, None
        through_shift = (grad_shift * relative_shift).sum_to_size(scale.shape)
        grad_relative_shift = (grad_shift * scale).sum_to_size(relative_shift.shape)
        return grad_log_scale + through_shift * unfloored, grad_relative_shift


class _FakeQuantize(torch.autograd.Function):
    """Decoded codes forward, the gradients of ``docs/numerics.md`` backward.

    Only the inputs are saved: codes and masks are recomputed.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        scale,
        shift,
        quantizer: "ElasticQuantizer",
        dtype: torch.dtype | None,
        codes: Codes | None,
    ):
        ctx.save_for_backward(x, scale, shift)
        ctx.quantizer = quantizer
        if codes is None:
            return quantizer.decode(x, scale, shift, dtype=dtype)
        return codes.decode(dtype or x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, scale, shift = ctx.saved_tensors
        quantizer = ctx.quantizer
        rows, grad_rows = quantizer.rows(x), quantizer.rows(grad_output)
        grad_x = torch.empty_like(rows, dtype=torch.float32)
        grad_scale, grad_shift = (
            torch.zeros_like(parameter) if needed and parameter is not None else None
            for parameter, needed in zip((scale, shift), ctx.needs_input_grad[1:3], strict=True)
        )
        tensors = (rows, grad_rows, scale, shift, grad_x, grad_scale, grad_shift)
        run(formulas.add_gradients, quantizer.levels, *tensors)
        for gradient in (grad_scale, grad_shift):
            if gradient is not None:
                gradient.mul_(quantizer.gradient_scale)
        return grad_x.view_as(x).to(x.dtype), grad_scale, grad_shift, None, None, None


class ElasticQuantizer(LearnedQuantizer):
    """Quantizer with a learned scale (alpha) and, optionally, a learned shift (beta).

    Args:
        levels: the codes it may produce.
        gradient_values: N of the LSQ gradient scale 1/sqrt(N * Qp): values per frame for an
            activation, values per scale for a weight.
        scales: number of scales of a weight; None for a single one.
        group_size: values that share a scale, where there are several.
        shift_shape: None without shift, () per tensor, (features,) per channel.
        is_per_frame: scale and shift are in units of each frame's mean magnitude, see
            :func:`frame_magnitude`.

    Parameters: ``log_scale`` () or [scales, 1] and ``relative_shift``, in units of the scale, so
    that a learning rate means the same for small values, such as probabilities, as for large ones.

    >>> from fairseq_lowbit.quantization import signed
    >>> quantizer = ElasticQuantizer(signed(2), gradient_values=4)
    >>> quantizer.set_scale(torch.tensor(0.5))
    >>> quantizer(torch.tensor([-3.0, -0.2, 0.3, 0.9]))
    tensor([-1.0000, -0.0000,  0.5000,  0.5000], grad_fn=<_FakeQuantizeBackward>)
    """

    def __init__(
        self,
        levels: LevelSet,
        gradient_values: int,
        scales: int | None = None,
        group_size: int | None = None,
        shift_shape: tuple[int, ...] | None = None,
        is_per_frame: bool = False,
    ) -> None:
        super().__init__(levels, group_size)
        if levels.origin and shift_shape is None:
            raise ValueError("levels with an origin need a shift, which the origin is added to")
        self.is_per_frame = is_per_frame
        if levels.origin:
            # Read by nobody; it keeps the state dict of another form from being taken for this one.
            self.register_buffer("origin", torch.tensor(levels.origin))
        self.gradient_scale = 1.0 / math.sqrt(gradient_values * levels.gradient_divisor)
        shape = () if scales is None else (scales, 1)
        self.log_scale = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.relative_shift = (
            None
            if shift_shape is None
            else nn.Parameter(torch.zeros(shift_shape, dtype=torch.float32))
        )
        self.name_groups()
        self._calibrator: Calibrator | None = None

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        """alpha = exp(log_scale), at least 1e-5, whose gradient passes the floor; and
        beta = relative_shift * alpha, in the unit of the values, None without shift."""
        return _ScaleAndShift.apply(self.log_scale, self.relative_shift)

    @property
    def scale(self) -> Tensor:
        """alpha."""
        return self.scale_and_shift()[0]

    @property
    def shift(self) -> Tensor | None:
        """beta; None without shift."""
        return self.scale_and_shift()[1]

    @property
    def is_per_tensor(self) -> bool:
        shift = self.relative_shift
        is_scalar = self.log_scale.dim() == 0 and (shift is None or shift.dim() == 0)
        return is_scalar and not self.is_per_frame

    def forward(
        self,
        x: Tensor,
        length_ratio: Tensor | None = None,
        dtype: torch.dtype | None = None,
        codes: Codes | None = None,
    ) -> Tensor:
        """See :meth:`Quantizer.forward`; scale and shift are multiplied by ``length_ratio``
        (attention probabilities shrink as 1/length)."""
        if self._calibrator is not None:
            self._calibrate_on(x, length_ratio)
        scale, shift, _ = self.affine(x, length_ratio)
        values = _FakeQuantize.apply(x, scale, shift, self, dtype, codes)
        return self._remembered(values, codes, (x, scale, shift), self.decode)

    def affine(self, rows: Tensor, length_ratio: Tensor | None = None) -> Affine:
        self.check_calibrated()
        ratio = self._ratio(rows, length_ratio)
        return affine_of(self.levels, *self.scale_and_shift(), ratio)

    def share_at_floor(self) -> float:
        return float((self.scale < 1.01 * SCALE_FLOOR).float().mean())

    def set_scale(self, scale: Tensor, shift: Tensor | None = None) -> None:
        """Sets alpha (and beta), broadcast to their shapes, and marks the quantizer calibrated."""
        with torch.no_grad():
            self.log_scale.copy_(scale.float().clamp_min(SCALE_FLOOR).log())
            if shift is not None and self.relative_shift is not None:
                self.relative_shift.copy_(shift / self.scale)
        self.mark_calibrated(True)

    def start_calibration(self, calibrator: Calibrator) -> None:
        """From now on every forward first refits the scale on all values seen so far; an earlier
        scale and shift are forgotten."""
        self._calibrator = calibrator
        self.mark_calibrated(False)
        if self.relative_shift is not None:
            with torch.no_grad():
                self.relative_shift.zero_()

    def finish_calibration(self) -> None:
        self._calibrator = None

    def name_groups(self) -> None:
        self.log_scale.param_group = SCALE_GROUP
        if self.relative_shift is not None:
            self.relative_shift.param_group = SHIFT_GROUP

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', per frame' if self.is_per_frame else ''}"

    def _ratio(self, x: Tensor, length_ratio: Tensor | None) -> Tensor | None:
        """What scale and shift are multiplied by for these values."""
        return frame_magnitude(x) if self.is_per_frame else length_ratio

    def _calibrate_on(self, x: Tensor, length_ratio: Tensor | None) -> None:
        ratio, origin = self._ratio(x, length_ratio), self.levels.origin
        x = x if ratio is None else x / ratio
        x = x.float() - origin if origin else x
        with_shift = self.levels.lowest == 0 and self.relative_shift is not None
        self.set_scale(*self._calibrator.fit(x, self.levels, with_shift))


def affine_of(
    levels: LevelSet, scale: Tensor, shift: Tensor | None, ratio: Tensor | None
) -> Affine:
    """Scale and shift, times a ratio where there is one, with the origin added to the shift."""
    if ratio is not None:
        scale, shift = scale * ratio, None if shift is None else shift * ratio
    return Affine(scale, shift + levels.origin if levels.origin else shift)


def frame_magnitude(x: Tensor) -> Tensor:
    """m_t = mean |x_t| over the features of each frame, at least 1e-5: [..., features] ->
    [..., 1], fp32, without graph."""
    return x.detach().float().abs().mean(-1, keepdim=True).clamp_min(SCALE_FLOOR)
