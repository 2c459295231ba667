"""Elastic quantization with a learned scale and threshold (BiT, arXiv 2205.13016; Yeh et al. 1.2).

u = (x - shift)/scale in fp32, by division; decode = scale * level(code). Gradients after LSQ.
"""

import math

import torch
from torch import Tensor, nn

from fairseq_lowbit.quantization.calibration import Calibrator
from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.levels import LevelSet
from fairseq_lowbit.quantization.quantizer import SCALE_GROUP, SHIFT_GROUP, LearnedQuantizer
from fairseq_lowbit.quantization.recompute import Recomputable

SCALE_FLOOR = 1e-5


def _normalize(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """u = (x - shift)/scale, a new tensor."""
    x = x.float()
    return x / scale if shift is None else (x - shift).div_(scale)


class _FakeQuantize(Recomputable):
    """Decoded codes forward, the gradients of ``docs/numerics.md`` backward.

    Only the inputs are saved: codes and masks are recomputed. Everything elementwise is arithmetic
    in place, masks being 0 and 1 in fp32: on CPUs new tensors and booleans cost several times more.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, quantizer: "ElasticQuantizer"):
        ctx.save_for_backward(x, scale, shift)
        ctx.quantizer, ctx.recompute = quantizer, quantizer.decode
        return quantizer.decode(x, scale, shift)

    @staticmethod
    def backward(ctx, grad_output):
        x, scale, shift = ctx.saved_tensors
        quantizer = ctx.quantizer
        levels, factor = quantizer.levels, quantizer.gradient_scale
        grad = quantizer.rows(grad_output).float()
        u = _normalize(quantizer.rows(x), scale, shift)
        inside = u.clamp(*levels.clip_range).eq_(u)
        grad_scale = grad_shift = None
        if ctx.needs_input_grad[1]:
            grad_scale = _slope_(levels, u, inside).mul_(grad).sum_to_size(scale.shape) * factor
        grad_x = inside.mul_(grad)
        if shift is not None and ctx.needs_input_grad[2]:
            grad_shift = grad_x.sum_to_size(shift.shape) * -factor
        return grad_x.view_as(x).to(x.dtype), grad_scale, grad_shift, None


def _slope_(levels: LevelSet, u: Tensor, inside: Tensor) -> Tensor:
    """d decoded / d scale; overwrites ``u``."""
    if levels.kind == "sign":
        return levels.encode_(u)
    level = levels.value_(levels.encode(u))
    # Clamped first: infinity times 0 would be nan.
    return level.sub_(u.clamp_(*levels.clip_range).mul_(inside))


class ElasticQuantizer(LearnedQuantizer):
    """Quantizer with a learned scale (alpha) and, optionally, a learned shift (beta).

    Args:
        levels: the codes it may produce.
        gradient_values: N of the LSQ gradient scale 1/sqrt(N * Qp): values per frame for an
            activation, values per scale for a weight.
        scales: number of scales of a weight; None for a single one.
        row_size: values that share a scale, where there are several.
        shift_shape: None without shift, () per tensor, (features,) per channel.

    Parameters: ``log_scale`` () or [scales, 1] and ``relative_shift``, in units of the scale, so
    that a learning rate means the same for small values, such as probabilities, as for large ones.

    >>> quantizer = ElasticQuantizer(LevelSet("signed", 2), gradient_values=4)
    >>> quantizer.set_scale(torch.tensor(0.5))
    >>> quantizer(torch.tensor([-3.0, -0.2, 0.3, 0.9]))
    tensor([-1.0000, -0.0000,  0.5000,  0.5000], grad_fn=<_FakeQuantizeBackward>)
    """

    def __init__(
        self,
        levels: LevelSet,
        gradient_values: int,
        scales: int | None = None,
        row_size: int | None = None,
        shift_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(levels, row_size)
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

    @property
    def scale(self) -> Tensor:
        """alpha = exp(log_scale), at least 1e-5; the gradient passes the floor."""
        scale = self.log_scale.exp()
        return scale + (scale.clamp_min(SCALE_FLOOR) - scale).detach()

    @property
    def shift(self) -> Tensor | None:
        """beta = relative_shift * alpha, in the unit of the values; None without shift."""
        return None if self.relative_shift is None else self.relative_shift * self.scale

    @property
    def is_per_tensor(self) -> bool:
        shift = self.relative_shift
        return self.log_scale.dim() == 0 and (shift is None or shift.dim() == 0)

    def forward(self, x: Tensor, length_ratio: Tensor | None = None) -> Tensor:
        """See :meth:`Quantizer.forward`; scale and shift are multiplied by ``length_ratio``
        (attention probabilities shrink as 1/length)."""
        if self._calibrator is not None:
            self._calibrate_on(x if length_ratio is None else x / length_ratio)
        scale, shift = self._parameters_for(length_ratio)
        return _FakeQuantize.apply(x, scale, shift, self)

    def decode(self, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """Decoded codes of ``x`` under these parameters, in its shape and dtype, without graph."""
        code = self.levels.encode_(_normalize(self.rows(x), scale, shift))
        return self.levels.value_(code).mul_(scale).view_as(x).to(x.dtype)

    def codes(self, x: Tensor, length_ratio: Tensor | None = None) -> Codes:
        with torch.no_grad():
            scale, shift = self._parameters_for(length_ratio)
            integers = self.levels.encode_(_normalize(self.rows(x), scale, shift))
        return Codes(integers.to(torch.int16), scale, self.levels, x.shape)

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

    def _parameters_for(self, length_ratio: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_calibrated()
        if length_ratio is None:
            return self.scale, self.shift
        shift = None if self.relative_shift is None else self.shift * length_ratio
        return self.scale * length_ratio, shift

    def _calibrate_on(self, x: Tensor) -> None:
        with_shift = self.levels.kind == "non_negative" and self.relative_shift is not None
        self.set_scale(*self._calibrator.fit(x, self.levels, with_shift))
