"""Quantizers that collapse are told from those that work, and are named once."""

import math
from collections.abc import Callable

import pytest
import torch

from fairseq_lowbit.models import Hubert
from fairseq_lowbit.monitoring.collapse import CollapseWatch, collapse
from fairseq_lowbit.monitoring.health import measure_health
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.quantization import ElasticQuantizer
from fairseq_lowbit.quantization.elastic import SCALE_FLOOR
from tests.shapes import TINY

WAVEFORM = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))
INPUT, WEIGHT = "encoder.layers.0.fc1.input_quantizer", "encoder.layers.1.fc2.weight_quantizer"


def calibrated(precision: str) -> Hubert:
    torch.manual_seed(0)
    model = Hubert(TINY, precision=Precision(precision))
    for layer in model.encoder.layers:
        # As of a trained model, what the GELU reads is of size 1: with less, everything behind it
        # is nearer to 0 than to its lowest value.
        torch.nn.init.normal_(layer.fc1.weight, std=0.5)
    calibrate(model, [WAVEFORM], model.hidden_states)
    return model


def collapsed(model: Hubert) -> dict[str, str]:
    reasons = {e.name: collapse(e) for e in measure_health(model, WAVEFORM).quantizers}
    return {name: reason for name, reason in reasons.items() if reason}


@pytest.mark.parametrize("precision", ["bitla_w1a1", "bitla_w2a2", "bitla_w8a8"])
def test_calibrated_quantizers_work(precision: str) -> None:
    assert collapsed(calibrated(precision)) == {}


def scale_to_floor(quantizer: ElasticQuantizer) -> None:
    quantizer.log_scale.fill_(math.log(SCALE_FLOOR) - 3)


def far_too_small(quantizer: ElasticQuantizer) -> None:
    quantizer.log_scale.sub_(6)


def far_too_large(quantizer: ElasticQuantizer) -> None:
    quantizer.log_scale.add_(6)


@pytest.mark.parametrize(
    "damage, words",
    [
        (scale_to_floor, "scale at its smallest value"),
        (far_too_small, "of its values clipped"),
        (far_too_large, "1 of 4 levels in use"),
    ],
)
@pytest.mark.parametrize("name", [INPUT, WEIGHT])
def test_collapsed_ones_are_named(name: str, damage: Callable, words: str) -> None:
    model = calibrated("bitla_w2a2")
    with torch.no_grad():
        damage(model.get_submodule(name))
    found = collapsed(model)
    assert words in found[name]
    # Nothing that lies before it is blamed.
    assert name == next(iter(found))


def test_one_bit_says_nothing_with_one_level() -> None:
    model = calibrated("bitla_w1a1")
    with torch.no_grad():
        model.get_submodule(INPUT).relative_shift.fill_(100.0)
    assert collapsed(model)[INPUT] == "1 of 2 levels in use"


def test_each_is_said_once_and_again_after_it_recovered() -> None:
    watch, model = CollapseWatch(), calibrated("bitla_w2a2")
    healthy = measure_health(model, WAVEFORM).quantizers
    with torch.no_grad():
        scale_to_floor(model.get_submodule(WEIGHT))
    one = measure_health(model, WAVEFORM).quantizers
    with torch.no_grad():
        scale_to_floor(model.get_submodule(INPUT))
    two = measure_health(model, WAVEFORM).quantizers
    assert watch.warning(healthy) is None
    first = watch.warning(one)
    assert WEIGHT in first
    assert INPUT not in first
    for advice in ("optimizer.scale_lr_ratio", "model.precision.rules"):
        assert advice in first
    assert watch.warning(one) is None
    second = watch.warning(two)
    assert INPUT in second
    assert WEIGHT not in second
    assert watch.warning(healthy) is None
    assert WEIGHT in watch.warning(one)
