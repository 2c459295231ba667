"""Codes: the integers a quantizer produces together with what turns them back into values."""

from dataclasses import dataclass

from torch import Tensor

from fairseq_lowbit.quantization.levels import LevelSet


@dataclass(frozen=True)
class Codes:
    """Integer codes of one tensor.

    Attributes:
        integers: int16 tensor of the input's shape, each within [levels.lo, levels.hi].
        scale: fp32, broadcastable to ``integers``.
        levels: the set the integers belong to.
    """

    integers: Tensor
    scale: Tensor
    levels: LevelSet

    def decode(self) -> Tensor:
        """scale * code, fp32. The shift is not added back (docs/numerics.md)."""
        return self.integers.to(self.scale.dtype) * self.scale
