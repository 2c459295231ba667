"""The names of precisions: ``bitl_w2a2``, ``bitla_w1a1``, ``float``."""

import re
from dataclasses import dataclass

from fairseq_lowbit.errors import LowbitError

FLOAT_BITS = 16
_GRAMMAR = "bitl_wNaM or bitla_wNaM with N and M from 1 to 8 (16 leaves that side float), or float"
_NAME = re.compile(r"(?P<method>[a-z]+)_w(?P<weight>[0-9.]+)(?:a(?P<activation>[0-9.]+))?")


@dataclass(frozen=True)
class Preset:
    """What a precision name asks of the encoder's linears and, for BiT-LA, of its attention.

    Attributes:
        weight_bits, activation_bits: 1 to 8, or 16 for float.
        attention_bits: bits of q, k, v and probabilities; 16 for float.
    """

    name: str
    weight_bits: int
    activation_bits: int
    attention_bits: int


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

    >>> parse_precision("bitla_w1a2")
    Preset(name='bitla_w1a2', weight_bits=1, activation_bits=2, attention_bits=2)
    """
    if name == "float":
        return Preset(name, FLOAT_BITS, FLOAT_BITS, FLOAT_BITS)
    match = _NAME.fullmatch(name)
    if match is None or match["method"] not in ("bitl", "bitla", "sqwq"):
        raise LowbitError(f"unknown precision {name!r}: write {_GRAMMAR}")
    method, where = match["method"], f"precision {name!r}"
    weight = check_bits(match["weight"], where)
    if method == "sqwq":
        _refuse_squashed(name, match["activation"])
    if match["activation"] is None:
        raise LowbitError(f"{where} gives no activation bits: write {name}aM, M from 1 to 8")
    activation = check_bits(match["activation"], where)
    return Preset(name, weight, activation, activation if method == "bitla" else FLOAT_BITS)


def _refuse_squashed(name: str, activation: str | None) -> None:
    if activation is not None:
        raise LowbitError(
            f"precision {name!r} gives activation bits to sqwq, a weight-only method: "
            f"write {name[: name.index('a')]}"
        )
    raise LowbitError(f"precision {name!r}: squashed weight quantization is not available yet")
