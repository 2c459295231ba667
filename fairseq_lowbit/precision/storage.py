"""The table of stored widths: what a model takes on a disk, part by part."""

from fairseq_lowbit.precision.grammar import FLOAT_BITS
from fairseq_lowbit.quantization import Operand

# Whatever stays float (biases, norms, float weights) and one value per channel or group.
FLOAT_BYTES = FLOAT_BITS // 8
# A scale or shift that a whole tensor shares.
SCALAR_BYTES = 4
ZERO_POINT_BYTES = 1


def value_bytes(count: int) -> int:
    """Of scales or shifts: one alone is a scalar, several are 16-bit values."""
    return SCALAR_BYTES if count == 1 else count * FLOAT_BYTES


def weight_bytes(values: int, operand: Operand | None) -> float:
    """A weight of so many values, with its scales; at 16 bits without an operand."""
    if operand is None:
        return values * FLOAT_BYTES
    return values * operand.bits / 8 + quantizer_bytes(operand)


def quantizer_bytes(operand: Operand | None) -> float:
    """Scales, zero points and shifts that are stored for an operand."""
    if operand is None:
        return 0
    zero_points = operand.scales * ZERO_POINT_BYTES if operand.has_zero_point else 0
    return _scale_bytes(operand) + zero_points + value_bytes(operand.shifts)


def _scale_bytes(operand: Operand) -> int:
    # Per channel or group even where there is one of them.
    if operand.group_size is not None:
        return operand.scales * FLOAT_BYTES
    return value_bytes(operand.scales)
