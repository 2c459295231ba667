from dataclasses import replace

import pytest

from fairseq_lowbit import __version__
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision import InputKind, PlanEntry, Precision, Role, Rule, Site, resolve_plan

LAYER = "encoder.layers.0"
SITES = [
    Site(
        "feature_extractor.conv_layers.0.0",
        "conv",
        Role.FRONT_END,
        weights=80,
        others=0,
        channels=8,
        shifts=1,
    ),
    Site(
        "post_extract_proj",
        "linear",
        Role.PROJECTION,
        weights=128,
        others=16,
        channels=16,
        shifts=1,
    ),
    Site(
        "encoder.pos_conv.0",
        "conv",
        Role.POSITIONAL_CONVOLUTION,
        weights=512,
        others=24,
        channels=16,
        shifts=1,
    ),
    Site(f"{LAYER}.self_attn.query", "operand", Role.ATTENTION_OPERAND, shifts=16),
    Site(f"{LAYER}.self_attn.probabilities", "operand", Role.ATTENTION_OPERAND, shifts=1),
    Site(
        f"{LAYER}.self_attn.q_proj",
        "linear",
        Role.ENCODER_LINEAR,
        weights=256,
        others=16,
        channels=16,
        shifts=1,
    ),
    Site(
        f"{LAYER}.fc1", "linear", Role.ENCODER_LINEAR, weights=512, others=32, channels=32, shifts=1
    ),
    Site(
        "encoder.layers.1.fc1",
        "linear",
        Role.ENCODER_LINEAR,
        weights=512,
        others=32,
        channels=32,
        shifts=1,
    ),
    Site("final_proj", "linear", Role.HEAD, weights=128, others=8, channels=8, shifts=1),
]


def plan(name: str, *rules: Rule) -> dict[str, PlanEntry]:
    entries = resolve_plan(Precision(name, list(rules)), SITES, 0).entries
    return {entry.module: entry for entry in entries}


def bits(entry: PlanEntry) -> tuple[int, int]:
    return entry.weight_bits, entry.activation_bits


def test_names_cover_encoder_linears_and_with_la_the_operands() -> None:
    for name, attention in (("bitl_w1a2", 16), ("bitla_w1a2", 2)):
        entries = plan(name)
        quantized = {module for module, entry in entries.items() if bits(entry) == (1, 2)}
        assert quantized == {f"{LAYER}.self_attn.q_proj", f"{LAYER}.fc1", "encoder.layers.1.fc1"}
        assert bits(entries[f"{LAYER}.self_attn.query"]) == (16, attention)
        assert bits(entries[f"{LAYER}.self_attn.probabilities"]) == (16, attention)
        for module in ("post_extract_proj", "encoder.pos_conv.0", "final_proj"):
            assert bits(entries[module]) == (16, 16)
            assert not entries[module].is_quantized


OVERLAPPING = (
    Rule(f"{LAYER}.*", weight_bits=8, granularity="per_channel"),
    Rule("*.fc1", activation_bits=4),
)


def test_the_last_rule_that_sets_a_field_decides_it() -> None:
    entries = plan("bitl_w2a2", *OVERLAPPING, Rule("*.fc1", granularity="per_tensor"))
    assert bits(entries[f"{LAYER}.self_attn.q_proj"]) == (8, 2)
    assert bits(entries[f"{LAYER}.fc1"]) == (8, 4)
    assert entries[f"{LAYER}.fc1"].granularity == "per_tensor"
    assert entries[f"{LAYER}.fc1"].rule == f"rules {LAYER}.*, *.fc1"
    assert bits(entries["encoder.layers.1.fc1"]) == (2, 4)
    assert entries["final_proj"].rule == "bitl_w2a2"


def test_files_of_rules_can_be_combined() -> None:
    """One makes every scale per channel, another gives bits: neither undoes the other."""
    entries = plan(
        "bitl_w2a2",
        Rule("post_extract_proj", method="minmax", weight_bits=8, activation_bits=8),
        Rule("*", granularity="per_channel"),
    )
    projection = entries["post_extract_proj"]
    assert (projection.method, bits(projection)) == ("minmax", (8, 8))
    assert projection.granularity == entries[f"{LAYER}.fc1"].granularity == "per_channel"


def test_a_group_size_goes_with_its_granularity() -> None:
    group = Rule("*.fc1", granularity="per_group", group_size=8)
    entry = plan("bitl_w2a2", group, Rule(f"{LAYER}.*", granularity="per_channel"))[f"{LAYER}.fc1"]
    assert (entry.granularity, entry.group_size) == ("per_channel", None)


def test_an_empty_rule_takes_modules_back_to_the_name() -> None:
    entries = plan("bitl_w2a2", *OVERLAPPING, Rule("encoder.layers.0.fc1"))
    assert entries[f"{LAYER}.fc1"] == plan("bitl_w2a2")[f"{LAYER}.fc1"]
    assert bits(entries["encoder.layers.1.fc1"]) == (2, 4)


def test_rules_that_contradict_each_other_are_refused() -> None:
    """Bits for what an earlier rule leaves float; a method as well would say what is meant."""
    left = Rule(f"{LAYER}.*", method="none")
    with pytest.raises(LowbitError, match=r"'encoder.layers.0.\*' and '\*.fc1' contradict.*float"):
        plan("bitl_w2a2", left, Rule("*.fc1", weight_bits=4))
    given = Rule("*.fc1", method="elastic", weight_bits=4, activation_bits=4)
    assert bits(plan("bitl_w2a2", left, given)[f"{LAYER}.fc1"]) == (4, 4)
    entries = plan("bitl_w2a2", left, Rule("*", granularity="per_channel"))
    assert not entries[f"{LAYER}.fc1"].is_quantized
    assert entries["encoder.layers.1.fc1"].granularity == "per_channel"


def test_before_version_0_2_the_last_rule_that_matches_decided_alone() -> None:
    entries = resolve_plan(
        Precision("bitl_w2a2", list(OVERLAPPING), rules_decide="modules"), SITES, 0
    ).entries
    first = next(entry for entry in entries if entry.module == f"{LAYER}.fc1")
    assert (bits(first), first.granularity) == ((2, 4), "per_tensor")


def test_a_name_that_reaches_nothing_is_refused() -> None:
    front_end = [site for site in SITES if site.role == Role.FRONT_END]
    with pytest.raises(
        LowbitError, match="'bitl_w1a1' reaches no encoder linear: .* It has feature_extractor"
    ):
        resolve_plan(Precision("bitl_w1a1"), front_end, 0)
    rule = Rule("*", method="minmax", weight_bits=8, activation_bits=8)
    assert resolve_plan(Precision("float", [rule]), front_end, 0).entries[0].is_quantized


TIED = [
    Site("embed", "embedding", Role.EMBEDDING, weights=64, channels=8),
    Site("head", "linear", Role.HEAD, tied_to="embed", weights=64, channels=8, shifts=1),
]


def test_a_tied_weight_is_stored_once_and_reached_by_both_of_its_names() -> None:
    rule = Rule("*", method="elastic", weight_bits=4, activation_bits=8)
    embed, head = resolve_plan(Precision("float", [rule]), TIED, 0).entries
    assert (embed.weight_bits, embed.activation_bits, embed.input) == (4, 16, None)
    assert (embed.bytes, head.bytes) == (64 / 2 + 4, 4 + 4)
    assert (embed.parameters, head.parameters) == (64, 0)
    with pytest.raises(LowbitError, match="embed and head share one weight, .*16 bits"):
        resolve_plan(Precision("float", [replace(rule, match="head")]), TIED, 0)


@pytest.mark.parametrize("bits_, std", [(1, 0.84), (2, 0.84), (4, 0.5), (8, 0.3)])
def test_the_spread_of_squashed_weights_follows_their_width(bits_: int, std: float) -> None:
    def spread(name: str, *rules: Rule, **settings: float) -> float:
        precision = Precision(name, list(rules), **settings)
        entries = {e.module: e for e in resolve_plan(precision, SITES, 0).entries}
        return entries[f"{LAYER}.fc1"].weight.squash_std

    assert spread(f"sqwq_w{bits_}") == std
    assert spread("sqwq_w2", Rule("*.fc1", weight_bits=bits_)) == std
    assert spread(f"sqwq_w{bits_}", squash_std=0.7) == 0.7
    assert spread(f"sqwq_w{bits_}", Rule("*.fc1", squash_std=0.6), squash_std=0.7) == 0.6


def test_order_of_rules_matters() -> None:
    rules = [Rule("*.fc1", weight_bits=8), Rule(f"{LAYER}.*", weight_bits=4)]
    assert plan("bitl_w2a2", *rules)[f"{LAYER}.fc1"].weight_bits == 4
    assert plan("bitl_w2a2", *rules[::-1])[f"{LAYER}.fc1"].weight_bits == 8


def test_method_none_leaves_modules_and_operands_float() -> None:
    entries = plan("bitla_w1a1", Rule(f"{LAYER}.*", method="none"))
    for module, entry in entries.items():
        assert entry.is_quantized == (module == "encoder.layers.1.fc1")


def test_rules_reach_operands_one_by_one() -> None:
    entries = plan("bitl_w1a1", Rule("*.query", activation_bits=3))
    assert bits(entries[f"{LAYER}.self_attn.query"]) == (16, 3)
    assert bits(entries[f"{LAYER}.self_attn.probabilities"]) == (16, 16)


@pytest.mark.parametrize(
    "module",
    [
        "feature_extractor.conv_layers.0.0",
        "post_extract_proj",
        "encoder.pos_conv.0",
        "final_proj",
    ],
)
def test_rules_reach_what_the_names_leave_float(module: str) -> None:
    rule = Rule(module, weight_bits=4, activation_bits=8, granularity="per_channel")
    entries = plan("float", rule)
    assert bits(entries[module]) == (4, 8)
    assert entries[module].granularity == "per_channel"
    assert [m for m, entry in entries.items() if entry.is_quantized] == [module]


def test_pattern_that_matches_nothing_is_an_error_that_lists_modules() -> None:
    with pytest.raises(LowbitError, match=r"'encoder.layer.0.\*' matches no module") as error:
        plan("bitl_w1a1", Rule("encoder.layer.0.*", weight_bits=4))
    assert "encoder.layers.*.fc1, final_proj" in str(error.value)


@pytest.mark.parametrize("given", [{"weight_bits": 4}, {"activation_bits": 4}, {}])
def test_module_that_the_name_leaves_float_needs_both_bits(given: dict[str, int]) -> None:
    with pytest.raises(LowbitError, match="final_proj.*give both"):
        plan("bitl_w1a1", Rule("final_proj", method="elastic", **given))


def test_granularity_alone_does_not_quantize() -> None:
    entries = plan("bitl_w1a1", Rule("*", granularity="per_channel"))
    assert entries[f"{LAYER}.fc1"].granularity == "per_channel"
    assert not entries["final_proj"].is_quantized
    assert entries["final_proj"].granularity == "-"


@pytest.mark.parametrize(
    "rule, message",
    [
        (Rule("*.fc1", method="none", weight_bits=2), "method none.*drop weight_bits"),
        (Rule("*.fc1", method="none", activation_bits=2), "method none.*drop activation_bits"),
        (
            Rule("*.fc1", method="elastc"),
            "method 'elastc'; allowed are elastic, stretched, squashed, absmax, minmax, none",
        ),
        (Rule("*.fc1", granularity="per_row"), "'per_row'; allowed are per_tensor, per_channel"),
        (Rule("*.fc1", weight_bits=9), "weight_bits: 9 bits"),
        (Rule("*.fc1", activation_bits=0), "activation_bits: 0 bits"),
        (Rule("*.fc1", weight_bits=3.5), "3.5 bits"),
        (Rule("", weight_bits=2), "match is empty"),
        (Rule("*.fc1", granularity="per_group"), "per_group and group_size belong together"),
        (Rule("*.fc1", group_size=4), "per_group and group_size belong together"),
        (
            Rule("*.fc1", granularity="per_channel", group_size=4),
            "per_group and group_size belong together",
        ),
        (Rule("*.fc1", granularity="per_group", group_size=0), "group_size 0; want at least 1"),
        (
            Rule("*.fc1", granularity="per_group", group_size=5),
            r"group_size 5 does not divide the 16 weights of an output channel of .*\.0\.fc1",
        ),
        (
            Rule("*.fc1", method="squashed", granularity="per_tensor"),
            r"squashed weight of .*fc1 has one gain per channel, so drop granularity per_tensor",
        ),
        (
            Rule("*.fc1", method="squashed", granularity="per_group", group_size=4),
            "drop granularity per_group",
        ),
        (Rule("final_proj", method="squashed"), "no weight_bits for final_proj"),
        (Rule("final_proj", method="absmax", weight_bits=8), "no activation_bits for final_proj"),
        (Rule("final_proj", method="absmax"), "no weight_bits for final_proj"),
        (Rule("*.fc1", squash_std=0), "squash_std is 0; want more than 0"),
        (
            Rule("*.fc1", squash_std=0.5),
            "squash_std has no effect on .*fc1, whose method is elastic",
        ),
        (Rule("*.query", method="absmax"), r"no activation_bits for encoder\.layers\.0\..*query"),
    ],
)
def test_contradictory_rules_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        plan("bitl_w1a1", rule)


def test_squashed_modules_have_8_bit_inputs_unless_a_rule_says_otherwise() -> None:
    entries = plan(
        "bitl_w2a2",
        Rule("*.fc1", method="squashed"),
        Rule("final_proj", method="squashed", weight_bits=4),
        Rule("post_extract_proj", method="squashed", weight_bits=4, activation_bits=16),
    )
    assert bits(entries[f"{LAYER}.fc1"]) == (2, 8)
    assert bits(entries["final_proj"]) == (4, 8)
    assert bits(entries["post_extract_proj"]) == (4, 16)
    for module in (f"{LAYER}.fc1", "final_proj"):
        assert (entries[module].method, entries[module].granularity) == ("squashed", "per_channel")


def test_a_rule_takes_the_method_of_the_name() -> None:
    """sqwq and a rule for the front-end: the bits of the inputs need not be repeated."""
    entries = plan("sqwq_w2", Rule("feature_extractor.*", weight_bits=8))
    conv = entries["feature_extractor.conv_layers.0.0"]
    assert (conv.method, bits(conv), conv.granularity) == ("squashed", (8, 8), "per_channel")
    entries = plan("absmax_w4a8", Rule("feature_extractor.*", weight_bits=8, activation_bits=8))
    conv = entries["feature_extractor.conv_layers.0.0"]
    assert (conv.method, bits(conv), conv.granularity) == ("absmax", (8, 8), "per_channel")


def test_a_method_for_the_encoder_keeps_bits_and_granularity_of_the_name() -> None:
    entries = plan("sqwq_w2", Rule("encoder.layers.*", method="stretched"))
    linear = entries[f"{LAYER}.fc1"]
    assert (linear.method, bits(linear), linear.granularity) == ("stretched", (2, 8), "per_tensor")
    assert not entries[f"{LAYER}.self_attn.query"].is_quantized
    linear = plan("minmax_w4a8", Rule("encoder.layers.*", method="elastic"))[f"{LAYER}.fc1"]
    assert (linear.method, bits(linear), linear.granularity) == ("elastic", (4, 8), "per_channel")


def test_operands_have_ranges_of_their_own_or_learned_scales() -> None:
    """Stretched and squashed are about weights, which operands lack."""
    for method, expected in (
        ("absmax", "absmax"),
        ("minmax", "minmax"),
        ("stretched", "elastic"),
        ("squashed", "elastic"),
    ):
        entries = plan("bitla_w2a4", Rule(f"{LAYER}.*", method=method))
        for operand in ("query", "probabilities"):
            entry = entries[f"{LAYER}.self_attn.{operand}"]
            assert (entry.method, bits(entry)) == (expected, (16, 4))
    absmax = plan("absmax_w4a8", Rule("*.query", activation_bits=8))
    assert absmax[f"{LAYER}.self_attn.query"].method == "absmax"
    assert not absmax[f"{LAYER}.self_attn.probabilities"].is_quantized


@pytest.mark.parametrize(
    "name, scales",
    [
        ("bitl_w2a2", {"granularity": "per_channel"}),
        ("sqwq_w2", {"granularity": "per_channel"}),
        ("bitl_w2a2", {"granularity": "per_group", "group_size": 16}),
        ("minmax_w2a2", {"granularity": "per_group", "group_size": 16}),
    ],
)
def test_a_granularity_for_everything_is_for_what_is_quantized(name: str, scales: dict) -> None:
    """It fits the encoder; that it fits no convolution of ten weights is no mistake."""
    entries = plan(name, Rule("*", **scales))
    assert entries[f"{LAYER}.fc1"].granularity == scales["granularity"]
    assert bits(entries[f"{LAYER}.fc1"]) == bits(plan(name)[f"{LAYER}.fc1"])
    for module in ("feature_extractor.conv_layers.0.0", "post_extract_proj", "final_proj"):
        assert not entries[module].is_quantized


@pytest.mark.parametrize(
    "stored, message",
    [
        ({"rules": [{"match": "*", "weight_bit": 1}]}, r"rule '\*': weight_bit 1 is nothing that"),
        ({"codebook": 16}, rf"precision: codebook 16 is nothing .* {__version__} knows \(form, "),
        ({"form": "trellis"}, rf"form 'trellis'; .* {__version__} knows paper, asymmetric.*newer"),
    ],
)
def test_what_only_a_newer_version_knows_is_refused(stored: dict, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Precision.from_mapping({"name": "float", **stored})


PER_FRAME = {"activation_granularity": "per_frame"}


def test_a_scale_per_frame_is_for_what_the_rule_reaches() -> None:
    entries = plan("bitl_w2a2", Rule(f"{LAYER}.*", **PER_FRAME), Rule("*_proj", **PER_FRAME))
    frames = {
        module for module, entry in entries.items() if entry.input and entry.input.is_per_frame
    }
    assert frames == {f"{LAYER}.self_attn.q_proj", f"{LAYER}.fc1"}
    assert entries[f"{LAYER}.fc1"].bytes == plan("bitl_w2a2")[f"{LAYER}.fc1"].bytes
    again = Rule("*.fc1", activation_granularity="per_tensor")
    entries = plan("bitl_w2a2", Rule(f"{LAYER}.*", **PER_FRAME), again)
    assert not entries[f"{LAYER}.fc1"].input.is_per_frame


@pytest.mark.parametrize(
    "name, rule, obstacle",
    [
        ("bitla_w2a2", Rule("*.query", **PER_FRAME), "an operand of attention"),
        ("bitla_w2a2", Rule("*.probabilities", **PER_FRAME), "an operand of attention"),
        ("bitl_w2a2", Rule("encoder.pos_conv.0", None, 4, 4, **PER_FRAME), "no linear but a conv"),
        ("absmax_w2a2", Rule("*.fc1", **PER_FRAME), "absmax, whose inputs have a range of every"),
        ("sqwq_w2", Rule("*.fc1", **PER_FRAME), "squashed, whose inputs have a range of every"),
        ("bitl_w2a2", Rule("*.fc1", "minmax", **PER_FRAME), "minmax, whose inputs have a range"),
    ],
)
def test_a_scale_per_frame_where_it_is_no_factor_of_a_row_is_refused(
    name: str, rule: Rule, obstacle: str
) -> None:
    with pytest.raises(LowbitError, match=f"is {obstacle}.*config/rules/per_frame.yaml"):
        plan(name, rule)


@pytest.mark.parametrize("kind", [InputKind.GELU, InputKind.SILU, InputKind.RELU])
def test_a_scale_per_frame_behind_an_activation_function_is_refused(kind: InputKind) -> None:
    site = replace(SITES[-2], name="fc2", input_kind=kind)
    with pytest.raises(LowbitError, match=f"fc2 is a linear behind a {kind}"):
        resolve_plan(Precision("bitl_w2a2", [Rule("fc2", **PER_FRAME)]), [site], 0)


def test_a_scale_per_frame_of_a_float_input_is_refused() -> None:
    with pytest.raises(LowbitError, match="no effect on .*fc1, whose input is float"):
        plan("bitl_w2a16", Rule("*.fc1", **PER_FRAME))
    with pytest.raises(LowbitError, match="method none.*drop activation_granularity"):
        plan("bitl_w2a2", Rule("*.fc1", method="none", **PER_FRAME))
    with pytest.raises(LowbitError, match="'per_row'; allowed are per_tensor, per_frame"):
        plan("bitl_w2a2", Rule("*.fc1", activation_granularity="per_row"))


@pytest.mark.parametrize(
    "name, rules, message",
    [
        ("bitl_w2a2", [Rule("*.fc1")], r"'\*\.fc1' sets nothing: give method"),
        (
            "bitl_w2a2",
            [Rule("final_proj", granularity="per_channel")],
            "granularity per_channel has no effect on final_proj, whose weight is float",
        ),
        ("float", [Rule("encoder.layers.*", granularity="per_channel")], "has no effect"),
        (
            "bitl_w2a2",
            [Rule("post_extract_proj", granularity="per_group", group_size=8)],
            "granularity per_group has no effect",
        ),
        (
            "bitl_w2a2",
            [Rule("*.fc1", weight_bits=4), Rule("encoder.layers.*", weight_bits=8)],
            r"'\*\.fc1': later rules decide .* write the broader rule first",
        ),
    ],
)
def test_rules_without_effect_are_refused(name: str, rules: list[Rule], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        plan(name, *rules)


def test_a_rule_replaces_one_of_the_same_pattern() -> None:
    entries = plan("bitl_w2a2", Rule("*.fc1", weight_bits=4), Rule("*.fc1", weight_bits=8))
    assert {bits(e)[0] for name, e in entries.items() if name.endswith("fc1")} == {8}


def test_rules_that_repeat_what_the_name_says_are_fine() -> None:
    for name, rule in (
        ("absmax_w8a8", Rule("encoder.layers.*", granularity="per_channel")),
        ("sqwq_w2", Rule("encoder.layers.*", granularity="per_channel")),
        ("bitl_w2a2", Rule("*.fc1", weight_bits=2)),
        ("bitl_w2a2", Rule("final_proj", method="none")),
    ):
        entries = plan(name, rule)
        for module, entry in plan(name).items():
            assert bits(entries[module]) == bits(entry)
            assert entries[module].granularity == entry.granularity


def test_a_rule_without_settings_takes_modules_back_to_the_name() -> None:
    rules = (Rule("encoder.layers.*", weight_bits=8), Rule("encoder.layers.1.*"))
    entries = plan("bitl_w2a2", *rules)
    assert bits(entries[f"{LAYER}.fc1"]) == (8, 2)
    assert bits(entries["encoder.layers.1.fc1"]) == (2, 2)
