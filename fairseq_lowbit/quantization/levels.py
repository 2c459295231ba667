"""Level sets: which integers a value may become, and which level an integer stands for.

The tables of ``docs/numerics.md``; training, calibration, counting and kernels all call
:meth:`LevelSet.encode` and :meth:`LevelSet.value`, so a code means the same thing everywhere.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError

# Of nothing but zeros: with it they are decoded as zero by a set that lacks that level too.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_GELU_NON_NEGATIVE_BITS = 4


@dataclass(frozen=True)
class LevelSet:
    """A set of 2**bits levels with consecutive integer codes.

    ``sign`` is {-1, +1} (1 bit only), ``signed`` is two's complement, ``non_negative`` starts at 0;
    in these a code is its own level. ``mid_rise`` has the codes 0 .. 2**bits - 1 for the levels
    (2 code + 1)/2**bits - 1, which fill [-1, 1] evenly and leave out zero.

    >>> signed(1).encode(torch.tensor([-0.2, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    >>> non_negative(2).encode(torch.tensor([-1.0, 0.5, 1.5, 9.0]))
    tensor([0., 0., 2., 3.])
    >>> mid_rise(2).value(mid_rise(2).encode(torch.tensor([-2.0, -0.1, 0.1, 0.9])))
    tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    """

    kind: Literal["sign", "signed", "non_negative", "mid_rise"]
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise LowbitError(f"{self.bits} bits: quantizers have 1 to 8 bits")
        if self.kind in ("sign", "signed") and (self.kind == "sign") != (self.bits == 1):
            raise LowbitError(
                f"level set {self.kind!r} with {self.bits} bits: sign is the 1-bit signed set"
            )

    @property
    def lo(self) -> int:
        """Lowest code."""
        if self.kind == "sign":
            return -1
        return -(2 ** (self.bits - 1)) if self.kind == "signed" else 0

    @property
    def hi(self) -> int:
        """Highest code."""
        if self.kind == "sign":
            return 1
        return 2 ** (self.bits - 1) - 1 if self.kind == "signed" else 2**self.bits - 1

    @property
    def clip_range(self) -> tuple[int, int]:
        """Both ends of the range of u outside of which no gradient passes."""
        return (-1, 1) if self.kind == "mid_rise" else (self.lo, self.hi)

    @property
    def step(self) -> float:
        """Distance of two neighbouring levels."""
        if self.kind == "sign":
            return 2.0
        return 2.0 ** (1 - self.bits) if self.kind == "mid_rise" else 1.0

    @property
    def size(self) -> int:
        """Number of levels, 2 ** bits."""
        return 2**self.bits

    @property
    def codes(self) -> range:
        """Every code, ascending."""
        return range(self.lo, self.hi + 1, 2 if self.kind == "sign" else 1)

    @property
    def gradient_divisor(self) -> int:
        """Qp of the LSQ gradient scale: steps from 0 to the upper end of the clipping range, and 1
        for the sign set, whose step is its only level."""
        if self.kind == "mid_rise":
            return 2 ** (self.bits - 1)
        return 1 if self.kind == "sign" else self.hi

    def encode(self, u: Tensor) -> Tensor:
        """Normalised values u = (x - shift)/scale, fp32 -> integer codes held as fp32, same shape.

        Ties round to even, except the documented thresholds: u >= 0 is +1 in the sign set,
        u >= 0.5 is 1 in the 1-bit non-negative set, and a value between two levels of the mid-rise
        set takes the upper one.
        """
        return self.encode_(u.clone())

    def encode_(self, u: Tensor) -> Tensor:
        """:meth:`encode` in place: arithmetic costs CPUs a tenth of what ``torch.where`` costs."""
        if self.kind == "sign":
            return u.ge_(0).mul_(2).sub_(1)
        if self.bits == 1:
            return u.ge_(0 if self.kind == "mid_rise" else 0.5)
        if self.kind == "mid_rise":
            # Every step is exact; adding 1 to u first would round small negative values up to zero.
            half = 2 ** (self.bits - 1)
            return u.mul_(half).floor_().add_(half).clamp_(self.lo, self.hi)
        return u.round_().clamp_(self.lo, self.hi)

    def all_values(self) -> Tensor:
        """Every level in units of the scale, ascending, fp32 [size]."""
        return self.value(torch.tensor(self.codes, dtype=torch.float32))

    def value(self, code: Tensor) -> Tensor:
        """The levels, in units of the scale, that codes (fp32) stand for; exact in fp32."""
        return code if self.kind != "mid_rise" else self.value_(code.clone())

    def value_(self, code: Tensor) -> Tensor:
        """:meth:`value` in place."""
        if self.kind != "mid_rise":
            return code
        return code.mul_(self.step).add_(self.step / 2 - 1)


def signed(bits: int) -> LevelSet:
    """The set for values of both signs: two's complement, and {-1, +1} at one bit."""
    return LevelSet("sign" if bits == 1 else "signed", bits)


def non_negative(bits: int) -> LevelSet:
    """The set for softmax outputs: 0 .. 2**bits - 1."""
    return LevelSet("non_negative", bits)


def mid_rise(bits: int) -> LevelSet:
    """The balanced set: as many levels below zero as above, none at zero."""
    return LevelSet("mid_rise", bits)


def after_gelu(bits: int) -> LevelSet:
    """The set of least error for GELU outputs: non-negative up to 4 bits, signed above.

    Few levels are best spent on the positive side; from 5 bits on, losing the small negative lobe
    would cost more than anything else (docs/numerics.md has the errors).
    """
    return non_negative(bits) if bits <= _GELU_NON_NEGATIVE_BITS else signed(bits)
