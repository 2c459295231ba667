"""Level sets: which integers a value may become, and which level an integer stands for.

The tables of ``docs/numerics.md``; training, calibration, counting and kernels all call
:meth:`LevelSet.encode` and :meth:`LevelSet.value`, so a code means the same thing everywhere.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError

# Of nothing but zeros: with it they are decoded as zero by a set that lacks that level too.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LevelSet:
    """Evenly spaced levels: code k stands for ``step * k + offset``, in units of the scale, counted
    from ``origin``.

    Attributes:
        name: for people to read; nothing is decided by it.
        bits: 1 to 8, what a stored code takes.
        lo, hi: the lowest and the highest code.
        stride: distance of two neighbouring codes.
        step, offset: of the levels, both powers of two or sums of two of them, so that a level is
            exact in fp32.
        ties_up: a value half-way between two levels takes the upper one instead of the even code.
            A set of two levels has one threshold, half-way, and always does.
        clip_margin: how far beyond the outermost levels a gradient still passes.
        origin: in the unit of the values. Encoding takes it off first and decoding adds it again;
            with a learned shift only, which it is added to.
        beyond: the fp32 numbers next to ``clip_range``, outside of it.

    >>> signed(1).encode(torch.tensor([-0.2, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    >>> non_negative(2).encode(torch.tensor([-1.0, 0.5, 1.5, 9.0]))
    tensor([0., 0., 2., 3.])
    >>> mid_rise(2).value(mid_rise(2).encode(torch.tensor([-2.0, -0.1, 0.1, 0.9])))
    tensor([-0.7500, -0.2500,  0.2500,  0.7500])
    >>> ternary = LevelSet("ternary", bits=2, lo=-1, hi=1)
    >>> ternary.encode(torch.tensor([-0.7, 0.2, 4.0]))
    tensor([-1.,  0.,  1.])
    """

    name: str
    bits: int
    lo: int
    hi: int
    stride: int = 1
    step: float = 1.0
    offset: float = 0.0
    ties_up: bool = False
    clip_margin: float = 0.0
    origin: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise LowbitError(f"{self.bits} bits: quantizers have 1 to 8 bits")
        if not 2 <= self.size <= 2**self.bits:
            raise LowbitError(f"level set {self.name!r}: {self.size} levels in {self.bits} bits")
        # Once, because a compiler cannot follow it.
        lowest, highest = np.float32(self.clip_range)
        infinity = np.float32(math.inf)
        beyond = float(np.nextafter(lowest, -infinity)), float(np.nextafter(highest, infinity))
        object.__setattr__(self, "beyond", beyond)

    @property
    def size(self) -> int:
        """Number of levels."""
        return (self.hi - self.lo) // self.stride + 1

    @property
    def codes(self) -> range:
        """Every code, ascending."""
        return range(self.lo, self.hi + 1, self.stride)

    @property
    def spacing(self) -> float:
        """Distance of two neighbouring levels."""
        return self.step * self.stride

    @property
    def lowest(self) -> float:
        """The level of the lowest code."""
        return self.step * self.lo + self.offset

    @property
    def highest(self) -> float:
        """The level of the highest code."""
        return self.step * self.hi + self.offset

    @property
    def has_zero(self) -> bool:
        return any(self.step * code + self.offset == 0 for code in self.codes)

    @property
    def is_sign(self) -> bool:
        """Whether it is {-1, +1}, whose best scale is the mean magnitude."""
        return self.size == 2 and (self.lowest, self.highest) == (-1, 1)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Both ends of the range of u outside of which no gradient passes."""
        return self.lowest - self.clip_margin, self.highest + self.clip_margin

    @property
    def gradient_divisor(self) -> float:
        """Qp of the LSQ gradient scale: steps from 0 to the upper end of the clipping range."""
        return self.clip_range[1] / self.step

    @torch.no_grad()
    def encode(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalised values u = (x - shift)/scale, fp32 -> integer codes held as fp32, same shape.

        Args:
            out: receives the codes; it may be ``u``. Arithmetic in fp32, because on CPUs booleans
                and ``torch.where`` cost several times as much.
        """
        out = torch.empty_like(u) if out is None else out
        if self.size == 2:
            code = torch.ge(u, (self.lowest + self.highest) / 2, out=out)
            code = code if self.stride == 1 else code.mul_(self.stride)
            return code if self.lo == 0 else code.add_(self.lo)
        if not self.ties_up:
            return self._nearest(u, out).clamp_(self.lo, self.hi)
        # Every step is exact; adding the offset first would round small negative values up to zero.
        half_way = 0.5 - self.offset / self.step
        return torch.mul(u, 1 / self.step, out=out).floor_().add_(half_way).clamp_(self.lo, self.hi)

    def _nearest(self, u: Tensor, out: Tensor) -> Tensor:
        if (self.step, self.offset) == (1, 0):
            return torch.round(u, out=out)
        return torch.sub(u, self.offset, out=out).div_(self.step).round_()

    def all_values(self) -> Tensor:
        """Every level in units of the scale, ascending, fp32 [size]."""
        return self.value(torch.tensor(self.codes, dtype=torch.float32))

    def value(self, code: Tensor) -> Tensor:
        """The levels, in units of the scale, that codes (fp32) stand for; exact in fp32."""
        return code if (self.step, self.offset) == (1, 0) else self.value_(code.clone())

    def value_(self, code: Tensor) -> Tensor:
        """:meth:`value` in place."""
        stepped = code if self.step == 1 else code.mul_(self.step)
        return stepped if self.offset == 0 else stepped.add_(self.offset)


def signed(bits: int) -> LevelSet:
    """The set for values of both signs: two's complement, and {-1, +1} at one bit."""
    if bits == 1:
        return LevelSet("sign", 1, -1, 1, stride=2)
    half = 2 ** (_checked(bits) - 1)
    return LevelSet("signed", bits, -half, half - 1)


def non_negative(bits: int, origin: float = 0.0) -> LevelSet:
    """The set for values that are nowhere below ``origin``, such as softmax outputs:
    0 .. 2**bits - 1."""
    return LevelSet("non_negative", bits, 0, 2 ** _checked(bits) - 1, origin=origin)


def mid_rise(bits: int) -> LevelSet:
    """The balanced set, with as many levels below zero as above and none at zero: the levels
    (2 code + 1)/2**bits - 1 fill [-1, 1] evenly."""
    step = 2.0 ** (1 - _checked(bits))
    top = 2**bits - 1
    return LevelSet("mid_rise", bits, 0, top, 1, step, step / 2 - 1, True, step / 2)


def _checked(bits: int) -> int:
    if not 1 <= bits <= 8:
        raise LowbitError(f"{bits} bits: quantizers have 1 to 8 bits")
    return bits
