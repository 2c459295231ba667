"""Health of a model on one fixed batch: is a layer collapsing, is a quantizer wasting its levels?

Measured in a forward of its own without padding, so that training's forward stays untouched and
the curves of one run are comparable.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models.protocols import LayeredEncoder
from fairseq_lowbit.nn import quantizers
from fairseq_lowbit.quantization import Codes, Quantizer
from fairseq_lowbit.quantization.calibration import thin

Batch = TypeVar("Batch")

COLLAPSED = 0.05
# Values per quantizer: to sort all of them would take longer than the forward.
_SAMPLE = 32_768


@dataclass(frozen=True)
class QuantizerHealth:
    """One quantizer on one batch.

    Attributes:
        sqnr_db: signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - decode)^2).
        clipped: share of values more than half a step beyond the outermost decoded level.
        levels_used: share of the 2^bits levels that occur.
        entropy: of the levels' shares, in bits: what its codes tell of the ``bits`` paid for. None
            in a record that was written without it.
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
    """Attributes:
    centered_std: per layer 1..L, the standard deviation over frames around each feature's mean,
        relative to the root mean square of the layer's output. A healthy layer is near .5 to 1;
        one that is constant over time is near 0.
    """

    quantizers: tuple[QuantizerHealth, ...]
    centered_std: tuple[float, ...]

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def split_layer(name: str) -> tuple[int | None, str]:
    """The layer, from 0, that a module belongs to, and its name in there; None and the whole name
    outside the layers.

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
    """
    forward = forward or partial(every_layer, model)
    measured: list[QuantizerHealth] = []
    handles = [
        quantizer.register_forward_hook(_observer(name, measured))
        for name, quantizer in quantizers(model)
    ]
    was_training = model.training
    model.eval()
    try:
        outputs = forward(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return Health(tuple(measured), tuple(centered_std(output) for output in outputs))


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
            "longer or with a lower learning rate; distilling from it teaches nothing"
        )


def observed(quantizer: Quantizer, inputs: tuple, max_values: int) -> tuple[Tensor, Codes]:
    """What a quantizer was called with, for a forward hook without padding.

    Args:
        inputs: of its forward.
        max_values: where one scale serves all values, an even sample of them at most this large.

    Returns:
        the float values that the codes approximate, fp32, and the codes.
    """
    x, *ratio = inputs
    # All ratios are equal without padding, so one value stands for them.
    ratio = [r.reshape(-1)[:1] for r in ratio if r is not None]
    values = thin(x, max_values) if quantizer.is_per_tensor else x
    return quantizer.target(values), quantizer.codes(values, *ratio)


def quantizer_health(
    name: str, quantizer: Quantizer, values: Tensor, codes: Codes
) -> QuantizerHealth:
    """The health of ``quantizer`` by what :func:`observed` returned."""
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
        values, codes = _sample(*observed(quantizer, inputs, _SAMPLE))
        measured.append(quantizer_health(name, quantizer, values, codes))

    return observe


def _sample(values: Tensor, codes: Codes) -> tuple[Tensor, Codes]:
    """Evenly spaced ones, flat, of values and their codes."""

    def some(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else thin(tensor.expand(codes.integers.shape), _SAMPLE)

    integers = some(codes.integers).to(torch.int16)
    scale, zero_point = some(codes.scale), some(codes.zero_point)
    own = Codes(integers, scale, codes.levels, integers.shape, zero_point)
    return some(values.reshape(codes.integers.shape)), own
