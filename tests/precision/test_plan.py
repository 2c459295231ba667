import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Architecture, Hubert
from fairseq_lowbit.precision import InputKind, Plan, Precision, Role, Rule, Site, resolve_plan
from fairseq_lowbit.precision.plan import input_levels
from fairseq_lowbit.quantization import ElasticQuantizer, LevelSet, non_negative, signed
from fairseq_lowbit.quantization.calibration import Calibrator

PLAIN_FRONT_END = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"


def base_plan(
    name: str = "float", rules: Sequence[Rule] = (), form: str = "asymmetric", **changes
) -> Plan:
    with torch.device("meta"):
        return Hubert(Architecture(**changes), precision=Precision(name, [*rules], form=form)).plan


def test_parameters_at_base_size() -> None:
    # The published count leaves the mask embedding out.
    assert base_plan().parameters == 92_211_328 + 768


@pytest.mark.parametrize(
    "precision, megabytes",
    [
        ("float", 184.42),
        ("bitl_w8a8", 99.49),
        ("bitl_w2a2", 35.79),
        ("bitl_w1a1", 25.17),
        ("bitla_w8a8", 99.54),
        ("bitla_w2a2", 35.84),
        ("bitla_w1a1", 25.23),
        ("sqwq_w8", 99.65),
        ("sqwq_w4", 57.19),
        ("sqwq_w2", 35.95),
        ("sqwq_w1", 25.34),
    ],
)
def test_stored_size_is_the_published_one(precision: str, megabytes: float) -> None:
    plan = base_plan(precision)
    assert (plan.bytes - 2 * 768) / 1e6 == pytest.approx(megabytes, abs=0.01)


def test_distilled_size_is_the_published_one_without_a_final_projection() -> None:
    plan = base_plan(conv_feature_layers=PLAIN_FRONT_END, encoder_layers=2)
    projection = next(entry for entry in plan.entries if entry.module == "final_proj")
    assert (plan.bytes - projection.bytes) / 1e6 == pytest.approx(46.98, abs=0.01)


FC1 = Site(
    "encoder.layers.0.fc1",
    "linear",
    Role.ENCODER_LINEAR,
    weights=512,
    others=32,
    channels=32,
    shifts=1,
)
OPERAND = Site("encoder.layers.0.self_attn.query", "operand", Role.ATTENTION_OPERAND, shifts=16)


def test_bytes_of_every_kind_of_site() -> None:
    sites = [
        FC1,
        Site(
            "encoder.layers.0.fc2",
            "linear",
            Role.ENCODER_LINEAR,
            weights=512,
            others=16,
            channels=16,
            shifts=1,
        ),
        OPERAND,
        Site(
            "encoder.layers.0.self_attn.probabilities", "operand", Role.ATTENTION_OPERAND, shifts=1
        ),
        Site("final_proj", "linear", Role.HEAD, weights=128, others=8, channels=8, shifts=1),
    ]
    rules = [Rule("*.fc2", granularity="per_channel", weight_bits=3)]
    plan = resolve_plan(Precision("bitla_w1a2", rules), sites, other_parameters=100)
    assert [entry.bytes for entry in plan.entries] == [
        512 / 8 + 32 * 2 + 4 + (4 + 4),  # weight, bias, its scale, the input's scale and shift
        512 * 3 / 8 + 16 * 2 + 16 * 2 + (4 + 4),  # a scale of 16 bits per output channel
        4 + 16 * 2,  # one scale, a shift of 16 bits per channel
        4 + 4,
        (128 + 8) * 2,
    ]
    assert plan.bytes == 200 + sum(entry.bytes for entry in plan.entries)
    assert plan.parameters == 100 + 544 + 528 + 136


CONV = Site(
    "feature_extractor.conv_layers.1.0",
    "conv",
    Role.FRONT_END,
    weights=240,
    others=0,
    channels=8,
    shifts=1,
)
BIAS = 32 * 2
LEARNED_INPUT = 4 + 4  # scale and shift of the input


@pytest.mark.parametrize(
    "name, rule, expected",
    [
        # One gain of 16 bits per channel; the input's scale is computed from the input.
        ("sqwq_w2", {}, 512 / 4 + BIAS + 32 * 2),
        ("sqwq_w1", {}, 512 / 8 + BIAS + 32 * 2),
        # The plain names have a scale per channel, min-max a zero point of a byte with it.
        ("absmax_w4a8", {}, 512 / 2 + BIAS + 32 * 2),
        ("minmax_w4a8", {}, 512 / 2 + BIAS + 32 * (2 + 1)),
        ("absmax_w16a8", {}, 512 * 2 + BIAS),
        ("absmax_w4a8", {"granularity": "per_tensor"}, 512 / 2 + BIAS + 4),
        ("minmax_w4a8", {"granularity": "per_tensor"}, 512 / 2 + BIAS + 4 + 1),
        ("minmax_w4a8", {"granularity": "per_group", "group_size": 4}, 512 / 2 + BIAS + 128 * 3),
        ("bitl_w2a2", {"method": "stretched"}, 512 / 4 + BIAS + 4 + LEARNED_INPUT),
        (
            "bitl_w2a2",
            {"method": "stretched", "granularity": "per_channel"},
            512 / 4 + BIAS + 32 * 2 + LEARNED_INPUT,
        ),
        (
            "bitl_w2a2",
            {"granularity": "per_group", "group_size": 8},
            512 / 4 + BIAS + 64 * 2 + LEARNED_INPUT,
        ),
        (
            "bitl_w2a2",
            {"granularity": "per_group", "group_size": 16},
            512 / 4 + BIAS + 32 * 2 + LEARNED_INPUT,
        ),
        ("bitl_w2a2", {"method": "absmax"}, 512 / 4 + BIAS + 4),
    ],
)
def test_bytes_of_every_method_and_granularity(name: str, rule: dict, expected: float) -> None:
    rules = [Rule("*.fc1", **rule)] if rule else []
    (entry,) = resolve_plan(Precision(name, rules), [FC1], 0).entries
    assert entry.bytes == expected


@pytest.mark.parametrize(
    "method, weights, operand",
    [
        ("elastic", 4 + LEARNED_INPUT, 4 + 16 * 2),
        ("stretched", 4 + LEARNED_INPUT, 4 + 16 * 2),
        ("squashed", 8 * 2, 4 + 16 * 2),
        ("absmax", 4, 0),
        ("minmax", 4 + 1, 0),
    ],
)
def test_bytes_of_convolutions_and_operands(method: str, weights: float, operand: float) -> None:
    rules = [Rule("*", method, 8, 8), Rule("*.query", method, activation_bits=8)]
    conv, query = resolve_plan(Precision("float", rules), [CONV, OPERAND], 0).entries
    assert conv.bytes == 240 + weights
    assert query.bytes == operand


def test_plan_and_precision_survive_json() -> None:
    rules = [
        Rule("*", granularity="per_channel"),
        Rule("*.fc1", weight_bits=4),
        Rule("final_proj", method="none"),
        Rule("*.fc2", "stretched", granularity="per_group", group_size=64),
    ]
    precision = Precision("bitla_w1a1", rules, length_scaled=False, reference_frames=250)
    again = Precision.from_mapping(json.loads(json.dumps(precision.to_mapping())))
    assert again == precision
    with torch.device("meta"):
        plan = Hubert(Architecture(encoder_layers=1), precision=again).plan
    stored = json.loads(json.dumps(plan.to_mapping()))
    assert Precision.from_mapping(stored["precision"]) == precision
    assert stored["bytes"] == plan.bytes
    assert [entry["module"] for entry in stored["entries"]] == [e.module for e in plan.entries]


def test_what_was_stored_before_there_was_a_key_keeps_its_meaning() -> None:
    stored = Precision.from_mapping({"name": "bitl_w1a1", "rules": None})
    assert stored == Precision("bitl_w1a1", rules_decide="modules", form="paper")
    assert Precision.from_mapping(Precision("bitl_w1a1").to_mapping()) == Precision("bitl_w1a1")


def test_reference_length_must_be_positive() -> None:
    with pytest.raises(LowbitError, match="reference_frames is 0"):
        resolve_plan(Precision("float", reference_frames=0), [], 0)


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_the_spread_of_squashed_weights_must_be_positive(std: float) -> None:
    with pytest.raises(LowbitError, match=f"squash_std is {std}"):
        resolve_plan(Precision("sqwq_w8", squash_std=std), [], 0)


def test_a_rule_for_a_layer_does_not_quantize_the_attention_of_bitl() -> None:
    plan = base_plan("bitl_w1a1", [Rule("encoder.layers.0.*", weight_bits=8, activation_bits=8)])
    bits = {e.module: e.activation_bits for e in plan.entries}
    assert bits["encoder.layers.0.fc1"] == 8
    assert bits["encoder.layers.0.self_attn.query"] == 16
    attention = base_plan("bitla_w1a1", plan.precision.rules)
    bits = {e.module: e.activation_bits for e in attention.entries}
    assert bits["encoder.layers.0.self_attn.query"] == 8


@pytest.mark.parametrize("match", ["*.self_attn.value", "*.val*", "*value", "*.self_attn.[v]alue"])
def test_a_rule_that_names_an_operand_quantizes_it(match: str) -> None:
    plan = base_plan("bitl_w1a1", [Rule(match, activation_bits=4)])
    bits = {e.module: e.activation_bits for e in plan.entries}
    assert bits["encoder.layers.3.self_attn.value"] == 4
    assert bits["encoder.layers.3.self_attn.key"] == 16


def test_weight_bits_for_operands_only_are_refused() -> None:
    with pytest.raises(LowbitError, match="operands only.*give activation_bits"):
        base_plan("bitla_w1a1", [Rule("*.query", weight_bits=4)])


def test_what_the_names_leave_float_is_most_of_a_one_bit_model() -> None:
    outside = ("feature_extractor.*", "post_extract_proj", "encoder.pos_conv.0")
    rules = [Rule(match, weight_bits=8, activation_bits=8) for match in outside]
    one_bit, smaller = base_plan("bitla_w1a1"), base_plan("bitla_w1a1", rules)
    bytes_of = {e.module: e.bytes for e in smaller.entries}
    assert bytes_of["encoder.pos_conv.0"] == pytest.approx(768 * 48 * 128 + (768 + 128) * 2 + 12)
    # 58 % of the bytes, nearly all of them in these modules, halved.
    assert smaller.bytes / one_bit.bytes == pytest.approx(0.72, abs=0.01)


def error(values: Tensor, levels: LevelSet) -> float:
    """Of the best fit."""
    quantizer = ElasticQuantizer(levels, 1, shift_shape=())
    quantizer.start_calibration(Calibrator())
    return float((quantizer(values).detach() - values).square().mean())


def activations(kind: InputKind, mean: float = 0.0) -> Tensor:
    normal = mean + torch.randn(4_096, generator=torch.Generator().manual_seed(0))
    return getattr(torch.nn.functional, kind)(normal)


@pytest.mark.parametrize("kind", [InputKind.GELU, InputKind.SILU, InputKind.RELU])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_papers_set_behind_an_activation_function_is_the_better_one(
    kind: InputKind, bits: int
) -> None:
    chosen = input_levels(kind, bits, "paper")
    other = signed(bits) if chosen == non_negative(bits) else non_negative(bits)
    assert error(activations(kind), chosen) < error(activations(kind), other)


@pytest.mark.parametrize("mean", [0.0, -1.0])
@pytest.mark.parametrize("kind", [InputKind.GELU, InputKind.SILU])
@pytest.mark.parametrize("bits", range(3, 9))
def test_from_three_bits_on_levels_from_the_lowest_value_are_the_best(
    kind: InputKind, bits: int, mean: float
) -> None:
    chosen = error(activations(kind, mean), input_levels(kind, bits, "asymmetric"))
    for other in (signed(bits), non_negative(bits)):
        assert chosen < 0.8 * error(activations(kind, mean), other)


@pytest.mark.parametrize("kind", [InputKind.GELU, InputKind.SILU])
def test_an_origin_is_the_lowest_value_and_exact_in_every_dtype(kind: InputKind) -> None:
    lowest = getattr(torch.nn.functional, kind)(torch.linspace(-3, 0, 10_001)).min()
    assert kind.origin == pytest.approx(lowest.item(), rel=4e-3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.tensor(kind.origin, dtype=dtype).item() == kind.origin


def test_forms_differ_behind_activation_functions_and_nowhere_else() -> None:
    rules = [Rule("feature_extractor.*", "elastic", 4, 6)]
    paper, own = (
        {e.module: e.input for e in base_plan("bitla_w4a4", rules, form=form).entries}
        for form in ("paper", "asymmetric")
    )
    differing = {module for module in own if own[module] != paper[module]}
    assert differing == {
        *(f"encoder.layers.{n}.fc2" for n in range(12)),
        *(f"feature_extractor.conv_layers.{n}.0" for n in range(1, 13)),
    }
    for module in differing:
        assert own[module].levels == non_negative(own[module].bits, InputKind.GELU.origin)


@pytest.mark.parametrize("kind", [InputKind.GELU, InputKind.SILU])
def test_with_one_bit_both_forms_have_levels_at_zero_and_one(kind: InputKind) -> None:
    assert input_levels(kind, 1, "asymmetric") == input_levels(kind, 1, "paper") == non_negative(1)


def test_only_learned_scales_have_a_form() -> None:
    for name in ("bitl_w2a2", "bitla_w1a1"):
        assert base_plan(name, form="paper").form == "paper"
    for name in ("float", "sqwq_w2", "minmax_w4a4", "bitl_w2a16"):
        assert base_plan(name).form is None
