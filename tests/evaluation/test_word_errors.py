import math
import sys

import numpy as np
import pytest

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.word_errors import (
    UtteranceErrors,
    character_error_rate,
    count_errors,
    matched_pairs,
    word_error_difference,
    word_error_rate,
)


@pytest.fixture(autouse=True)
def _jiwer():
    pytest.importorskip("jiwer")


def errors(wrong: str, inserted: dict[int, int] | None = None) -> UtteranceErrors:
    """``wrong`` has x for each word that is missing, . for one that is right."""
    added = [(inserted or {}).get(place, 0) for place in range(len(wrong) + 1)]
    missing = tuple(char == "x" for char in wrong)
    return UtteranceErrors(sum(missing), missing, tuple(added), 0, 1)


def test_counts_of_each_kind():
    first, second, third, silent = count_errors(
        ["the cat sat down", "in  the beginning", "let there be light", ""],
        ["a cat sat right down", "in beginning", "let there be light", "oh no"],
    )
    counts = [(e.substitutions, e.deletions, e.insertions) for e in (first, second, third, silent)]
    assert counts == [(1, 0, 1), (0, 1, 0), (0, 0, 0), (0, 0, 2)]
    assert first.wrong == (True, False, False, False)
    assert first.inserted == (0, 0, 0, 1, 0)
    assert second.wrong == (False, True, False)
    assert (second.character_errors, second.characters) == (4, 16)
    assert (silent.words, silent.inserted) == (0, (2,))


def test_rates_are_of_all_words_together():
    measured = count_errors(["a b c d e f", "g h"], ["a b c d e f", "x y z"])
    assert word_error_rate(measured, None).value == 3 / 8
    assert character_error_rate(measured, None).value == 4 / 14
    assert word_error_rate(count_errors(["a"], ["b c d"]), None).value == 3  # above 1


def test_speakers_are_drawn_as_a_whole():
    # One speaker is understood, the other not: by utterances that would look certain.
    measured = count_errors(["a b"] * 40, ["a b"] * 20 + ["x y"] * 20)
    by_utterance = word_error_rate(measured, None)
    by_speaker = word_error_rate(measured, ["one"] * 20 + ["two"] * 20)
    assert by_utterance.value == by_speaker.value == 0.5
    assert by_utterance.high - by_utterance.low < 0.5
    assert (by_speaker.low, by_speaker.high) == (0, 1)


def test_a_paired_difference_is_surer_than_two_rates():
    said = ["a b c d e f g h"] * 60
    hard = ["x x x x e f g h" if i % 2 else text for i, text in enumerate(said)]
    harder = [text[:-1] + "x" for text in hard]
    first, second = count_errors(said, harder), count_errors(said, hard)
    difference = word_error_difference(first, second, None)
    assert (difference.low, difference.value, difference.high) == (1 / 8, 1 / 8, 1 / 8)
    assert word_error_rate(first, None).low < word_error_rate(second, None).high


@pytest.mark.parametrize(
    ("first", "second", "segments", "mean"),
    [
        (errors("...."), errors("...."), 0, 0),
        # Two right words part the errors, one does not.
        (errors("x..x"), errors("...."), 2, 1),
        (errors("x.x."), errors("...."), 1, 2),
        # They have to be right in both systems.
        (errors("x..x"), errors(".x.."), 1, 1),
        # A word inserted between two right ones is an error of the segment it stands in.
        (errors("x..x"), errors("....", {2: 1}), 1, 1),
        (errors("x...x"), errors(".....", {3: 1}), 2, 0.5),
        # At the ends of an utterance.
        (errors("....", {0: 1}), errors("....", {4: 2}), 2, -0.5),
        (errors("", {0: 2}), errors("", {0: 1}), 1, 1),
    ],
)
def test_segments(first, second, segments, mean):
    found = matched_pairs([first], [second])
    assert (found.segments, found.mean) == (segments, mean)


def test_utterances_end_segments():
    assert matched_pairs([errors("x")] * 3, [errors(".")] * 3).segments == 3


def test_a_case_worked_by_hand():
    # Differences of the segments: 2, 1, 0, 1. Mean 1, variance 2/3, W = 1 / sqrt(2/3/4) = sqrt(6).
    first = [errors("xx..x"), errors("x..x")]
    second = [errors("....."), errors("x...")]
    found = matched_pairs(first, second)
    assert (found.segments, found.mean) == (4, 1)
    assert found.p == pytest.approx(math.erfc(math.sqrt(6) / math.sqrt(2)))
    assert found.p == pytest.approx(0.01431, abs=1e-5)
    assert matched_pairs(second, first).p == found.p


def test_equal_systems_do_not_differ():
    same = [errors("x..x.", {2: 1}), errors("...")]
    assert matched_pairs(same, same).p == 1
    assert matched_pairs([], []).p == 1
    assert matched_pairs([errors("x")], [errors(".")]).p == 1  # one segment shows nothing


def test_systems_alike_are_rarely_told_apart():
    rng = np.random.default_rng(0)

    def system():
        return [errors("".join(rng.choice(["x", "."], 8, p=[0.2, 0.8]))) for _ in range(60)]

    values = np.array([matched_pairs(system(), system()).p for _ in range(400)])
    # 5 % expected, with a standard error of 1.1 %.
    assert 0.02 < (values < 0.05).mean() < 0.085
    assert 0.4 < values.mean() < 0.6


def test_other_utterances_are_refused():
    with pytest.raises(LowbitError, match="1 transcripts for 2 utterances"):
        count_errors(["a", "b"], ["a"])
    with pytest.raises(LowbitError, match="same utterances"):
        matched_pairs([errors("..")], [errors("...")])


def test_without_jiwer_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(LowbitError, match=r"pip install fairseq-lowbit\[asr\]"):
        count_errors(["a"], ["a"])
