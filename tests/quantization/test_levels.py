import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    LevelSet,
    elastic,
    levels,
    mid_rise,
    non_negative,
    signed,
    squashed,
    uniform,
)
from fairseq_lowbit.quantization.calibration import fit_scale

ALL_SETS = [make(n) for make in (signed, non_negative, mid_rise) for n in range(1, 9)]
SETS = pytest.mark.parametrize("level_set", ALL_SETS, ids=lambda s: f"{s.name}_{s.bits}")
# Timing and chance stay out: no deadline, the same examples every time.
STEADY = settings(deadline=None, derandomize=True, database=None)
# Finely around zero too, where the mid-rise set has all its levels.
EVERYWHERE = torch.cat([torch.linspace(-300, 300, 9601), torch.linspace(-1.5, 1.5, 2001)])
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("module", [levels, elastic, squashed, uniform], ids=lambda m: m.__name__)
def test_examples_in_the_docstrings_run(module) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    "level_set, lo, hi, divisor",
    [
        (signed(1), -1, 1, 1),
        (signed(2), -2, 1, 1),
        (signed(4), -8, 7, 7),
        (signed(8), -128, 127, 127),
        (non_negative(1), 0, 1, 1),
        (non_negative(2), 0, 3, 3),
        (non_negative(8), 0, 255, 255),
        (mid_rise(1), 0, 1, 1),
        (mid_rise(2), 0, 3, 2),
        (mid_rise(8), 0, 255, 128),
    ],
)
def test_range_and_gradient_divisor(level_set: LevelSet, lo: int, hi: int, divisor: int) -> None:
    assert (level_set.lo, level_set.hi, level_set.gradient_divisor) == (lo, hi, divisor)


@SETS
def test_reaches_each_of_its_levels_and_no_other(level_set: LevelSet) -> None:
    codes = level_set.encode(EVERYWHERE).unique()
    assert len(codes) == level_set.size == 2**level_set.bits
    assert codes.min() == level_set.lo
    assert codes.max() == level_set.hi


def test_ties_round_to_even() -> None:
    u = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert signed(4).encode(u).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    assert non_negative(3).encode(u).tolist() == [0, 0, 0, 0, 2, 2, 4]


def test_one_bit_sets_have_their_own_thresholds() -> None:
    below = torch.nextafter(torch.tensor(0.0), torch.tensor(-1.0))
    assert signed(1).encode(
        torch.stack([torch.tensor(0.0), -torch.tensor(0.0), below])
    ).tolist() == [
        1,
        1,
        -1,
    ]
    below_half = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    assert non_negative(1).encode(torch.stack([torch.tensor(0.5), below_half])).tolist() == [1, 0]


@SETS
@STEADY
@given(values=st.lists(FINITE, min_size=1, max_size=20))
def test_codes_are_integers_in_range_and_in_order(level_set: LevelSet, values: list) -> None:
    u = torch.tensor(sorted(values))
    before = u.clone()
    codes = level_set.encode(u)
    assert torch.equal(u, before)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= level_set.lo
    assert codes.max() <= level_set.hi
    assert (codes.diff() >= 0).all()


@SETS
def test_a_level_has_the_code_it_came_from(level_set: LevelSet) -> None:
    codes = level_set.encode(EVERYWHERE)
    assert torch.equal(level_set.encode(level_set.value(codes)), codes)


@SETS
def test_levels_are_a_step_apart(level_set: LevelSet) -> None:
    codes = level_set.encode(EVERYWHERE).unique()
    assert level_set.value(codes).diff().unique().tolist() == [level_set.spacing]


@pytest.mark.parametrize("bits", range(1, 9))
def test_mid_rise_levels_fill_the_range_evenly_without_zero(bits: int) -> None:
    level_set = mid_rise(bits)
    u = torch.linspace(-1, 1, 2049)
    values = level_set.value(level_set.encode(u))
    assert torch.equal(values.unique(), -values.unique().flip(0))
    # No value of the range is further than half a step from its level.
    assert (values - u).abs().max() <= level_set.spacing / 2
    assert level_set.encode(torch.zeros(1)).item() == 2 ** (bits - 1)


@pytest.mark.parametrize("make", [signed, non_negative, mid_rise])
@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_sets_are_refused(make, bits: int) -> None:
    with pytest.raises(LowbitError, match=str(bits)):
        make(bits)


def test_more_levels_than_the_bits_can_tell_apart_are_refused() -> None:
    with pytest.raises(LowbitError, match="3 levels in 1 bits"):
        LevelSet("ternary", bits=1, lo=-1, hi=1)


def test_a_set_of_three_levels_needs_nothing_of_its_own() -> None:
    """Calibration, training and health read what a set is made of, so a new one fits."""
    ternary = LevelSet("ternary", bits=2, lo=-1, hi=1)
    quantizer = ElasticQuantizer(ternary, gradient_values=1)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer.set_scale(fit_scale(x.detach()[None], ternary)[0][0])
    decoded = quantizer(x)
    scale = quantizer.scale.item()
    assert decoded.unique().tolist() == [-scale, 0, scale]
    decoded.sum().backward()
    inside = x.detach().abs() <= scale
    assert torch.equal(x.grad, inside.float())
    codes = quantizer.codes(x)
    assert torch.equal(codes.decode(), decoded)
    assert codes.level_counts().tolist() == [int((decoded == v).sum()) for v in decoded.unique()]
    # Two levels lose more, four about as much less.
    assert error(x, signed(1)) > (decoded - x).square().mean() > error(x, mid_rise(2))


def error(x: Tensor, levels: LevelSet) -> Tensor:
    scale, _ = fit_scale(x.detach()[None], levels)
    return (levels.value(levels.encode(x.detach() / scale)) * scale - x).square().mean()
