"""Which utterances are calibrated on."""

import numpy as np
import pytest

from fairseq_lowbit.data.calibration_audio import CalibrationAudio
from fairseq_lowbit.errors import LowbitError

SIZES = np.random.default_rng(0).integers(10_000, 300_000, 203)


def test_utterances_of_a_batch_are_of_one_length_and_none_is_drawn_twice() -> None:
    drawn = CalibrationAudio(batches=1000).draw(SIZES)
    assert sorted(index for batch in drawn for index in batch) == list(range(len(SIZES)))
    assert {len(batch) for batch in drawn} == {3, 4}
    for batch in drawn:
        kept = np.minimum(SIZES[batch], 160_000)
        assert kept.max() - kept.min() < 10_000


def test_seed_and_amount() -> None:
    first = CalibrationAudio().draw(SIZES)
    assert [len(batch) for batch in first] == [4] * 8
    assert first == CalibrationAudio().draw(SIZES)
    assert first != CalibrationAudio(seed=2).draw(SIZES)
    # Short and long ones: a few batches stand for all lengths.
    lengths = [SIZES[batch].min() for batch in first]
    assert min(lengths) < 80_000 < 160_000 < max(lengths)


def test_equal_lengths_are_not_neighbours_in_the_manifest() -> None:
    drawn = CalibrationAudio().draw(np.full(1000, 200_000))
    assert min(max(batch) - min(batch) for batch in drawn) > 100


def test_few_utterances() -> None:
    assert sorted(len(batch) for batch in CalibrationAudio().draw(SIZES[:5])) == [2, 3]
    assert CalibrationAudio().draw(SIZES[:1]) == [[0]]
    assert CalibrationAudio().draw(SIZES[:0]) == []


@pytest.mark.parametrize(
    "values, message",
    [
        ({"batches": 0}, "calibration.batches 0: give a number from 1 up"),
        ({"batch_size": -1}, "calibration.batch_size -1"),
        ({"max_seconds": 0.0}, "calibration.max_seconds 0.0: give a number above 0"),
        ({"max_seconds": float("inf")}, "calibration.max_seconds inf"),
        ({"max_seconds": float("nan")}, "calibration.max_seconds nan"),
        ({"seed": -1}, "calibration.seed -1"),
    ],
)
def test_values_that_make_no_sense(values: dict, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        CalibrationAudio(**values)
