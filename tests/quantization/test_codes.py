"""What codes tell of their levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lowbit.quantization import (
    Codes,
    ElasticQuantizer,
    LevelSet,
    UniformQuantizer,
    mid_rise,
    non_negative,
    signed,
)

LEVELS = [make(bits) for bits in (1, 2, 3, 8) for make in (signed, non_negative, mid_rise)]


def describe(levels: LevelSet) -> str:
    return f"{levels.name}-{levels.bits}"


def quantizer_of(levels: LevelSet, scale: float) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(levels, gradient_values=1)
    quantizer.set_scale(torch.tensor(scale))
    return quantizer


@pytest.mark.parametrize("levels", LEVELS, ids=describe)
def test_all_codes_of_a_set(levels: LevelSet) -> None:
    found = levels.encode(torch.linspace(-300, 300, 200_001)).unique()
    assert found.tolist() == list(levels.codes)
    assert len(levels.codes) == levels.size
    assert levels.all_values().tolist() == levels.value(found).tolist()


@pytest.mark.parametrize("levels", LEVELS, ids=describe)
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-30, 30, width=32), min_size=1), scale=st.floats(0.01, 100))
def test_level_counts_are_those_of_the_decoded_values(levels, values, scale) -> None:
    codes = quantizer_of(levels, scale).codes(torch.tensor(values))
    decoded = codes.decode().tolist()
    lowest, highest = (end.item() for end in codes.decoded_range)
    assert min(decoded) >= lowest
    assert max(decoded) <= highest
    step = (highest - lowest) / (levels.size - 1)
    counts = [0] * levels.size
    for value in decoded:
        counts[round((value - lowest) / step)] += 1
    assert codes.level_counts().tolist() == counts


def test_the_range_of_affine_codes_holds_zero_and_every_value() -> None:
    codes = UniformQuantizer("minmax", 4, frame_dim=-1).codes(torch.tensor([[-1.0, 2], [1, 3]]))
    lowest, highest = codes.decoded_range
    assert lowest.flatten().tolist() == pytest.approx([-1, 0])
    assert highest.flatten().tolist() == pytest.approx([2, 3])
    assert codes.level_counts().sum() == 4


def test_what_is_not_finite_is_counted_somewhere() -> None:
    # What nan becomes as an integer depends on the processor.
    integers = torch.tensor([-(2**15), 2**15 - 1, 0], dtype=torch.int16)
    for levels in LEVELS:
        codes = Codes(integers, torch.tensor(1.0), levels, integers.shape)
        assert codes.level_counts().sum() == 3
