"""Sites: the places of a model that can be quantized, described without their module names."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

SiteKind = Literal["linear", "conv", "embedding", "operand"]


class Role(StrEnum):
    """What a site does in its model. A precision's name selects roles, a rule selects names."""

    ENCODER_LINEAR = "encoder linear"
    ATTENTION_OPERAND = "attention operand"
    FRONT_END = "front-end"
    PROJECTION = "projection"
    CONVOLUTION = "convolution"
    POSITIONAL_CONVOLUTION = "positional convolution"
    HEAD = "head"
    EMBEDDING = "embedding"
    GATE = "gate"


class InputKind(StrEnum):
    """Which values a site reads, as far as its level set depends on it."""

    ANY = "any"
    GELU = "gelu"
    RELU = "relu"
    SILU = "silu"
    PROBABILITIES = "probabilities"

    @property
    def origin(self) -> float:
        """The lowest value of an activation function, rounded to the 8 significant bits of bf16, so
        that it is exact in every dtype (docs/numerics.md); 0 of what is nowhere negative, or is
        negative without such a bound."""
        return _ORIGINS.get(self, 0.0)


# The minima are -0.16997 and -0.27846.
_ORIGINS = {InputKind.GELU: -87 / 512, InputKind.SILU: -143 / 512}


@dataclass(frozen=True)
class Site:
    """A place that can be quantized.

    Attributes:
        name: module name, or for an attention operand ``<attention>.query`` and so on.
        kind: linear and conv have a weight and an input; an embedding has a weight only; an
            operand is an activation only.
        role: what the site does in its model.
        input_kind: which values it reads.
        input_group: sites of one group read the same tensor (q, k and v projection); empty for a
            site that reads alone.
        tied_to: name of the site whose weight this site uses too; empty for an own weight.
        weights: numel of the weight.
        others: numel of what stays float beside it (bias, weight-norm gain).
        channels: output channels of a weight.
        shifts: numel of the input quantizer's shift, 0 without one.
    """

    name: str
    kind: SiteKind
    role: Role
    input_kind: InputKind = InputKind.ANY
    input_group: str = ""
    tied_to: str = ""
    weights: int = 0
    others: int = 0
    channels: int = 0
    shifts: int = 0
