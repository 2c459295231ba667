"""Bootstrap intervals: what they contain, and when two models differ."""

import numpy as np
import pytest

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.intervals import difference_interval, rate_interval


def test_rate_is_of_all_units_together():
    interval = rate_interval([1, 0, 3], [2, 10, 4])
    assert interval.value == 4 / 16
    assert 0 <= interval.low <= interval.value <= interval.high <= 3 / 4


def test_interval_holds_the_true_rate_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        interval = rate_interval(rng.binomial(10, 0.3, 60), [10] * 60)
        held += interval.low <= 0.3 <= interval.high
    assert 180 <= held <= 199


def test_speakers_that_differ_widen_the_interval():
    errors, speakers = [0] * 20 + [5] * 20 + [1] * 20, ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    alone = rate_interval(errors, [10] * 60)
    grouped = rate_interval(errors, [10] * 60, speakers)
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_a_paired_difference_sees_what_overlapping_intervals_hide():
    rng = np.random.default_rng(2)
    hard = rng.integers(0, 9, 40)
    first, second = rate_interval(hard + 1, [10] * 40), rate_interval(hard, [10] * 40)
    assert second.high > first.low
    difference = difference_interval(hard + 1, hard, [10] * 40)
    assert difference.value == pytest.approx(0.1)
    assert difference.excludes_zero


def test_equal_models_do_not_differ():
    assert not difference_interval([1, 2, 0], [1, 2, 0], [5, 5, 5]).excludes_zero


def test_other_utterances_or_none_are_refused():
    with pytest.raises(LowbitError, match="3 and 2 utterances"):
        difference_interval([1, 2, 3], [1, 2], [4, 4, 4])
    with pytest.raises(LowbitError, match="same utterances"):
        rate_interval([1, 2], [1, 2], ["a"])
    with pytest.raises(LowbitError, match="nothing to count"):
        rate_interval([], [])
