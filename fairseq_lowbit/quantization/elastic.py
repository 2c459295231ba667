"""Elastic quantization with a learned scale and threshold (BiT, arXiv 2205.13016; Yeh et al. 1.2).

u = (x - shift)/scale in fp32, by division; decode = scale * code. Gradients after LSQ.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lowbit.quantization.calibration import Calibrator
from fairseq_lowbit.quantization.codes import Codes
from fairseq_lowbit.quantization.levels import LevelSet

SCALE_FLOOR = 1e-5
SCALE_GROUP = "quantizer_scale"
SHIFT_GROUP = "quantizer_shift"


class UncalibratedError(RuntimeError):
    """A quantizer was used before calibration or before loading a calibrated checkpoint."""


def _normalize(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    x = x.float()
    return x / scale if shift is None else (x - shift) / scale


class _FakeQuantize(torch.autograd.Function):
    """Decoded codes forward, the gradients of ``docs/numerics.md`` backward.

    Only the inputs are saved: codes and masks are recomputed, so fake quantization keeps no
    activation alive that the graph does not hold already.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, levels: LevelSet, gradient_scale: float):
        ctx.save_for_backward(x, scale, shift)
        ctx.levels, ctx.gradient_scale = levels, gradient_scale
        return levels.encode(_normalize(x, scale, shift)).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        x, scale, shift = ctx.saved_tensors
        levels = ctx.levels
        u = _normalize(x, scale, shift)
        code = levels.encode(u)
        grad = grad_output.float()
        inside = (u >= levels.lo) & (u <= levels.hi)
        grad_x = grad * inside
        grad_scale = grad_shift = None
        if ctx.needs_input_grad[1]:
            slope = code if levels.kind == "sign" else torch.where(inside, code - u, code)
            grad_scale = (grad * slope).sum_to_size(scale.shape) * ctx.gradient_scale
        if shift is not None and ctx.needs_input_grad[2]:
            grad_shift = grad_x.sum_to_size(shift.shape) * -ctx.gradient_scale
        return grad_x.to(x.dtype), grad_scale, grad_shift, None, None


class ElasticQuantizer(nn.Module):
    """Quantizer with a learned scale (alpha) and, optionally, a learned shift (beta).

    Args:
        levels: the codes it may produce.
        gradient_values: N of the LSQ gradient scale 1/sqrt(N * Qp): values per frame for an
            activation, values per scale for a weight.
        scale_shape: () per tensor, or for example (out_features, 1) per output channel.
        shift_shape: None without shift, () per tensor, (features,) per channel.

    Parameters (always fp32, whatever the model is cast to): ``log_scale`` of ``scale_shape``, so
    that a learning rate is a relative change of the scale, and ``shift``. The buffer
    ``calibrated`` travels with the state dict.

    Raises:
        UncalibratedError: in every use before :meth:`finish_calibration`, :meth:`set_scale` or
            loading a calibrated state.

    >>> quantizer = ElasticQuantizer(LevelSet("signed", 2), gradient_values=4)
    >>> quantizer.set_scale(torch.tensor(0.5))
    >>> quantizer(torch.tensor([-3.0, -0.2, 0.3, 0.9]))
    tensor([-1.0000, -0.0000,  0.5000,  0.5000], grad_fn=<_FakeQuantizeBackward>)
    """

    def __init__(
        self,
        levels: LevelSet,
        gradient_values: int,
        scale_shape: tuple[int, ...] = (),
        shift_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.gradient_scale = 1.0 / math.sqrt(gradient_values * levels.gradient_divisor)
        self.log_scale = nn.Parameter(torch.zeros(scale_shape, dtype=torch.float32))
        self.shift = (
            None
            if shift_shape is None
            else nn.Parameter(torch.zeros(shift_shape, dtype=torch.float32))
        )
        self._name_groups()
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        # Host-side copy of the flag: checking the tensor would synchronise with the device.
        self._ready = False
        self._calibrator: Calibrator | None = None

    @property
    def scale(self) -> Tensor:
        """alpha = exp(log_scale), at least 1e-5; the gradient passes the floor."""
        scale = self.log_scale.exp()
        return scale + (scale.clamp_min(SCALE_FLOOR) - scale).detach()

    @property
    def is_calibrated(self) -> bool:
        return self._ready

    def forward(self, x: Tensor, length_ratio: Tensor | None = None) -> Tensor:
        """Fake quantization: decode(encode(x)), same shape and dtype as ``x``.

        Args:
            length_ratio: reference length / valid length, broadcastable to ``x``; scale and shift
                are multiplied by it (attention probabilities shrink as 1/length).
        """
        if self._calibrator is not None:
            self._calibrate_on(x if length_ratio is None else x / length_ratio)
        scale, shift = self._parameters_for(length_ratio)
        return _FakeQuantize.apply(x, scale, shift, self.levels, self.gradient_scale)

    def codes(self, x: Tensor, length_ratio: Tensor | None = None) -> Codes:
        """The integers that :meth:`forward` decodes; arguments as there."""
        with torch.no_grad():
            scale, shift = self._parameters_for(length_ratio)
            integers = self.levels.encode(_normalize(x, scale, shift))
        return Codes(integers.to(torch.int16), scale, self.levels)

    def set_scale(self, scale: Tensor, shift: Tensor | None = None) -> None:
        """Sets alpha (and beta), broadcast to their shapes, and marks the quantizer calibrated."""
        with torch.no_grad():
            self.log_scale.copy_(scale.float().clamp_min(SCALE_FLOOR).log())
            if shift is not None and self.shift is not None:
                self.shift.copy_(shift)
            self.calibrated.fill_(True)
        self._ready = True

    def start_calibration(self, calibrator: Calibrator) -> None:
        """From now on every forward first refits the scale on all values seen so far; an earlier
        scale and shift are forgotten."""
        self._calibrator, self._ready = calibrator, False
        with torch.no_grad():
            self.calibrated.fill_(False)
            if self.shift is not None:
                self.shift.zero_()

    def finish_calibration(self) -> None:
        self._calibrator = None

    def extra_repr(self) -> str:
        return f"{self.levels.kind}, bits={self.levels.bits}, scale={tuple(self.log_scale.shape)}"

    def _parameters_for(self, length_ratio: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self._ready:
            raise UncalibratedError(
                "quantizer used before calibration: run calibrate(), or load a checkpoint whose "
                "quantizers are calibrated"
            )
        if length_ratio is None:
            return self.scale, self.shift
        shift = None if self.shift is None else self.shift * length_ratio
        return self.scale * length_ratio, shift

    def _calibrate_on(self, x: Tensor) -> None:
        scale, shift = self._calibrator.fit(x, self.levels, with_shift=self._fits_shift)
        self.set_scale(scale, shift)

    @property
    def _fits_shift(self) -> bool:
        return self.levels.kind == "non_negative" and self.shift is not None

    def _apply(self, fn, recurse=True):
        # .half() and .bfloat16() must not touch the parameters: only the device is followed.
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(device=moved.device)

        return super()._apply(keep_dtype, recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_groups()

    def _name_groups(self) -> None:
        """The optimizer gives these parameters their own rates and no weight decay. Named on the
        parameters themselves, which a deep copy strips of it."""
        self.log_scale.param_group = SCALE_GROUP
        if self.shift is not None:
            self.shift.param_group = SHIFT_GROUP

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._ready = bool(self.calibrated)
