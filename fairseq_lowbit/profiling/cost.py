"""Analytic cost of a model for one utterance, operator by operator; nothing is run.

The definitions are those of Yeh et al., Table 1: a multiply-accumulate is two operations; with both
operands quantized each counts max(weight bits, activation bits) in QuantOps, else 1 in FLOPs.
Convolutions, linears and the two products of attention count, norms and activations do not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.models.extractor import output_lengths
from fairseq_lowbit.nn import Conv1d, Linear, PositionalConv1d, SelfAttention
from fairseq_lowbit.precision import PlanEntry
from fairseq_lowbit.precision.grammar import FLOAT_BITS
from fairseq_lowbit.precision.storage import FLOAT_BYTES

SAMPLE_RATE = 16_000
ACTIVATION_BYTES = 4
# Bits of quantized work that take as long as one floating-point operation: the paper's own anchor,
# 1898.44 Gbit = 28.55 GFLOPs.
CONVERSION_RATE = 66.5


@dataclass(frozen=True)
class Cost:
    """One operator and one utterance.

    Attributes:
        module: its name; attention has ``<attention>.scores``, ``.softmax`` and ``.context``.
        operations: 2 per multiply-accumulate.
        bits: of an operation, max(weight bits, activation bits); 16 where a side is float.
        values: activations that it reads and writes, or the norm or GELU behind it if these are
            more.
    """

    module: str
    parameters: int
    storage_bytes: float
    operations: int = 0
    bits: int = FLOAT_BITS
    values: int = 0

    @property
    def flops(self) -> int:
        """Operations with at least one float operand."""
        return self.operations if self.bits == FLOAT_BITS else 0

    @property
    def quantops(self) -> int:
        """Bits of the operations between quantized operands."""
        return 0 if self.bits == FLOAT_BITS else self.operations * self.bits

    @property
    def activation_bytes(self) -> int:
        """Of ``values``, in fp32, batch 1."""
        return ACTIVATION_BYTES * self.values


@dataclass(frozen=True)
class Profile:
    """All costs of one model for ``seconds`` of audio at 16 kHz."""

    name: str
    seconds: float
    costs: tuple[Cost, ...]

    @cached_property
    def parameters(self) -> int:
        return sum(cost.parameters for cost in self.costs)

    @cached_property
    def storage_bytes(self) -> float:
        """Every stored tensor at its own width, float ones at 16 bits."""
        return sum(cost.storage_bytes for cost in self.costs)

    @cached_property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    @cached_property
    def quantops(self) -> int:
        """In bits."""
        return sum(cost.quantops for cost in self.costs)

    @cached_property
    def peak_activation_bytes(self) -> int:
        """Most that one operator reads and writes, in fp32, batch 1."""
        return max(cost.activation_bytes for cost in self.costs)

    def runtime(self, reference: "Profile", conversion_rate: float = CONVERSION_RATE) -> float:
        """Estimated time in units of ``reference``'s: (FLOPs + QuantOps/K) over its FLOPs.

        Raises:
            LowbitError: a conversion rate K that is not positive, not finite or so small that the
                result is not.
        """
        if not 0 < conversion_rate < math.inf:
            raise LowbitError(f"conversion rate K is {conversion_rate}: want a positive number")
        runtime = (self.flops + self.quantops / conversion_rate) / reference.flops
        if not math.isfinite(runtime):
            raise LowbitError(
                f"conversion rate K is {conversion_rate:g}, which makes the runtime infinite: want "
                "more"
            )
        return runtime


def profile(model: Hubert, name: str, seconds: float = 10.0) -> Profile:
    """Counts what ``model`` costs; it may be on the meta device.

    Raises:
        LowbitError: audio too short for a single frame.
    """
    samples = int(seconds * SAMPLE_RATE)
    lengths = _lengths(model, samples)
    if lengths[-1] < 1:
        raise LowbitError(f"{seconds:g} s of audio give no frame: want more seconds")
    entries = {entry.module: entry for entry in model.plan.entries}
    costs = [*_extractor(model, entries, lengths), *_behind_extractor(model, entries, lengths[-1])]
    other = model.plan.other_parameters
    costs.append(Cost("(norms, embeddings)", other, other * FLOAT_BYTES))
    return Profile(name, seconds, tuple(costs))


def _lengths(model: Hubert, samples: int) -> list[int]:
    """Values over time before the front-end and behind each of its convolutions."""
    lengths = [samples]
    for layer in model.conv_layers:
        lengths.append(int(output_lengths(torch.tensor(lengths[-1]), [layer])))
    return lengths


def _extractor(
    model: Hubert, entries: dict[str, PlanEntry], lengths: Sequence[int]
) -> Iterator[Cost]:
    names = [name for name in entries if name.startswith("feature_extractor.")]
    for index, name in enumerate(names):
        conv = model.get_submodule(name)
        yield _operator(conv, entries[name], lengths[index], lengths[index + 1])


# Stored with the model, but no part of what an upstream computes.
_NOT_RUN = ("final_proj",)


def _behind_extractor(model: Hubert, entries: dict[str, PlanEntry], frames: int) -> Iterator[Cost]:
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            yield from _products(name, module, entries, frames)
        elif name in _NOT_RUN:
            yield Cost(name, entries[name].parameters, entries[name].bytes)
        elif name in entries and not name.startswith("feature_extractor."):
            yield _operator(module, entries[name], frames, frames)


def _operator(module: nn.Module, entry: PlanEntry, inputs: int, outputs: int) -> Cost:
    """An operator with a weight, from ``inputs`` to ``outputs`` values over time."""
    channels_in, channels_out, per_output = _shape(module)
    read, written = channels_in * inputs, channels_out * outputs
    return Cost(
        entry.module,
        entry.parameters,
        entry.bytes,
        operations=2 * per_output * channels_out * outputs,
        bits=max(entry.weight_bits, entry.activation_bits),
        # What follows value by value reads and writes as much as this one writes.
        values=max(read, written) + written,
    )


def _shape(module: nn.Module) -> tuple[int, int, int]:
    """Channels in and out, and multiply-accumulates of one output value."""
    if isinstance(module, Linear):
        return module.in_features, module.out_features, module.in_features
    if isinstance(module, Conv1d):
        inner = module.in_channels // module.groups * module.kernel_size[0]
        return module.in_channels, module.out_channels, inner
    if isinstance(module, PositionalConv1d):
        channels = len(module.bias)
        return channels, channels, channels // module.groups * module.kernel
    raise TypeError(f"no cost is known for {type(module).__name__}")


def _products(
    name: str, attention: SelfAttention, entries: dict[str, PlanEntry], frames: int
) -> Iterator[Cost]:
    """The two matrix products of attention, with the operands' scales and shifts, and the softmax
    between them, which reads and writes one map of each head."""
    square = attention.heads * frames * frames
    features = attention.dim * frames
    for product, left, right, values in (
        ("scores", "query", "key", 2 * features + square),
        ("context", "probabilities", "value", square + 2 * features),
    ):
        operands = [entries[f"{name}.{operand}"] for operand in (left, right)]
        yield Cost(
            f"{name}.{product}",
            0,
            sum(operand.bytes for operand in operands),
            operations=2 * features * frames,
            bits=max(operand.activation_bits for operand in operands),
            values=values,
        )
        if product == "scores":
            yield Cost(f"{name}.softmax", 0, 0, values=2 * square)
