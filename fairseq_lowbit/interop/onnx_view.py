"""A model whose quantizers are ONNX's QuantizeLinear and DequantizeLinear, to be traced only.

What of ``docs/numerics.md`` these two operators can say:

- A **weight** of any method and width, as 8-bit integers and one DequantizeLinear. Mid-rise levels
  are odd multiples of half a step, so up to 7 bits they are whole multiples of that half. The 255
  half steps of 8 bits fit in no byte: there the half step is added behind.
- An **input** with a learned scale and levels that are their own codes, rounded to the even one in
  a tie: signed sets from 2 bits on, non-negative ones from 2 bits on. A shift is subtracted before,
  a width below 8 bits clips before, and the origin of the levels is added behind.
- Any other input stays what it is, plain float arithmetic of the same values: QuantizeLinear has
  no threshold of its own for one bit, and no scale per frame.
"""

import copy

import torch
from torch import Tensor, nn

from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import PositionalConv1d, quantizers
from fairseq_lowbit.quantization import (
    Codes,
    ElasticQuantizer,
    LevelSet,
    Quantizer,
    formulas,
)
from fairseq_lowbit.quantization.elastic import affine_of, frame_magnitude

_INTEGERS = {dtype: torch.iinfo(dtype) for dtype in (torch.int8, torch.uint8)}


@torch.no_grad()
def onnx_view(model: Hubert) -> Hubert:
    """A copy of ``model`` for ``torch.onnx.export`` to trace; called otherwise it gives zeros."""
    view = copy.deepcopy(model)
    for name, quantizer in list(quantizers(view)):
        path, _, slot = name.rpartition(".")
        owner = view.get_submodule(path)
        if slot == "weight_quantizer":
            setattr(owner, slot, StoredWeight(quantizer.codes(owner.stored_weight())))
        elif isinstance(quantizer, ElasticQuantizer):
            setattr(owner, slot, LearnedInput(quantizer))
    for module in view.modules():
        if isinstance(module, PositionalConv1d) and module.weight_quantizer is None:
            module.weight_quantizer = FoldedWeight(module.stored_weight())
    return view


def has_quantize_linear(quantizer: Quantizer) -> bool:
    """Whether QuantizeLinear gives the codes of this quantizer of an input."""
    levels = quantizer.levels
    return (
        isinstance(quantizer, ElasticQuantizer)
        and (levels.step, levels.offset, levels.stride) == (1, 0, 1)
        and levels.size > 2
        and not levels.ties_up
        and not quantizer.is_per_frame
        and integer_type(levels.lo, levels.hi) is not None
    )


class LearnedInput(nn.Module):
    """Stands for an elastic quantizer of an input, with its scale and shift as constants."""

    def __init__(self, quantizer: ElasticQuantizer) -> None:
        super().__init__()
        self.levels, self.is_per_frame = quantizer.levels, quantizer.is_per_frame
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("shift", quantizer.shift)
        zero_point = None
        if has_quantize_linear(quantizer):
            zero_point = torch.zeros((), dtype=integer_type(self.levels.lo, self.levels.hi))
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor, length_ratio: Tensor | None = None) -> Tensor:
        """See :meth:`fairseq_lowbit.quantization.Quantizer.forward`."""
        ratio = None if length_ratio is None else length_ratio.reshape(())
        ratio = frame_magnitude(x) if self.is_per_frame else ratio
        scale, shift, _ = affine_of(self.levels, self.scale, self.shift, ratio)
        if self.zero_point is None:
            code = formulas.encode(self.levels, x, scale, shift)
            return formulas.decode_(self.levels, code, scale)
        return self._quantize_linear(x if shift is None else x - shift, scale)

    def _quantize_linear(self, x: Tensor, scale: Tensor) -> Tensor:
        lo, hi, dtype = self.levels.lo, self.levels.hi, self.zero_point.dtype
        if (lo, hi) != (_INTEGERS[dtype].min, _INTEGERS[dtype].max):
            # Rounding of the products does not matter: lo and hi stay the nearest codes.
            x = _onnx("Clip", (x, lo * scale, hi * scale), x.dtype, x.shape)
        code = _onnx("QuantizeLinear", (x, scale, self.zero_point), dtype, x.shape)
        values = _onnx("DequantizeLinear", (code, scale, self.zero_point), scale.dtype, x.shape)
        return values + self.levels.origin if self.levels.origin else values


class StoredWeight(nn.Module):
    """Stands for the quantizer of a weight: its integers, which the file stores, and their scale.

    Args:
        codes: of the weight.
    """

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        levels, self.shape = codes.levels, codes.shape
        unit, rest = bytes_of_levels(levels)
        integers = (levels.value(codes.integers.float()) - rest) / unit
        dtype = integer_type((levels.lowest - rest) / unit, (levels.highest - rest) / unit)
        scale = codes.scale * unit
        zero_point = torch.zeros_like(scale) if codes.zero_point is None else codes.zero_point
        if len(scale.flatten()) == self.shape[0]:
            integers = integers.reshape(self.shape)
        self.register_buffer("integers", integers.to(dtype))
        self.register_buffer("scale", scale.flatten() if scale.dim() else scale)
        self.register_buffer("zero_point", zero_point.to(dtype).reshape(self.scale.shape))
        self.register_buffer("rest", codes.scale * rest if rest else None)

    def forward(
        self, _: Tensor, dtype: torch.dtype | None = None, codes: Codes | None = None
    ) -> Tensor:
        """The decoded weight; see :meth:`fairseq_lowbit.quantization.Quantizer.forward`."""
        stored = self.integers, self.scale, self.zero_point
        axis = {"axis": 0} if self.scale.dim() else {}
        values = _onnx("DequantizeLinear", stored, self.scale.dtype, self.integers.shape, **axis)
        if self.rest is not None:
            values = values.flatten(1) + self.rest
        return values.reshape(self.shape)


class FoldedWeight(nn.Module):
    """Stands for the missing quantizer of a float weight that is computed from its parameters."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(
        self, _: Tensor, dtype: torch.dtype | None = None, codes: Codes | None = None
    ) -> Tensor:
        """The weight."""
        return self.weight


def bytes_of_levels(levels: LevelSet) -> tuple[float, float]:
    """The unit and the rest with which every level is unit * (an 8-bit integer) + rest."""
    if (levels.offset / levels.step).is_integer():
        return levels.step, 0.0
    half = levels.step / 2
    if integer_type(levels.lowest / half, levels.highest / half) is None:
        return levels.step, half
    return half, 0.0


def integer_type(lowest: float, highest: float) -> torch.dtype | None:
    """The 8-bit type that holds all integers from ``lowest`` to ``highest``; None without any."""
    fitting = (
        dtype
        for dtype, limits in _INTEGERS.items()
        if limits.min <= lowest and highest <= limits.max
    )
    return next(fitting, None)


def _onnx(
    name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: torch.Size, **attributes: int
) -> Tensor:
    """The output, of this type and shape, of an ONNX operator."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)
