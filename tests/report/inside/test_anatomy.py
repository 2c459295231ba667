"""Anatomies against what a few lines of numpy make of the same values."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel
from fairseq_lowbit.monitoring.health import measure_health
from fairseq_lowbit.nn import calibrate, quantizers
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.quantization import Quantizer, SquashedQuantizer
from fairseq_lowbit.report.inside.anatomy import Anatomy, dissect
from fairseq_lowbit.report.inside.attention import most_moved_head
from fairseq_lowbit.report.inside.weights import first_middle_last
from tests.shapes import TINY

WAVEFORM = torch.randn(1, 1500, generator=torch.Generator().manual_seed(1))


def build(precision: Precision | None = None, shape: Architecture = TINY, seed: int = 0) -> Hubert:
    torch.manual_seed(seed)
    model = Hubert(shape, precision=precision)
    for linear in (m for m in model.encoder.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.3)
    return model.eval()


def calibrated(precision: Precision, shape: Architecture = TINY, seed: int = 0) -> Hubert:
    model = build(precision, shape, seed)
    calibrate(model, [torch.cat([WAVEFORM, WAVEFORM.flip(1)])], model.final_output)
    return model


def loaded(model: Hubert, name: str = "student.pt") -> LoadedModel:
    return LoadedModel(model, Path(name), 0, has_final_projection=True, normalize=False)


def dissected(model: Hubert, teacher: Hubert | None = None, waveform: Tensor = WAVEFORM) -> Anatomy:
    return dissect(loaded(model), teacher and loaded(teacher, "teacher.pt"), waveform)


def test_quantizers_are_measured_as_in_training() -> None:
    model = calibrated(Precision("bitla_w4a3"))
    assert dissected(model).quantizers == measure_health(model, WAVEFORM).quantizers


def histogram_of(values: np.ndarray, edges: tuple[float, ...]) -> list[float]:
    counts = np.histogram(values, np.array(edges))[0]
    return (counts / (values.size * (edges[1] - edges[0]))).tolist()


@pytest.mark.parametrize(
    "granularity, size", [("per_tensor", None), ("per_channel", None), ("per_group", 4)]
)
def test_weights_over_their_scales_lie_against_the_levels(granularity: str, size) -> None:
    rule = Rule("*.fc1", weight_bits=2, activation_bits=4, granularity=granularity, group_size=size)
    model, teacher = calibrated(Precision("bitl_w2a4", [rule])), build(seed=1)
    (own,) = [w for w in dissected(model, teacher).weights if w.module == "encoder.layers.1.fc1"]
    assert (own.layer, own.operator) == (1, "fc1")
    assert own.levels == (-2, -1, 0, 1)
    operator = model.get_submodule(own.module)
    scale = operator.weight_quantizer.scale.detach().numpy()
    for weight, density in (
        (operator.weight, own.student),
        (teacher.get_submodule(own.module).weight, own.teacher),
    ):
        rows = weight.detach().reshape(-1, size or TINY.encoder_embed_dim).numpy() / scale
        expected = histogram_of(rows, own.edges)
        # A value on an edge may fall to either side of it.
        assert np.abs(np.array(density) - expected).sum() < 0.05 * np.sum(expected)
    rows = operator.weight.detach().reshape(-1, size or TINY.encoder_embed_dim).numpy() / scale
    codes = np.clip(np.round(rows), -2, 1)
    assert own.shares == pytest.approx([(codes == level).mean() for level in own.levels])


def test_affine_weights_lie_on_the_axis_of_their_codes() -> None:
    own = dissected(calibrated(Precision("minmax_w2a4"))).weights[0]
    assert own.levels == (0, 1, 2, 3)
    assert own.edges[0] <= -0.5 < 3.5 <= own.edges[-1]
    assert sum(own.student) * (own.edges[1] - own.edges[0]) == pytest.approx(1, abs=0.01)


def test_squashed_weights_are_shown_behind_tanh() -> None:
    model, teacher = calibrated(Precision("sqwq_w2")), build(seed=1)
    own = dissected(model, teacher).weights[-1]
    assert own.module == "encoder.layers.1.fc2"
    assert own.levels == (-0.75, -0.25, 0.25, 0.75)
    operator = model.get_submodule(own.module)
    squashed = np.tanh(operator.weight.detach().numpy())
    assert own.student == pytest.approx(histogram_of(squashed, own.edges), abs=0.02)
    codes = np.clip(np.floor(squashed * 2), -2, 1)
    assert own.shares == pytest.approx([(codes == k).mean() for k in (-2, -1, 0, 1)], abs=1e-6)
    # The teacher's in the student's units.
    gain = operator.weight_quantizer.gain.detach().numpy()
    units = teacher.get_submodule(own.module).weight.detach().numpy() / gain
    assert own.teacher == pytest.approx(histogram_of(units, own.edges), abs=0.02)


def test_a_squashed_teacher_stands_for_its_float_weight() -> None:
    student, teacher = calibrated(Precision("bitl_w8a8")), calibrated(Precision("sqwq_w8"))
    for own in dissected(student, teacher).weights:
        width = own.edges[1] - own.edges[0]
        apart = np.abs(np.array(own.student) - own.teacher).sum() * width
        assert apart < 0.1, own.module  # of the same weights calibration clipped a few
    assert isinstance(teacher.encoder.layers[0].fc1.weight_quantizer, SquashedQuantizer)


def test_which_weights_are_shown() -> None:
    shape = replace(TINY, encoder_layers=5)
    names = [w.module for w in dissected(calibrated(Precision("bitl_w2a4"), shape)).weights]
    operators = ("self_attn.q_proj", "fc1", "fc2")
    assert names == [f"encoder.layers.{n}.{o}" for o in operators for n in (0, 2, 4)]
    out_proj = Precision("float", [Rule("*.out_proj", weight_bits=2, activation_bits=16)])
    assert [w.operator for w in dissected(calibrated(out_proj)).weights] == [
        "self_attn.out_proj"
    ] * 2
    outside = Precision("float", [Rule("feature_extractor.*", weight_bits=2, activation_bits=8)])
    names = [w.module for w in dissected(calibrated(outside)).weights]
    assert names == [f"feature_extractor.conv_layers.{n}.0" for n in range(3)]
    activations = Precision("bitl_w16a4")
    assert dissected(calibrated(activations)).weights == ()


def test_first_middle_last() -> None:
    assert [first_middle_last(range(n)) for n in range(5)] == [
        [],
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 3],
    ]
    assert first_middle_last(range(12)) == [0, 5, 11]


def quantized(quantizer: Quantizer | None, values: Tensor, *ratio: Tensor) -> Tensor:
    return values if quantizer is None else quantizer(values, *ratio)


def maps_of(model: Hubert, layer: int) -> Tensor:
    """Attention of a layer as it weights the values, recomputed from its projections."""
    frames = model.project(model.extract(WAVEFORM))
    x = model.encoder.begin(frames.x, None)
    for module in model.encoder.layers[:layer]:
        x = module(x).x
    attention = model.encoder.layers[layer].self_attn
    x = quantized(attention.input_quantizer, x)
    query, key = (
        quantized(getattr(attention, f"{name}_quantizer"), getattr(attention, f"{name[0]}_proj")(x))
        .unflatten(-1, (attention.heads, -1))
        .transpose(1, 2)
        for name in ("query", "key")
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(attention.dim / attention.heads)
    probabilities = scores.softmax(-1)
    ratio = torch.tensor(500 / probabilities.shape[-1])
    return quantized(attention.probabilities_quantizer, probabilities, ratio)[0]


@torch.no_grad()
def test_attention_is_shown_as_it_is_used() -> None:
    student, teacher = calibrated(Precision("bitla_w4a3")), build(seed=1)
    anatomy = dissected(student, teacher)
    assert [head.layer for head in anatomy.attention] == [0, 1]
    for one in anatomy.attention:
        own, wanted = maps_of(student, one.layer), maps_of(teacher, one.layer)
        assert len(own.unique()) <= 8
        moved = [float((a - b).abs().sum() / (2 * len(a))) for a, b in zip(own, wanted)]
        assert one.moved == pytest.approx(moved[one.head], abs=1e-4)
        assert one.head == int(np.argmax(moved))
        torch.testing.assert_close(one.teacher, wanted[one.head], atol=1e-5, rtol=1e-4)
        assert (one.student - own[one.head]).abs().gt(1e-5).float().mean() < 0.01
        # A slice would keep every head in memory.
        assert one.student.untyped_storage().nbytes() == 4 * one.student.numel()
    assert anatomy.frame_seconds == 20 / 16000


def test_heads_by_how_far_they_moved() -> None:
    teacher = torch.zeros(5, 4, 4)
    teacher[:, :, 0] = 1
    student = teacher.clone()
    for head, share in enumerate([0.1, 0.5, 0.0, 0.3, 0.2]):
        student[head, :, 0] -= share
        student[head, :, 3] += share
    most = most_moved_head(2, student, teacher)
    assert (most.layer, most.head, most.moved) == (2, 1, pytest.approx(0.5))


def test_dissecting_leaves_the_models_alone() -> None:
    student, teacher = calibrated(Precision("sqwq_w2")), build(seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    first = dissected(student, teacher)
    assert not any(q._forward_hooks for _, q in quantizers(student))
    assert all(torch.equal(before[name], v) for name, v in student.state_dict().items())
    again = dissected(student, teacher)
    assert again.quantizers == first.quantizers
    assert [head.moved for head in again.attention] == [head.moved for head in first.attention]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder_layers": 1}, "student.pt has encoder_layers 2 and its teacher teacher.pt has 1"),
        ({"encoder_attention_heads": 4}, "encoder_attention_heads 2 .* has 4"),
        ({"encoder_ffn_embed_dim": 32}, "encoder_ffn_embed_dim 24 .* has 32"),
        ({"conv_feature_layers": "[(8,10,5),(8,3,2),(12,3,2)]"}, "conv_feature_layers"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(change: dict, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        dissected(build(), build(shape=replace(TINY, **change)))


def test_the_same_front_end_may_be_written_another_way() -> None:
    same = replace(TINY, conv_feature_layers="[(8,10,5)] + [(8,3,2)] + [(12,2,2)]", dropout=0.3)
    assert dissected(build(), build(shape=same)).attention


def test_models_that_say_nothing_are_refused() -> None:
    with pytest.raises(LowbitError, match="student.pt holds quantizers that were never calibrated"):
        dissected(build(Precision("bitl_w2a2")))
    student, teacher = calibrated(Precision("bitl_w1a1")), build()
    nn.init.constant_(teacher.encoder.layers[1].fc2.bias, math.nan)
    message = r"teacher.pt: encoder.layers.1.fc2.bias holds numbers that are not finite"
    with pytest.raises(LowbitError, match=message):
        dissected(student, teacher)
    # One bit of nan is a finite number.
    nn.init.constant_(student.encoder.layers[1].fc2.weight, math.nan)
    with pytest.raises(LowbitError, match=r"student.pt: encoder.layers.1.fc2.weight holds"):
        dissected(student)
