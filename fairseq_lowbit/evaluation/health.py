"""Health of a model on one fixed batch: is a layer collapsing, is a quantizer wasting its levels?

Measured in a forward of its own without padding, so that training's forward stays untouched and
the curves of one run are comparable.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import quantizers
from fairseq_lowbit.quantization import ElasticQuantizer
from fairseq_lowbit.quantization.calibration import thin
from fairseq_lowbit.quantization.elastic import SCALE_FLOOR

COLLAPSED = 0.05
_SAMPLE = 8192


@dataclass(frozen=True)
class QuantizerHealth:
    """One quantizer on one batch.

    Attributes:
        sqnr_db: signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - decode)^2).
        clipped: share of values more than half a step beyond the outermost decoded level.
        levels_used: share of the 2^bits levels that occur.
        at_floor: share of its scales at the smallest value a scale may have.
    """

    name: str
    bits: int
    sqnr_db: float
    clipped: float
    levels_used: float
    at_floor: float = 0.0

    @property
    def layer(self) -> int | None:
        """Encoder layer the quantizer belongs to, from 0; None outside the encoder layers."""
        match = re.match(r"encoder\.layers\.(\d+)\.", self.name)
        return int(match[1]) if match else None


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


@torch.no_grad()
def measure_health(model: Hubert, waveform: Tensor) -> Health:
    """Runs ``model`` in eval mode on ``waveform`` [batch, samples], all of it valid."""
    measured: list[QuantizerHealth] = []
    handles = [
        quantizer.register_forward_hook(_observer(name, measured))
        for name, quantizer in quantizers(model)
    ]
    was_training = model.training
    model.eval()
    try:
        outputs, _ = model.hidden_states(waveform)
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


def _observer(name: str, measured: list[QuantizerHealth]):
    def observe(quantizer: ElasticQuantizer, inputs: tuple, output: Tensor) -> None:
        x = inputs[0]
        ratio = inputs[1] if len(inputs) > 1 else None
        # All ratios are equal without padding, so one value stands for them.
        ratio = None if ratio is None else ratio.reshape(-1)[:1]
        # Per-channel scales and shifts need whole rows; the rest is thinned.
        if quantizer.log_scale.dim() or (quantizer.shift is not None and quantizer.shift.dim()):
            values, decoded = x.float(), output.float()
        else:
            values, decoded = thin(x, _SAMPLE), thin(output, _SAMPLE)
        measured.append(_health(name, quantizer, values, decoded, ratio))

    return observe


def _health(
    name: str, quantizer: ElasticQuantizer, values: Tensor, decoded: Tensor, ratio: Tensor | None
) -> QuantizerHealth:
    levels = quantizer.levels
    scale, shift = quantizer.scale, quantizer.shift
    if ratio is not None:
        scale, shift = scale * ratio, None if shift is None else shift * ratio
    u = values / scale if shift is None else (values - shift) / scale
    noise = (values - decoded).square().sum().clamp_min(1e-20)
    signal = values.square().sum().clamp_min(1e-20)
    # The shift moves thresholds only and is not decoded, so it does not move the levels.
    steps = values / scale
    clipped = ((steps < levels.lo - 0.5) | (steps > levels.hi + 0.5)).float().mean()
    used = levels.encode(u).unique().numel() / levels.size
    sqnr = 10 * torch.log10(signal / noise)
    at_floor = (quantizer.scale < 1.01 * SCALE_FLOOR).float().mean()
    return QuantizerHealth(name, levels.bits, float(sqnr), float(clipped), used, float(at_floor))
