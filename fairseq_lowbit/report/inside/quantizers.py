"""What every quantizer of a model does to its values: noise, clipping, levels, ranges."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_lowbit.monitoring.health import (
    QuantizerHealth,
    observed,
    quantizer_health,
    split_layer,
)
from fairseq_lowbit.nn import quantizers
from fairseq_lowbit.quantization import Codes, Quantizer
from fairseq_lowbit.quantization.calibration import thin

# Where there are more, an even sample of so many is looked at.
MAX_VALUES = 131_072
# So many are drawn one by one.
FEW_LEVELS = 16
# Of a quantizer's values, in percent.
QUANTILES = (0.1, 1.0, 50.0, 99.0, 99.9)


@dataclass(frozen=True)
class QuantizerAnatomy:
    """One quantizer on the utterance.

    Attributes:
        health: its noise, clipping and levels.
        quantiles: ``QUANTILES`` of the values it saw, in units of its outermost decoded level,
            with several scales (channels, groups, frames) each value in units of its own.
        levels: its decoded levels in the same unit, ascending; only the lowest and the highest of
            all where there are more than ``FEW_LEVELS`` or they differ from scale to scale.
    """

    health: QuantizerHealth
    quantiles: tuple[float, ...]
    levels: tuple[float, ...]

    @property
    def place(self) -> str:
        """Module and operand inside of its layer, ``fc1.weight`` or ``self_attn.query``."""
        return split_layer(self.health.name)[1].removesuffix("_quantizer")

    @property
    def is_weight(self) -> bool:
        return self.health.name.endswith("weight_quantizer")


@contextmanager
def watching(model: nn.Module, found: list[QuantizerAnatomy]) -> Iterator[None]:
    """Adds the anatomy of every quantizer that ``model`` calls to ``found``."""
    handles = [
        quantizer.register_forward_hook(_observer(name, found))
        for name, quantizer in quantizers(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(name: str, found: list[QuantizerAnatomy]):
    def observe(quantizer: Quantizer, inputs: tuple, output: Tensor) -> None:
        values, codes = observed(quantizer, inputs, MAX_VALUES)
        found.append(_anatomy(quantizer_health(name, quantizer, values, codes), values, codes))

    return observe


def _anatomy(health: QuantizerHealth, values: Tensor, codes: Codes) -> QuantizerAnatomy:
    outermost = torch.maximum(*(end.abs() for end in codes.decoded_range))
    relative = thin(values.reshape(codes.integers.shape) / outermost, MAX_VALUES)
    at = relative.new_tensor(QUANTILES) / 100
    return QuantizerAnatomy(
        health=health,
        quantiles=tuple(relative.quantile(at).tolist()),
        levels=_relative_levels(codes, outermost),
    )


def _relative_levels(codes: Codes, outermost: Tensor) -> tuple[float, ...]:
    if codes.zero_point is not None:
        lowest, highest = (end / outermost for end in codes.decoded_range)
        return float(lowest.min()), float(highest.max())
    levels = codes.levels.all_values()
    levels = (levels / levels.abs().max()).tolist()
    return tuple(levels) if len(levels) <= FEW_LEVELS else (levels[0], levels[-1])
