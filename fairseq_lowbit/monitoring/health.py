"""Health of a model on one fixed batch: do layers collapse, do quantizers waste their levels?

It is measured in a separate forward without padding, so that the forward of training stays
untouched and the values of one run are comparable over its updates.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models.protocols import LayeredEncoder
from fairseq_lowbit.nn import eagerly, quantizers
from fairseq_lowbit.quantization import Codes, Quantizer
from fairseq_lowbit.quantization.calibration import thin

Batch = TypeVar("Batch")

COLLAPSED = 0.05
# Values looked at per quantizer; all of them would take longer than the forward.
_SAMPLE = 32_768


@dataclass(frozen=True)
class QuantizerHealth:
    """One quantizer on one batch.

    Attributes:
        sqnr_db: signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - decode)^2).
        clipped: share of values more than half a step beyond the outermost decoded level.
        levels_used: share of the 2^bits levels that occur.
        entropy: of the levels' shares, in bits: how much information the stored ``bits`` carry.
            None in records of versions that did not measure it.
        at_floor: share of its scales at the smallest value a scale may have.
    """

    name: str
    bits: int
    sqnr_db: float
    clipped: float
    levels_used: float
    at_floor: float = 0.0
    entropy: float | None = None

    @property
    def layer(self) -> int | None:
        """Layer the quantizer belongs to, from 0; None outside the layers."""
        return split_layer(self.name)[0]


@dataclass(frozen=True)
class Health:
    """Health of all quantizers and layers.

    Attributes:
        centered_std: per layer 1..L, the standard deviation over frames around each feature's
            mean, relative to the root mean square of the layer's output. A healthy layer has .5 to
            1, one that is constant over time nearly 0.
    """

    quantizers: tuple[QuantizerHealth, ...]
    centered_std: tuple[float, ...]

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def split_layer(name: str) -> tuple[int | None, str]:
    """The layer, from 0, that a module belongs to, and its name within the layer; None and the
    whole name outside the layers.

    >>> split_layer("encoder.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj')
    """
    match = re.search(r"(?:^|\.)layers\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def every_layer(model: LayeredEncoder, waveform: Tensor) -> Sequence[Tensor]:
    """Runs every operator of ``model``; the outputs of layers 1..L, [batch, frames, features]."""
    outputs, _ = model.hidden_states(waveform)
    model.project_final(outputs[-1])  # the last quantizers there may be
    return outputs


@torch.no_grad()
def measure_health(
    model: nn.Module,
    batch: Batch,
    forward: Callable[[Batch], Sequence[Tensor]] | None = None,
) -> Health:
    """Runs ``model`` in eval mode on ``batch``, all of it valid.

    Args:
        forward: runs ``model`` on ``batch`` and returns the outputs of its layers; none are needed
            for the health of quantizers. Default: :func:`every_layer` of waveforms
            [batch, samples].

    Raises:
        LowbitError: a model without ``hidden_states``, and no ``forward``.
    """
    if forward is None and not hasattr(model, "hidden_states"):
        raise LowbitError(
            f"{type(model).__name__} has no hidden_states: give forward=, which runs it on the "
            "batch and returns the outputs of its layers"
        )
    forward = forward or partial(every_layer, model)
    was_training = model.training
    model.eval()
    try:
        with watching(model) as found:
            outputs = forward(batch)
    finally:
        model.train(was_training)
    return Health(tuple(found), tuple(centered_std(output) for output in outputs))


@contextmanager
def watching(model: nn.Module) -> Iterator[list[QuantizerHealth]]:
    """Collects the health of every quantizer that ``model`` calls in the block, without padding."""
    found: list[QuantizerHealth] = []
    handles = [
        quantizer.register_forward_hook(_observer(name, found))
        for name, quantizer in quantizers(model)
    ]
    try:
        with eagerly():
            yield found
    finally:
        for handle in handles:
            handle.remove()


def centered_std(output: Tensor) -> float:
    """[batch, frames, features] -> standard deviation around the feature means over the rms."""
    frames = output.float().flatten(0, 1)
    rms = frames.square().mean().sqrt()
    return float((frames - frames.mean(0)).square().mean().sqrt() / rms.clamp_min(1e-12))


def collapsed_layers(centered: tuple[float, ...]) -> list[int]:
    """Layers, from 1, whose output is constant over time."""
    return [index for index, value in enumerate(centered, 1) if value < COLLAPSED]


def refuse_collapsed(centered: tuple[float, ...], path: object) -> None:
    """Raises LowbitError when a teacher has a layer that is constant over time."""
    dead = collapsed_layers(centered)
    if dead:
        raise LowbitError(
            f"teacher {path} has collapsed: layers {dead} are constant over time (centred standard "
            f"deviation {min(centered):.4f}, healthy is above {COLLAPSED}). Train the teacher "
            "longer or with a lower learning rate; a student cannot learn from it"
        )


def _observed(quantizer: Quantizer, inputs: tuple) -> tuple[Tensor, Codes]:
    """The float values that a quantizer's codes approximate, fp32, and the codes.

    Args:
        inputs: of its forward, without padding.
    """
    x, *ratio = inputs
    # All ratios are equal without padding, so one value stands for them.
    ratio = [r.reshape(-1)[:1] for r in ratio if r is not None]
    values = thin(x, _SAMPLE) if quantizer.is_per_tensor else x
    return quantizer.target(values), quantizer.codes(values, *ratio)


def quantizer_health(
    name: str, quantizer: Quantizer, values: Tensor, codes: Codes
) -> QuantizerHealth:
    """The health of ``quantizer`` on fp32 values and the codes that approximate them."""
    noise = (values - codes.decode()).square().sum().clamp_min(1e-20)
    signal = values.square().sum().clamp_min(1e-20)
    counts = codes.level_counts().cpu()
    return QuantizerHealth(
        name=name,
        bits=codes.levels.bits,
        sqnr_db=float(10 * torch.log10(signal / noise)),
        clipped=float(codes.is_clipped(values).float().mean()),
        levels_used=int(counts.count_nonzero()) / codes.levels.size,
        at_floor=quantizer.share_at_floor(),
        entropy=entropy_bits(counts),
    )


def entropy_bits(counts: Tensor) -> float:
    """Entropy in bits of how often each level occurs, 0 to log2 of their number."""
    shares = counts[counts > 0].double() / counts.sum()
    entropy = float(-(shares * shares.log2()).sum())
    return min(max(0.0, entropy), math.log2(len(counts)))


def _observer(name: str, measured: list[QuantizerHealth]):
    def observe(quantizer: Quantizer, inputs: tuple, output: Tensor) -> None:
        values, codes = _sample(*_observed(quantizer, inputs))
        measured.append(quantizer_health(name, quantizer, values, codes))

    return observe


def _sample(values: Tensor, codes: Codes) -> tuple[Tensor, Codes]:
    """An even sample of values and their codes, flat."""

    def some(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else thin(tensor.expand(codes.integers.shape), _SAMPLE)

    integers = some(codes.integers).to(torch.int16)
    scale, zero_point = some(codes.scale), some(codes.zero_point)
    own = Codes(integers, scale, codes.levels, integers.shape, zero_point)
    return some(values.reshape(codes.integers.shape)), own
