"""Health against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.monitoring.health import (
    QuantizerHealth,
    centered_std,
    measure_health,
    refuse_collapsed,
    split_layer,
)
from fairseq_lowbit.nn import calibrate, quantizers
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.quantization import ElasticQuantizer, LevelSet, non_negative, signed
from tests.shapes import TINY


class OneQuantizer(nn.Module):
    """A "model" whose waveform goes through one quantizer."""

    def __init__(
        self, levels: LevelSet, scale: float, shift: float | None = None, **shapes
    ) -> None:
        super().__init__()
        if shift is not None:
            shapes = {"shift_shape": (), **shapes}
        self.quantizer = ElasticQuantizer(levels, 1, **shapes)
        shift = None if shift is None else torch.tensor(shift)
        self.quantizer.set_scale(torch.tensor(scale), shift)
        self.ratio: Tensor | None = None

    def hidden_states(self, waveform: Tensor) -> tuple[list[Tensor], None]:
        ratio = () if self.ratio is None else (self.ratio,)
        return [self.quantizer(waveform, *ratio)[..., None]], None

    def project_final(self, x: Tensor) -> Tensor:
        return x


def health_of(model: OneQuantizer, values: list[float]):
    (health,) = measure_health(model, torch.tensor([values])).quantizers
    return health


def test_two_signed_bits() -> None:
    # Codes -2 -1 0 0 1; errors 1, .1, .2, .4, 1.6. -3 and 2.6 lie beyond -2.5 and 1.5.
    health = health_of(OneQuantizer(signed(2), 1.0), [-3.0, -0.9, 0.2, 0.4, 2.6])
    signal, noise = 9 + 0.81 + 0.04 + 0.16 + 6.76, 1 + 0.01 + 0.04 + 0.16 + 2.56
    assert health.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
    assert health.clipped == pytest.approx(2 / 5)
    assert health.levels_used == 1.0
    assert health.entropy == pytest.approx(3 / 5 * math.log2(5) + 2 / 5 * math.log2(5 / 2))
    assert (health.name, health.bits, health.layer) == ("quantizer", 2, None)


def test_sign_with_a_threshold() -> None:
    # u = x - .5: codes -1 1 1; the shift is not added back.
    health = health_of(OneQuantizer(signed(1), 1.0, shift=0.5), [0.4, 0.6, 2.25])
    signal, noise = 0.16 + 0.36 + 5.0625, 1.96 + 0.16 + 1.5625
    assert health.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
    assert health.clipped == pytest.approx(1 / 3)
    assert health.levels_used == 1.0


def test_a_scale_far_too_large_wastes_levels() -> None:
    health = health_of(OneQuantizer(non_negative(4), 10.0), [0.0, 1.0, 2.0, 9.0])
    assert health.levels_used == 2 / 16
    assert health.entropy == pytest.approx(3 / 4 * math.log2(4 / 3) + 1 / 4 * math.log2(4))
    assert health.clipped == 0


@given(
    levels=st.sampled_from([make(bits) for make in (signed, non_negative) for bits in (1, 3, 8)]),
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=300),
    scale=st.floats(1e-3, 1e3),
)
@settings(max_examples=50, deadline=None)
def test_what_always_holds(levels: LevelSet, values: list[float], scale: float) -> None:
    health = health_of(OneQuantizer(levels, scale), values)
    used = round(health.levels_used * 2**levels.bits)
    assert 1 <= used <= min(len(values), 2**levels.bits)
    assert 0 <= health.entropy <= math.log2(used) + 1e-9
    assert health.entropy <= health.bits
    assert (health.entropy == 0) == (used == 1)
    assert 0 <= health.clipped <= 1


def test_records_of_health_without_an_entropy_are_read() -> None:
    record = {"name": "x", "bits": 1, "sqnr_db": 3.0, "clipped": 0.0, "levels_used": 1.0}
    assert QuantizerHealth(**record).entropy is None


def test_the_length_ratio_scales_with_the_probabilities() -> None:
    model = OneQuantizer(non_negative(2), 0.5)
    plain = health_of(OneQuantizer(non_negative(2), 1.0), [0.2, 1.1, 2.4, 8.0])
    model.ratio = torch.full((1, 1), 2.0)
    assert health_of(model, [0.2, 1.1, 2.4, 8.0]) == plain
    assert plain.clipped == 1 / 4


def test_per_channel_scales() -> None:
    model = OneQuantizer(signed(2), 1.0, scales=2)
    model.quantizer.set_scale(torch.tensor([[1.0], [10.0]]))
    (health,) = measure_health(model, torch.tensor([[1.0, -2.0], [10.0, -19.0]])).quantizers
    # Exact but for the last value: -2 times 10.
    assert health.sqnr_db == pytest.approx(10 * math.log10((1 + 4 + 100 + 361) / 1), abs=1e-4)
    assert health.clipped == 0
    assert health.levels_used == 2 / 4


def test_centered_std() -> None:
    frames = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    # Deviations of 1 in one of two features, over a mean square of 10 / 4.
    assert centered_std(frames) == pytest.approx(math.sqrt(0.5 / 2.5))
    assert centered_std(torch.full((2, 7, 5), 3.0)) == pytest.approx(0, abs=1e-6)
    assert centered_std(torch.zeros(1, 4, 4)) == 0
    random = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(0))
    assert centered_std(random) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "name, layer, inside",
    [
        ("encoder.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("hubert.encoder.layers.11.attention.q_proj", 11, "attention.q_proj"),
        ("layers.0.fc1", 0, "fc1"),
        ("feature_extractor.conv_layers.1.0", None, "feature_extractor.conv_layers.1.0"),
        ("final_proj", None, "final_proj"),
    ],
)
def test_layers_by_the_names_of_any_model(name: str, layer: int | None, inside: str) -> None:
    assert split_layer(name) == (layer, inside)


@pytest.fixture
def quantized() -> Hubert:
    torch.manual_seed(0)
    model = Hubert(TINY, precision=Precision("bitla_w2a4"))
    calibrate(model, [torch.randn(2, 4000)], model.hidden_states)
    return model


def test_every_quantizer_of_a_model(quantized: Hubert) -> None:
    health = measure_health(quantized, torch.randn(2, 4000))
    names = [name for name, _ in quantizers(quantized)]
    assert sorted(entry.name for entry in health.quantizers) == sorted(names)
    assert {entry.layer for entry in health.quantizers} == {0, 1}
    bits = {entry.name: entry.bits for entry in health.quantizers}
    assert bits["encoder.layers.1.fc1.weight_quantizer"] == 2
    assert bits["encoder.layers.1.fc1.input_quantizer"] == 4
    assert len(health.centered_std) == 2
    assert all(value > 0.1 for value in health.centered_std)


def test_every_method_is_measured_and_the_final_projection_too() -> None:
    torch.manual_seed(0)
    rules = [
        Rule("final_proj", method="minmax", weight_bits=8, activation_bits=8),
        Rule("*.fc1", method="stretched", granularity="per_group", group_size=4),
        Rule("*.fc2", method="absmax"),
    ]
    model = Hubert(TINY, precision=Precision("sqwq_w4", rules))
    calibrate(model, [torch.randn(2, 4000)], model.final_output)
    health = measure_health(model, torch.randn(2, 4000))
    names = [name for name, _ in quantizers(model)]
    assert sorted(entry.name for entry in health.quantizers) == sorted(names)
    # Against the float weight that is approximated, which of a squashed one is not what is stored.
    assert all(entry.sqnr_db > 15 for entry in health.quantizers)
    assert all(entry.clipped < 0.05 for entry in health.quantizers)
    assert all(entry.levels_used > 0.1 for entry in health.quantizers)


def test_measuring_leaves_training_alone(quantized: Hubert) -> None:
    quantized.train()
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    waveform = torch.randn(1, 4000)
    state = torch.get_rng_state()
    first = measure_health(quantized, waveform)
    assert quantized.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(quantizer._forward_hooks for _, quantizer in quantizers(quantized))
    assert all(torch.equal(before[k], v) for k, v in quantized.state_dict().items())
    # TINY has dropout: in training mode two passes would differ.
    assert measure_health(quantized, waveform) == first


def test_a_collapsed_layer_is_found(quantized: Hubert) -> None:
    norm = quantized.encoder.layers[1].final_layer_norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.normal_()
    health = measure_health(quantized, torch.randn(2, 4000))
    with pytest.raises(LowbitError, match=r"teacher my\.pt has collapsed: layers \[2\]"):
        refuse_collapsed(health.centered_std, "my.pt")


def test_a_healthy_teacher_passes(quantized: Hubert) -> None:
    refuse_collapsed(measure_health(quantized, torch.randn(2, 4000)).centered_std, "my.pt")
