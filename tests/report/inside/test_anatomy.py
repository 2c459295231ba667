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
from fairseq_lowbit.nn.attention import OPERANDS
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.quantization import ElasticQuantizer, Quantizer, SquashedQuantizer
from fairseq_lowbit.report.inside.anatomy import MAX_SECONDS, Anatomy, dissect
from fairseq_lowbit.report.inside.attention import focus, layer_attention
from fairseq_lowbit.report.inside.quantizers import QUANTILES, QuantizerAnatomy
from fairseq_lowbit.report.inside.weights import first_middle_last
from tests.shapes import TINY

METHODS = ("elastic", "stretched", "squashed", "absmax", "minmax")
WAVEFORM = torch.randn(1, 1500, generator=torch.Generator().manual_seed(1))
ATTENTION = "encoder.layers.1.self_attn"


def everything(method: str, weight: int, activation: int, **kwargs) -> Precision:
    """Every place of a model, operands included, at these bits."""
    rules = [Rule("*", method, weight, activation, **kwargs)]
    rules += [Rule(f"*.{name}", method, activation_bits=activation) for name in OPERANDS]
    if activation == 1 and method not in ("elastic", "stretched"):
        rules += [Rule("feature_extractor.*", "none")]  # a waveform's bit needs a learned scale
    return Precision("float", rules)


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


def by_name(anatomy: Anatomy) -> dict[str, QuantizerAnatomy]:
    return {quantizer.health.name: quantizer for quantizer in anatomy.quantizers}


def inputs_of(model: Hubert, waveform: Tensor = WAVEFORM) -> dict[str, tuple[np.ndarray, float]]:
    """What every quantizer is called with, and its length ratio."""
    seen = {}

    def see(name: str):
        def hook(quantizer, inputs, output):
            x, *ratio = inputs
            ratio = [float(r) for r in ratio if r is not None]
            seen[name] = x.detach().double().numpy(), *(ratio or [1.0])

        return hook

    handles = [q.register_forward_hook(see(name)) for name, q in quantizers(model)]
    model.final_output(waveform)
    for handle in handles:
        handle.remove()
    return seen


def brute_force(
    quantizer: ElasticQuantizer, values: np.ndarray, ratio: float
) -> tuple[float, float, float, float, list[float]]:
    """SQNR, clipped share, share of levels, entropy and relative quantiles of an elastic quantizer
    of one scale."""
    scale = ratio * quantizer.scale.item()
    shift = 0.0 if quantizer.shift is None else ratio * quantizer.shift.detach().double().numpy()
    u = (values - shift) / scale
    lo, hi = quantizer.levels.lo, quantizer.levels.hi
    code = np.where(u >= 0, 1, -1) if lo == -1 == -hi else np.clip(np.round(u), lo, hi)
    half = 1.0 if lo == -1 == -hi else 0.5
    noise = ((values - scale * code) ** 2).sum()
    sqnr = 10 * math.log10((values**2).sum() / noise)
    outside = (values < scale * (lo - half)) | (values > scale * (hi + half))
    shares = np.unique(code, return_counts=True)[1] / code.size
    entropy = -(shares * np.log2(shares)).sum()
    used = len(shares) / 2**quantizer.levels.bits
    quantiles = np.quantile(values / (scale * max(-lo, hi)), np.array(QUANTILES) / 100)
    return sqnr, outside.mean(), used, entropy, quantiles.tolist()


@pytest.mark.parametrize("name", ["bitla_w1a1", "bitla_w2a2", "bitla_w4a8"])
def test_elastic_quantizers_are_those_of_brute_force(name: str) -> None:
    model = calibrated(Precision(name))
    for index, quantizer in enumerate(q for _, q in quantizers(model)):
        if quantizer.shift is not None:  # as training leaves them
            nn.init.constant_(quantizer.shift, 0.1 * quantizer.scale.item() * (index % 3 - 1))
    anatomy, seen = by_name(dissected(model)), inputs_of(model)
    assert anatomy.keys() == dict(quantizers(model)).keys() == seen.keys()
    for place, quantizer in quantizers(model):
        sqnr, clipped, used, entropy, quantiles = brute_force(quantizer, *seen[place])
        own = anatomy[place]
        assert own.health.sqnr_db == pytest.approx(sqnr, abs=1e-3), place
        assert own.health.clipped == pytest.approx(clipped, abs=1e-6), place
        assert own.health.levels_used == used, place
        assert own.health.entropy == pytest.approx(entropy, abs=1e-6), place
        assert own.quantiles == pytest.approx(quantiles, abs=1e-4), place


def test_scales_of_frames_measure_each_value_in_its_own_frame() -> None:
    model = calibrated(Precision("absmax_w8a4"))
    anatomy, seen = by_name(dissected(model)), inputs_of(model)
    name = "encoder.layers.1.fc1.input_quantizer"
    values, _ = seen[name]
    scale = np.abs(values).max(-1, keepdims=True) / 7
    expected = np.quantile(values / (8 * scale), np.array(QUANTILES) / 100)
    assert anatomy[name].quantiles == pytest.approx(expected.tolist(), abs=1e-5)
    assert anatomy[name].levels == pytest.approx([k / 8 for k in range(-8, 8)])
    assert anatomy[name].health.clipped == 0
    assert len(anatomy["encoder.layers.1.fc1.weight_quantizer"].levels) == 2  # 256 are too many


def test_the_range_of_affine_scales_is_the_widest() -> None:
    model = calibrated(Precision("minmax_w4a4"))
    own = by_name(dissected(model))["encoder.layers.0.fc1.input_quantizer"]
    assert len(own.levels) == 2  # they differ from frame to frame
    assert -1 <= own.levels[0] < own.levels[1] == pytest.approx(1)
    assert own.levels[0] <= own.quantiles[0] + 0.1


def test_places_of_quantizers() -> None:
    anatomy = by_name(dissected(calibrated(everything("elastic", 2, 3))))
    assert anatomy[f"{ATTENTION}.query_quantizer"].place == "self_attn.query"
    assert not anatomy[f"{ATTENTION}.query_quantizer"].is_weight
    assert anatomy["encoder.layers.0.fc2.weight_quantizer"].place == "fc2.weight"
    assert anatomy["encoder.layers.0.fc2.weight_quantizer"].is_weight
    outside = anatomy["post_extract_proj.input_quantizer"]
    assert (outside.place, outside.health.layer) == ("post_extract_proj.input", None)


def test_health_and_anatomy_agree() -> None:
    model = calibrated(everything("elastic", 2, 3))
    short = WAVEFORM[:, :700]  # so that neither of them needs a sample
    health = {q.name: q for q in measure_health(model, short).quantizers}
    anatomy = by_name(dissected(model, waveform=short))
    assert health.keys() == anatomy.keys()
    for name, own in anatomy.items():
        assert own.health.sqnr_db == pytest.approx(health[name].sqnr_db, abs=1e-3), name
        assert own.health.levels_used == health[name].levels_used, name


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
    assert (own.layer, own.operator, own.bits) == (1, "fc1", 2)
    assert own.levels == (-2, -1, 0, 1)
    assert own.stored is None
    operator = model.get_submodule(own.module)
    scale = operator.weight_quantizer.scale.detach().numpy()
    for weight, density in (
        (operator.weight, own.encoded.student),
        (teacher.get_submodule(own.module).weight, own.encoded.teacher),
    ):
        rows = weight.detach().reshape(-1, size or TINY.encoder_embed_dim).numpy() / scale
        expected = histogram_of(rows, own.encoded.edges)
        # A value on an edge may fall to either side of it.
        assert np.abs(np.array(density) - expected).sum() < 0.05 * np.sum(expected)
    rows = operator.weight.detach().reshape(-1, size or TINY.encoder_embed_dim).numpy() / scale
    codes = np.clip(np.round(rows), -2, 1)
    assert own.shares == pytest.approx([(codes == level).mean() for level in own.levels])


def test_affine_weights_lie_on_the_axis_of_their_codes() -> None:
    own = dissected(calibrated(Precision("minmax_w2a4"))).weights[0]
    assert own.levels == (0, 1, 2, 3)
    assert own.encoded.edges[0] <= -0.5 < 3.5 <= own.encoded.edges[-1]
    width = own.encoded.edges[1] - own.encoded.edges[0]
    assert sum(own.encoded.student) * width == pytest.approx(1, abs=0.01)


def test_squashed_weights_before_and_after() -> None:
    model, teacher = calibrated(Precision("sqwq_w2")), build(seed=1)
    own = dissected(model, teacher).weights[-1]
    assert own.module == "encoder.layers.1.fc2"
    assert own.levels == (-0.75, -0.25, 0.25, 0.75)
    operator = model.get_submodule(own.module)
    stored = operator.weight.detach().numpy()
    assert own.stored.student == pytest.approx(histogram_of(stored, own.stored.edges), abs=0.02)
    squashed = np.tanh(stored)
    assert own.encoded.student == pytest.approx(histogram_of(squashed, own.encoded.edges), abs=0.02)
    codes = np.clip(np.floor(squashed * 2), -2, 1)
    assert own.shares == pytest.approx([(codes == k).mean() for k in (-2, -1, 0, 1)], abs=1e-6)
    # The teacher's in the student's units: over the gain, and what no tanh reaches clipped.
    gain = operator.weight_quantizer.gain.detach().numpy()
    units = teacher.get_submodule(own.module).weight.detach().numpy() / gain
    unsquashed = np.arctanh(np.clip(units, -0.999, 0.999))
    assert own.stored.teacher == pytest.approx(histogram_of(unsquashed, own.stored.edges), abs=0.02)


def test_a_squashed_teacher_stands_for_its_float_weight() -> None:
    student, teacher = calibrated(Precision("bitl_w8a8")), calibrated(Precision("sqwq_w8"))
    for own in dissected(student, teacher).weights:
        width = own.encoded.edges[1] - own.encoded.edges[0]
        apart = np.abs(np.array(own.encoded.student) - own.encoded.teacher).sum() * width
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
    layers = dissected(student, teacher).attention
    assert [layer.layer for layer in layers] == [0, 1]
    for layer in layers:
        own, wanted = maps_of(student, layer.layer), maps_of(teacher, layer.layer)
        assert len(own.unique()) <= 8
        moved = [(own[h] - wanted[h]).abs().sum() / (2 * len(own[h])) for h in range(2)]
        assert layer.moved == pytest.approx([float(m) for m in moved], abs=1e-4)
        assert layer.row_sums == pytest.approx(own.sum(-1).mean(-1).tolist(), abs=1e-4)
        assert [head.chosen for head in layer.heads] == ["most different", "median"]
        assert layer.heads[0].head == int(np.argmax(moved))
        for head in layer.heads:
            torch.testing.assert_close(head.teacher, wanted[head.head], atol=1e-5, rtol=1e-4)
            assert (head.student - own[head.head]).abs().gt(1e-5).float().mean() < 0.01
            # A slice would keep every head alive.
            assert head.student.untyped_storage().nbytes() == 4 * head.student.numel()
    assert layers[0].frame_seconds == 20 / 16000


def test_heads_by_how_far_they_moved() -> None:
    teacher = torch.zeros(5, 4, 4)
    teacher[:, :, 0] = 1
    student = teacher.clone()
    for head, share in enumerate([0.1, 0.5, 0.0, 0.3, 0.2]):
        student[head, :, 0] -= share
        student[head, :, 3] += share
    layer = layer_attention(2, 0.02, student, teacher)
    assert layer.moved == pytest.approx([0.1, 0.5, 0.0, 0.3, 0.2])
    assert [(h.head, h.chosen) for h in layer.heads] == [(1, "most different"), (4, "median")]
    assert layer.row_sums == pytest.approx([1] * 5)


def test_without_a_teacher_heads_by_their_focus() -> None:
    maps = torch.full((3, 4, 4), 0.25)
    maps[1] = torch.eye(4)
    maps[2] = torch.tensor([0.5, 0.5, 0, 0])
    assert focus(maps).tolist() == pytest.approx([-2, 0, -1])
    assert focus(maps * 0.5).tolist() == pytest.approx([-2, 0, -1])
    assert focus(torch.zeros(1, 4, 4)).tolist() == [0]
    layer = layer_attention(0, 0.02, maps)
    assert [(h.head, h.chosen) for h in layer.heads] == [(1, "most focused"), (2, "median")]
    assert layer.moved is None
    assert all(head.teacher is None for head in layer.heads)


def test_a_float_model_has_its_attention() -> None:
    model = build()
    anatomy = dissected(model)
    assert anatomy.quantizers == anatomy.weights == ()
    layer = anatomy.attention[1]
    assert layer.row_sums == pytest.approx([1, 1], abs=1e-5)
    expected = maps_of(model, 1)[layer.heads[0].head]
    torch.testing.assert_close(layer.heads[0].student, expected, atol=1e-5, rtol=1e-4)


def test_of_long_audio_the_middle_is_looked_at() -> None:
    shape = replace(TINY, conv_feature_layers="[(8,10,5)]+[(8,3,2)]*4+[(12,2,2)]*2")
    model = calibrated_on(shape, torch.randn(1, 16000, generator=torch.Generator().manual_seed(2)))
    audio = torch.randn(1, 100_001, generator=torch.Generator().manual_seed(3))
    whole = dissected(model, waveform=audio)
    assert whole.seconds == MAX_SECONDS == 4
    middle = dissected(model, waveform=audio[:, 18_000:82_000])
    assert whole.quantizers == middle.quantizers
    assert whole.attention[0].moved == middle.attention[0].moved
    assert len(whole.attention[0].heads[0].student) == 199


def calibrated_on(shape: Architecture, waveform: Tensor) -> Hubert:
    model = build(Precision("bitla_w2a2"), shape)
    calibrate(model, [waveform], model.final_output)
    return model


def test_a_large_tensor_is_sampled_fairly() -> None:
    shape = replace(TINY, encoder_embed_dim=512, encoder_ffn_embed_dim=640, encoder_layers=1)
    model = calibrated(Precision("bitl_w2a2"), shape)
    own = by_name(dissected(model))["encoder.layers.0.fc1.weight_quantizer"]
    quantizer, weight = model.encoder.layers[0].fc1.weight_quantizer, model.encoder.layers[0].fc1
    assert weight.weight.numel() > 300_000
    values = weight.weight.detach().double().numpy()
    sqnr, clipped, _, entropy, quantiles = brute_force(quantizer, values, 1.0)
    assert own.health.sqnr_db == pytest.approx(sqnr, abs=0.1)
    assert own.health.clipped == pytest.approx(clipped, abs=0.003)
    assert own.health.entropy == pytest.approx(entropy, abs=0.01)
    assert own.quantiles == pytest.approx(quantiles, abs=0.1)


def test_dissecting_leaves_the_models_alone() -> None:
    student, teacher = calibrated(Precision("sqwq_w2")), build(seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    first = dissected(student, teacher)
    assert not any(q._forward_hooks for _, q in quantizers(student))
    assert all(torch.equal(before[name], v) for name, v in student.state_dict().items())
    again = dissected(student, teacher)
    assert again.quantizers == first.quantizers
    assert [layer.moved for layer in again.attention] == [layer.moved for layer in first.attention]


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


@pytest.mark.parametrize("shape", [(1, 44), (1500,), (2, 1500), (0, 1500)])
def test_audio_that_cannot_be_looked_at_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LowbitError, match=r"at least 50 samples at 16000 Hz"):
        dissected(build(), waveform=torch.randn(shape))
