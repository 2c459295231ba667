import doctest

import pytest

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision import Preset, grammar, parse_precision

BITS = range(1, 9)


def test_examples_in_the_docstrings_run() -> None:
    results = doctest.testmod(grammar)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("weight", BITS)
@pytest.mark.parametrize("activation", BITS)
def test_every_name_of_the_grammar(weight: int, activation: int) -> None:
    name = f"bitl_w{weight}a{activation}"
    assert parse_precision(name) == Preset(name, "elastic", weight, activation, 16)
    name = f"bitla_w{weight}a{activation}"
    assert parse_precision(name) == Preset(name, "elastic", weight, activation, activation)


def test_float_leaves_everything_at_16_bits() -> None:
    assert parse_precision("float") == Preset("float", "elastic", 16, 16, 16)


def test_sixteen_leaves_one_side_float() -> None:
    assert parse_precision("bitl_w2a16") == Preset("bitl_w2a16", "elastic", 2, 16, 16)
    assert parse_precision("bitla_w16a4") == Preset("bitla_w16a4", "elastic", 16, 4, 4)


@pytest.mark.parametrize("bits", ["0", "3.5", "9", "12", "32"])
@pytest.mark.parametrize(
    "name", ["bitl_w{}a2", "bitl_w2a{}", "bitla_w{}a2", "sqwq_w{}", "absmax_w8a{}"]
)
def test_bits_that_do_not_exist_are_named(name: str, bits: str) -> None:
    name = name.format(bits)
    with pytest.raises(LowbitError) as error:
        parse_precision(name)
    assert name in str(error.value)
    assert f"{bits} bits" in str(error.value)
    assert "1 to 8" in str(error.value)


def test_activation_bits_of_a_weight_only_method_are_refused() -> None:
    with pytest.raises(LowbitError, match=r"'sqwq_w4a4'.*weight-only.*write sqwq_w4$"):
        parse_precision("sqwq_w4a4")


@pytest.mark.parametrize("weight", BITS)
def test_squashed_weights_come_with_8_bit_inputs(weight: int) -> None:
    name = f"sqwq_w{weight}"
    assert parse_precision(name) == Preset(name, "squashed", weight, 8, 16)


def test_squashed_weights_cannot_be_float() -> None:
    with pytest.raises(LowbitError, match="'sqwq_w16': sqwq has 1 to 8 weight bits"):
        parse_precision("sqwq_w16")


@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_plain_quantizers_of_the_linears(method: str) -> None:
    name = f"{method}_w4a8"
    assert parse_precision(name) == Preset(name, method, 4, 8, 16)


def test_missing_activation_bits_are_asked_for() -> None:
    with pytest.raises(LowbitError, match="bitl_w2aM"):
        parse_precision("bitl_w2")


@pytest.mark.parametrize(
    "name",
    ["", "w1a1", "bitl", "bitl_a1", "bitl_w1a1x", "BITL_w1a1", "bitl-w1a1", "bit_w1a1", "bitl_wa",
     " bitl_w1a1", "bitl_w1a1\n", "bitl_w-1a1", "floats"],
)  # fmt: skip
def test_other_names_are_answered_with_the_grammar(name: str) -> None:
    with pytest.raises(LowbitError, match="bitl_wNaM") as error:
        parse_precision(name)
    assert repr(name) in str(error.value)
