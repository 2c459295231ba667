"""Level sets: which integers a value may become.

The table of ``docs/numerics.md``; training, calibration, counting and kernels all call
:meth:`LevelSet.encode`, so a code means the same thing everywhere.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError

_GELU_NON_NEGATIVE_BITS = 4


@dataclass(frozen=True)
class LevelSet:
    """A set of consecutive integer codes of ``bits`` bits.

    ``sign`` is {-1, +1} (1 bit only), ``signed`` is two's complement, ``non_negative`` starts at 0.

    >>> signed(1).encode(torch.tensor([-0.2, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    >>> non_negative(2).encode(torch.tensor([-1.0, 0.5, 1.5, 9.0]))
    tensor([0., 0., 2., 3.])
    """

    kind: Literal["sign", "signed", "non_negative"]
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise LowbitError(f"{self.bits} bits: quantizers have 1 to 8 bits")
        if (self.kind == "sign") != (self.bits == 1) and self.kind != "non_negative":
            raise LowbitError(
                f"level set {self.kind!r} with {self.bits} bits: sign is the 1-bit signed set"
            )

    @property
    def lo(self) -> int:
        """Lowest code, and the lower end of the clipping range of u."""
        if self.kind == "sign":
            return -1
        return 0 if self.kind == "non_negative" else -(2 ** (self.bits - 1))

    @property
    def hi(self) -> int:
        """Highest code, and the upper end of the clipping range of u (Qp in LSQ)."""
        if self.kind == "sign":
            return 1
        return 2**self.bits - 1 if self.kind == "non_negative" else 2 ** (self.bits - 1) - 1

    @property
    def size(self) -> int:
        """Number of levels, 2 ** bits."""
        return 2**self.bits

    @property
    def gradient_divisor(self) -> int:
        """Qp of the LSQ gradient scale; 1 for the sign set, whose step is its only level."""
        return 1 if self.kind == "sign" else self.hi

    def encode(self, u: Tensor) -> Tensor:
        """Normalised values u = (x - shift)/scale, fp32 -> integer codes held as fp32, same shape.

        ``u`` is not modified. Ties round to even, except the two documented thresholds of the
        1-bit sets: u >= 0 is +1, u >= 0.5 is 1.
        """
        if self.kind == "sign":
            return torch.where(u >= 0, 1.0, -1.0)
        if self.bits == 1:
            return (u >= 0.5).to(u.dtype)
        return torch.round(u).clamp_(self.lo, self.hi)


def signed(bits: int) -> LevelSet:
    """The set for values of both signs: two's complement, and {-1, +1} at one bit."""
    return LevelSet("sign" if bits == 1 else "signed", bits)


def non_negative(bits: int) -> LevelSet:
    """The set for softmax outputs: 0 .. 2**bits - 1."""
    return LevelSet("non_negative", bits)


def after_gelu(bits: int) -> LevelSet:
    """The set of least error for GELU outputs: non-negative up to 4 bits, signed above.

    Few levels are best spent on the positive side; from 5 bits on, losing the small negative lobe
    would cost more than anything else (docs/numerics.md has the errors).
    """
    return non_negative(bits) if bits <= _GELU_NON_NEGATIVE_BITS else signed(bits)
