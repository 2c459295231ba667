"""Codes: the integers a quantizer produces together with what turns them back into values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_lowbit.quantization import formulas
from fairseq_lowbit.quantization.execution import run
from fairseq_lowbit.quantization.levels import LevelSet
from fairseq_lowbit.quantization.product import Source


@dataclass(frozen=True)
class Codes:
    """Integer codes of one tensor.

    Attributes:
        integers: int16, or of a weight that is kept for many forwards int8 or uint8; each within
            [levels.lo, levels.hi]; of the tensor's shape, or where a weight has several scales
            [scales, values of each].
        scale: fp32, broadcastable to ``integers``.
        levels: the set the integers belong to.
        shape: of the tensor.
        zero_point: fp32 holding integers, the code of zero; None where codes need no offset.
    """

    integers: Tensor
    scale: Tensor
    levels: LevelSet
    shape: torch.Size
    zero_point: Tensor | None = None

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * (level(code) - zero point) + origin of the levels, computed in fp32, of
        ``shape``. An elastic quantizer's shift is not added back (docs/numerics.md)."""
        source = self.source(dtype)
        return source.decode(*source.tensors)

    def source(self, dtype: torch.dtype) -> Source:
        """What :meth:`decode` needs, for a product to keep."""
        levels, shape = self.levels, self.shape

        def again(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
            return _decode(levels, integers, scale, zero_point).view(shape).to(dtype)

        return Source((self.integers, self.scale, self.zero_point), again)

    @property
    def decoded_range(self) -> tuple[Tensor, Tensor]:
        """What the lowest and the highest code stand for, each broadcastable to ``integers``."""
        lowest, highest = (
            _decode(self.levels, torch.full_like(self.scale, code), self.scale, self.zero_point)
            for code in (self.levels.lo, self.levels.hi)
        )
        return lowest, highest

    def is_clipped(self, values: Tensor) -> Tensor:
        """Where ``values`` (of ``shape``) lie more than half a step beyond the outermost levels;
        bool, of the shape of ``integers``."""
        lowest, highest = self.decoded_range
        margin = self.scale * self.levels.spacing / 2
        values = values.reshape(self.integers.shape)
        return (values < lowest - margin) | (values > highest + margin)

    def level_counts(self) -> Tensor:
        """How often each level occurs, lowest first, int64 [2 ** bits]."""
        codes = self.levels.codes
        indices = (self.integers.reshape(-1).long() - codes.start) // codes.step
        # What is not finite has no code: any will do.
        indices = indices.clamp_(0, self.levels.size - 1)
        return torch.bincount(indices, minlength=self.levels.size)


def _decode(levels: LevelSet, integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    out = torch.empty_like(integers, dtype=torch.float32)
    run(formulas.decode_into, levels, integers, scale, zero_point, out)
    return out


def byte_type(levels: LevelSet) -> torch.dtype:
    """The type of 8 bits that holds every code."""
    return torch.int8 if levels.lo < 0 else torch.uint8
