"""The description of a quantized operand: everything about it but the numbers."""

from dataclasses import dataclass
from typing import Literal

from fairseq_lowbit.quantization.levels import LevelSet

# Where a scale comes from: a trained parameter, or the range of the values at hand.
ScaleSource = Literal["learned", "absmax", "minmax"]


@dataclass(frozen=True)
class Operand:
    """How a weight or an activation is quantized.

    A plan holds one for every quantized operand. Quantizers are built from it, and storage, cost
    and export read the same description.

    Attributes:
        levels: which codes there are and what they stand for.
        scale: where the scale comes from.
        scales: number of scales that are stored with the model; 0 for the range of a frame.
        group_size: how many values share a scale, along axis 1 of a weight that is seen as [output
            channels, inputs]: all of them for a scale per output channel; None for one scale.
        shifts: number of learned shifts: 0, 1, or one per channel.
        is_per_frame: whether every frame has a range of its own; a learned scale and shift are then
            in units of the frame's mean magnitude.
        is_length_scaled: whether scale and shift are multiplied by reference length over valid
            length.
        squash_std: of a squashed weight, the standard deviation of P that it is fitted to; None
            for any other operand.
    """

    levels: LevelSet
    scale: ScaleSource = "learned"
    scales: int = 1
    group_size: int | None = None
    shifts: int = 0
    is_per_frame: bool = False
    is_length_scaled: bool = False
    squash_std: float | None = None

    @property
    def bits(self) -> int:
        return self.levels.bits

    @property
    def has_zero_point(self) -> bool:
        return self.scale == "minmax"
