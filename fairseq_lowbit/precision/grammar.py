"""The names of precisions: ``bitl_w2a2``, ``bitla_w1a1``, ``sqwq_w2``, ``absmax_w8a8``."""

import re
from dataclasses import dataclass
from typing import Literal

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision.sites import Role

FLOAT_BITS = 16
SQUASHED_ACTIVATION_BITS = 8
Method = Literal["elastic", "stretched", "squashed", "absmax", "minmax", "none"]
# Methods with learned scales of inputs, and those that take every scale from the values at hand.
LEARNED_SCALE: tuple[Method, ...] = ("elastic", "stretched")
PLAIN_RANGE: tuple[Method, ...] = ("absmax", "minmax")
# Method of the linears by the first part of a name.
_METHODS: dict[str, Method] = {
    "bitl": "elastic",
    "bitla": "elastic",
    "sqwq": "squashed",
    "absmax": "absmax",
    "minmax": "minmax",
}
_GRAMMAR = (
    "bitl_wNaM, bitla_wNaM, absmax_wNaM or minmax_wNaM with N and M from 1 to 8 (16 leaves that "
    "side float), sqwq_wN, or float"
)
_NAME = re.compile(r"(?P<family>[a-z]+)_w(?P<weight>[0-9.]+)(?:a(?P<activation>[0-9.]+))?")


@dataclass(frozen=True)
class Preset:
    """What a precision name asks of the encoder's linears and, for BiT-LA, of its attention.

    Attributes:
        method: of the linears; elastic for ``float``, where rules may ask for bits.
        weight_bits, activation_bits: 1 to 8, or 16 for float.
        attention_bits: bits of q, k, v and probabilities; 16 for float.
    """

    name: str
    method: Method
    weight_bits: int
    activation_bits: int
    attention_bits: int

    @property
    def roles(self) -> frozenset[Role]:
        """What the name reaches; everything else is left to rules."""
        roles = {Role.ENCODER_LINEAR} if self.name != "float" else set()
        return frozenset(roles | {Role.ATTENTION_OPERAND} if self.attention_bits < 16 else roles)


def check_bits(value: object, where: str) -> int:
    """An allowed number of bits, or a LowbitError that names ``where`` it was given."""
    try:
        bits = float(value)
    except (TypeError, ValueError):
        bits = 0.0
    if bits not in (*range(1, 9), FLOAT_BITS):
        raise LowbitError(f"{where}: {value} bits; allowed are 1 to 8, or 16 for float")
    return int(bits)


def parse_precision(name: str) -> Preset:
    """Reads a precision name.

    Raises:
        LowbitError: an unknown name, a number of bits that does not exist, or activation bits
            given to a weight-only method.

    >>> parse_precision("bitla_w1a2").attention_bits
    2
    >>> parse_precision("sqwq_w2").activation_bits
    8
    """
    if name == "float":
        return Preset(name, "elastic", FLOAT_BITS, FLOAT_BITS, FLOAT_BITS)
    match = _NAME.fullmatch(name)
    if match is None or match["family"] not in _METHODS:
        raise LowbitError(f"unknown precision {name!r}: write {_GRAMMAR}")
    where = f"precision {name!r}"
    method = _METHODS[match["family"]]
    weight = check_bits(match["weight"], where)
    if method == "squashed":
        return _squashed(name, weight, match["activation"])
    if match["activation"] is None:
        raise LowbitError(f"{where} gives no activation bits: write {name}aM, M from 1 to 8")
    activation = check_bits(match["activation"], where)
    attention = activation if match["family"] == "bitla" else FLOAT_BITS
    return Preset(name, method, weight, activation, attention)


def _squashed(name: str, weight: int, activation: str | None) -> Preset:
    if activation is not None:
        raise LowbitError(
            f"precision {name!r} gives activation bits to sqwq, a weight-only method: "
            f"write {name[: name.index('a')]}"
        )
    if weight == FLOAT_BITS:
        raise LowbitError(f"precision {name!r}: sqwq has 1 to 8 weight bits")
    return Preset(name, "squashed", weight, SQUASHED_ACTIVATION_BITS, FLOAT_BITS)
