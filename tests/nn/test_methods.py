"""Every method at every kind of place, in one model that quantizes everything it can."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import (
    Linear,
    PositionalConv1d,
    calibrate,
    describe_squashing,
    float_state,
    forget_calibration,
    is_calibrated,
    quantizers,
    squashed_weights,
)
from fairseq_lowbit.nn.attention import OPERANDS
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.precision import InputKind, Precision, Rule
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
    squash_penalty,
)
from tests.shapes import TINY

METHODS = ("elastic", "stretched", "squashed", "absmax", "minmax")
METHOD = pytest.mark.parametrize("method", METHODS)
# By method: class and level set of weights, of linear and convolution inputs (after a GELU the
# elastic ones differ, see test_attach.py), of query, key and value, of probabilities.
EXPECTED = {
    "elastic": (
        (ElasticQuantizer, "signed"),
        (ElasticQuantizer, "signed"),
        (ElasticQuantizer, "signed"),
        (ElasticQuantizer, "non_negative"),
    ),
    "stretched": (
        (ElasticQuantizer, "mid_rise"),
        (ElasticQuantizer, "signed"),
        (ElasticQuantizer, "signed"),
        (ElasticQuantizer, "non_negative"),
    ),
    "squashed": (
        (SquashedQuantizer, "mid_rise"),
        (UniformQuantizer, "signed"),
        (ElasticQuantizer, "signed"),
        (ElasticQuantizer, "non_negative"),
    ),
    "absmax": (
        (UniformQuantizer, "signed"),
        (UniformQuantizer, "signed"),
        (UniformQuantizer, "signed"),
        (UniformQuantizer, "non_negative"),
    ),
    "minmax": ((UniformQuantizer, "non_negative"),) * 4,
}
OPERATORS = ["post_extract_proj", "encoder.pos_conv.0", "final_proj"]
OPERATORS += [f"feature_extractor.conv_layers.{i}.0" for i in range(3)]
for _layer in range(2):
    OPERATORS += [f"encoder.layers.{_layer}.self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    OPERATORS += [f"encoder.layers.{_layer}.fc{n}" for n in (1, 2)]
LENGTHS = [700, 420, 130]


def precision_of(method: str, *rules: Rule, weight: int = 2, activation: int = 5, **kwargs):
    everything = [Rule("*", method, weight, activation, **kwargs)]
    operands = [Rule(f"*.{name}", method, activation_bits=activation) for name in OPERANDS]
    return Precision("float", [*everything, *operands, *rules])


def build(precision: Precision, seed: int = 0) -> Hubert:
    torch.manual_seed(seed)
    model = Hubert(TINY, precision=precision)
    for parameter in (p for p in model.parameters() if p.dim() == 2):
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def waveform(batch: int = 2, samples: int = 700) -> Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(1))


def calibrated(precision: Precision) -> Hubert:
    model = build(precision)
    calibrate(model, [waveform()], model.final_output)
    return model


def kind_of(quantizer: Quantizer) -> tuple[type, str]:
    return type(quantizer), quantizer.levels.name


@METHOD
def test_every_place_gets_the_quantizers_of_its_method(method: str) -> None:
    model = build(precision_of(method))
    weights, inputs, operands, probabilities = EXPECTED[method]
    assert sorted(OPERATORS) == sorted(
        name for name, module in model.named_modules() if isinstance(module, Operator)
    )
    for name in OPERATORS:
        operator = model.get_submodule(name)
        assert kind_of(operator.weight_quantizer) == weights, name
        assert operator.weight_quantizer.levels.bits == 2
        shared = name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")
        if shared:
            assert operator.input_quantizer is None
        elif operator.input_kind != InputKind.GELU:
            assert kind_of(operator.input_quantizer) == inputs, name
            assert operator.input_quantizer.levels.bits == 5
    for attention in (layer.self_attn for layer in model.encoder.layers):
        assert kind_of(attention.input_quantizer) == inputs
        for operand in ("query", "key", "value"):
            assert kind_of(getattr(attention, f"{operand}_quantizer")) == operands
        assert kind_of(attention.probabilities_quantizer) == probabilities


@pytest.mark.parametrize("method", ["elastic", "stretched", "absmax", "minmax"])
@pytest.mark.parametrize("granularity, size", [("per_channel", None), ("per_group", 2)])
def test_scales_per_channel_and_per_group_at_every_place(
    method: str, granularity: str, size: int | None
) -> None:
    model = build(precision_of(method, granularity=granularity, group_size=size))
    calibrate(model, [waveform()], model.final_output)
    for name in OPERATORS:
        operator = model.get_submodule(name)
        weight = operator.stored_weight()
        values = size or weight[0].numel()
        codes = operator.weight_quantizer.codes(weight)
        assert codes.scale.shape == (weight.numel() // values, 1), name
        assert codes.decode().shape == weight.shape
        if isinstance(operator.weight_quantizer, ElasticQuantizer):
            qp = operator.weight_quantizer.levels.gradient_divisor
            expected = (values * qp) ** -0.5
            assert operator.weight_quantizer.gradient_scale == pytest.approx(expected), name


@pytest.mark.parametrize(
    "method, weight, activation",
    # One bit of min-max is zero or one end of the range: too little for a whole model.
    [*((method, 1, 2) for method in METHODS[:-1]), *((method, 2, 8) for method in METHODS)],
)
def test_forward_and_backward_are_finite_and_reach_everything(
    method: str, weight: int, activation: int
) -> None:
    model = calibrated(precision_of(method, weight=weight, activation=activation))
    assert is_calibrated(model)
    model.final_output(waveform(3), torch.tensor(LENGTHS)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name == "mask_emb":
            continue
        assert torch.isfinite(parameter.grad).all(), name
        # The group norm behind the first convolution takes a constant away.
        if name != "feature_extractor.conv_layers.0.0.input_quantizer.relative_shift":
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("method", ["stretched", "squashed", "absmax", "minmax"])
def test_changing_the_bits_of_one_place_changes_the_output(method: str) -> None:
    """For the elastic method see test_attach.py."""
    before = calibrated(precision_of(method))
    output = before.final_output(waveform())
    for name in [n for n in OPERATORS if "layers.1." not in n or "conv" in n]:
        for side in ("weight_bits", "activation_bits"):
            bits = {"weight_bits": 2, "activation_bits": 5, side: 3}
            changed = build(precision_of(method, Rule(name, method, **bits)))
            changed.load_state_dict(before.state_dict(), strict=False)
            for _, quantizer in quantizers(changed):
                if not quantizer.is_calibrated:  # q, k, v no longer share their input's quantizer
                    quantizer.set_scale(torch.tensor(0.5))
            bits = [q.levels.bits for _, q in quantizers(changed)]
            assert bits.count(3) == 1, (name, side)
            assert not torch.equal(changed.final_output(waveform()), output), (name, side)


@pytest.mark.parametrize("method", ["absmax", "minmax", "squashed"])
def test_codes_of_the_front_end_are_the_same_alone_and_in_a_padded_batch(method: str) -> None:
    """Ranges per frame see neither padding nor other utterances, not even the waveform's."""
    model = calibrated(precision_of(method, activation=8))
    batch = waveform(3) * torch.tensor([1.0, 0.1, 5.0])[:, None]
    for row, samples in enumerate(LENGTHS):
        batch[row, samples:] *= 100
    together = codes_of_inputs(model, batch, torch.tensor(LENGTHS))
    assert len(together) == 3
    for row, samples in enumerate(LENGTHS):
        alone = codes_of_inputs(model, batch[row : row + 1, :samples], None)
        for name, integers in alone.items():
            assert torch.equal(together[name][row, :, : integers.shape[-1]], integers[0]), name


def codes_of_inputs(model: Hubert, batch: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
    found, handles = {}, []
    for name, quantizer in quantizers(model.feature_extractor):
        if name.endswith("input_quantizer"):
            handles.append(
                quantizer.register_forward_hook(
                    lambda q, x, _, name=name: found.update({name: q.codes(*x).integers})
                )
            )
    model.extract(batch, lengths)
    for handle in handles:
        handle.remove()
    return found


def test_a_waveform_is_really_quantized() -> None:
    """A range per sample would hand every sample on as it is."""
    model = build(precision_of("absmax", activation=3))
    conv = model.feature_extractor.conv_layers[0]["0"]
    x = waveform()[:, None]
    codes = conv.input_quantizer.codes(x)
    assert codes.scale.shape == (2, 1, 1)
    assert codes.integers.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert not torch.allclose(conv.input_quantizer(x), x, rtol=0.05)


@pytest.mark.parametrize("method", ["absmax", "minmax", "squashed"])
def test_one_bit_of_the_waveform_needs_a_learned_scale(method: str) -> None:
    with pytest.raises(
        LowbitError, match=r"rule \*:.*feature_extractor\.conv_layers\.0\.0.*elastic"
    ):
        build(Precision("float", [Rule("*", method, weight_bits=4, activation_bits=1)]))
    build(Precision("float", [Rule("*", "elastic", weight_bits=4, activation_bits=1)]))


def test_projections_share_a_plain_input_quantizer_when_their_methods_agree() -> None:
    rule = Rule("*.0.self_attn.v_proj", "minmax", 2, 5)
    first, second = (
        layer.self_attn for layer in build(precision_of("absmax", rule)).encoder.layers
    )
    assert first.input_quantizer is None
    assert first.v_proj.input_quantizer.kind == "minmax"
    assert second.input_quantizer.kind == "absmax"


@METHOD
def test_whole_forward_and_backward_never_wait_for_the_device(method: str) -> None:
    with FakeTensorMode():
        model = Hubert(TINY, precision=precision_of(method)).eval()
        for _, quantizer in quantizers(model):
            if not isinstance(quantizer, UniformQuantizer):
                quantizer.mark_calibrated(True)
        loss = model.final_output(torch.randn(2, 700), torch.tensor([700, 500])).square().sum()
        if squashed_weights(model):
            loss = loss + squash_penalty(squashed_weights(model))
        loss.backward()
        assert model.final_proj.bias.grad.shape == (8,)


SQUASHED = precision_of("squashed", weight=4)


def test_squashing_keeps_the_float_weights_but_for_what_it_clips() -> None:
    before = {name: build(SQUASHED).get_submodule(name).stored_weight() for name in OPERATORS}
    model = build(SQUASHED)
    shares = calibrate(model, [waveform()], model.final_output)
    assert sorted(shares) == sorted(OPERATORS)
    for name, weight in before.items():
        operator = model.get_submodule(name)
        limit = 0.999 * operator.weight_quantizer.gain
        rows = weight.flatten(1)
        assert shares[name] == pytest.approx((rows.abs() > limit).float().mean().item()), name
        assert shares[name] < 0.1
        target = operator.weight_quantizer.target(operator.stored_weight()).flatten(1)
        torch.testing.assert_close(target, rows.clamp(-limit, limit), rtol=1e-3, atol=1e-4)
        spread = operator.stored_weight().flatten(1).std(1, correction=0)
        wanted = torch.full_like(spread, operator.weight_quantizer.target_std)
        torch.testing.assert_close(spread, wanted, rtol=0, atol=2e-3)


def test_the_summary_of_squashing_names_the_most_clipped_module() -> None:
    text = describe_squashing({"a": 0.01, "b": 0.03})
    assert text == (
        "squashed the weights of 2 modules, clipping 2.000% of them on average and most in b "
        "(3.000%)"
    )


def test_calibrating_again_squashes_no_weight_twice() -> None:
    model = calibrated(SQUASHED)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert calibrate(model, [waveform(), waveform(3)], model.final_output) == {}
    for (weight, _), name in zip(squashed_weights(model), OPERATORS, strict=True):
        assert weight.abs().max() > 1, name
    for name, value in model.state_dict().items():
        if "_quantizer." not in name or "log_gain" in name:
            assert torch.equal(value, before[name]), name


def test_other_methods_leave_weights_alone() -> None:
    for method in ("elastic", "stretched", "absmax", "minmax"):
        plain, model = build(precision_of(method)), calibrated(precision_of(method))
        for name, value in plain.named_parameters():
            if "_quantizer." not in name:
                assert torch.equal(model.get_parameter(name), value), (method, name)
        assert squashed_weights(model) == []
        assert float_state(model).keys() == model.state_dict().keys()


def test_float_state_makes_a_float_model_of_what_squashed_weights_stand_for() -> None:
    model, plain = calibrated(SQUASHED), build(Precision("float"))
    plain.load_state_dict(
        {name: value for name, value in float_state(model).items() if "_quantizer." not in name}
    )
    for name in OPERATORS:
        operator = model.get_submodule(name)
        expected = operator.weight_quantizer.target(operator.stored_weight())
        torch.testing.assert_close(plain.get_submodule(name).stored_weight(), expected)
    # Before the weights are squashed they are the float weights.
    fresh = build(SQUASHED)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in float_state(fresh).items())


def test_positional_weight_state_is_the_stored_weight_again() -> None:
    torch.manual_seed(0)
    source, target = PositionalConv1d(8, 6, 2), PositionalConv1d(8, 6, 2)
    nn.init.uniform_(source.weight_g, 0.5, 2.0)
    weight = source.stored_weight().detach()
    target.load_state_dict({**target.weight_state(weight), "bias": source.bias})
    torch.testing.assert_close(target.stored_weight(), weight)


def test_squashed_weights_carry_their_graph() -> None:
    model = calibrated(SQUASHED)
    squash_penalty(squashed_weights(model)).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {f"{name}.weight" for name in OPERATORS if "pos_conv" not in name}
    assert reached == expected | {"encoder.pos_conv.0.weight_v", "encoder.pos_conv.0.weight_g"}


def test_forgotten_calibration_squashes_anew() -> None:
    model = calibrated(SQUASHED)
    forget_calibration(model)
    assert not is_calibrated(model)
    with torch.no_grad():
        for name in OPERATORS:
            nn.init.normal_(next(iter(model.get_submodule(name).parameters())), std=0.01)
    assert sorted(calibrate(model, [waveform()], model.final_output)) == sorted(OPERATORS)


def test_squashed_weights_form_a_group_of_their_own() -> None:
    """Whatever a run does to its model before the optimizer is built."""
    model = build(precision_of("elastic", Rule("*.fc1", "squashed", 2, 8)))
    pos_conv = build(SQUASHED).encoder.pos_conv[0]
    for twin in (model, model.to("cpu", torch.bfloat16), copy.deepcopy(model), model.float()):
        groups = {n: getattr(p, "param_group", None) for n, p in twin.named_parameters()}
        squashed = {name for name, group in groups.items() if group == "squashed_weight"}
        assert squashed == {f"encoder.layers.{i}.fc1.weight" for i in range(2)}
        scales = {name for name, group in groups.items() if group == "quantizer_scale"}
        assert scales == {n for n in groups if n.endswith(("log_scale", "log_gain"))}
    for twin in (pos_conv, copy.deepcopy(pos_conv)):
        groups = {n: getattr(p, "param_group", None) for n, p in twin.named_parameters()}
        assert [groups[f"weight_{part}"] for part in "vg"] == ["squashed_weight"] * 2
        assert groups["bias"] is None


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_squashed_linear_learns(bits: int) -> None:
    """From a float layer towards another one, regulariser included."""
    torch.manual_seed(0)
    teacher, student = Linear(16, 8), Linear(16, 8)
    student.weight_quantizer = SquashedQuantizer(bits, 8, 16, target_std=0.84)
    with torch.no_grad():
        student.weight.copy_(student.weight_quantizer.fit(student.weight))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    x = torch.randn(200, 16)
    losses = []
    for _ in range(100):
        loss = (student(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        (loss + 0.01 * squash_penalty([(student.weight, 0.84)])).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < {1: 0.5, 2: 0.25, 8: 0.05}[bits] * losses[0]
