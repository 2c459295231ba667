"""Errors of transcripts: counts of each utterance, rates, and whether two systems differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.intervals import Interval, difference_interval, rate_interval

# Words that both systems get right in a row, between segments of the matched-pairs test.
_BUFFER = 2
_LEAST_P = 0.001
# Segments from which the normal approximation of that test is a good one.
_ENOUGH_SEGMENTS = 50


@dataclass(frozen=True)
class UtteranceErrors:
    """The errors of one transcript, by the alignment with the fewest word errors.

    Attributes:
        deletions: words that are missing.
        wrong: of each word that was said, whether it is missing or another one; [words].
        inserted: words that were not said, before each word and after the last; [words + 1].
        character_errors: by an alignment of their own; the spaces between words count.
        characters: what they are counted among.
    """

    deletions: int
    wrong: tuple[bool, ...]
    inserted: tuple[int, ...]
    character_errors: int
    characters: int

    @property
    def words(self) -> int:
        return len(self.wrong)

    @property
    def substitutions(self) -> int:
        return sum(self.wrong) - self.deletions

    @property
    def insertions(self) -> int:
        return sum(self.inserted)

    @property
    def word_errors(self) -> int:
        return sum(self.wrong) + self.insertions


@dataclass(frozen=True)
class MatchedPairs:
    """Whether two systems differ, by the matched-pairs sentence-segment word error test (MAPSSWE).

    Attributes:
        segments: stretches of speech in which a system errs.
        mean: errors that the first system makes more than the second, by segment.
        p: of a mean as far from zero in systems that do not differ, two-sided, by the normal
            approximation: some fifty segments make it a good one.
    """

    segments: int
    mean: float
    p: float

    @property
    def is_rough(self) -> bool:
        """Whether there are too few segments for the normal approximation."""
        return self.segments < _ENOUGH_SEGMENTS

    @property
    def p_text(self) -> str:
        """With two digits; the approximation says nothing about how small a tiny one is."""
        return f"{self.p:.2g}" if self.p >= _LEAST_P else f"<{_LEAST_P:g}"


def count_errors(references: Sequence[str], hypotheses: Sequence[str]) -> list[UtteranceErrors]:
    """The errors of every transcript.

    Args:
        references: what was said, words with spaces between; [utterances].
        hypotheses: what was recognized, in the same order.

    Raises:
        LowbitError: jiwer is not installed, or lists of different lengths.
    """
    try:
        import jiwer
    except ImportError as error:
        raise LowbitError(
            "word errors are counted by jiwer: pip install fairseq-lowbit[asr]"
        ) from error
    if len(references) != len(hypotheses):
        raise LowbitError(
            f"{len(hypotheses)} transcripts for {len(references)} utterances: each needs one"
        )
    said, heard = ([" ".join(text.split()) for text in texts] for texts in (references, hypotheses))
    words, characters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
    return [
        _errors_of(words.alignments[i], len(words.references[i]), characters.alignments[i], text)
        for i, text in enumerate(said)
    ]


def _errors_of(word_chunks: list, words: int, character_chunks: list, said: str) -> UtteranceErrors:
    wrong, inserted = [False] * words, [0] * (words + 1)
    for chunk in word_chunks:
        if chunk.type == "insert":
            inserted[chunk.ref_start_idx] += _length(chunk)
        elif chunk.type != "equal":
            for index in range(chunk.ref_start_idx, chunk.ref_end_idx):
                wrong[index] = True
    deletions = sum(_length(chunk) for chunk in word_chunks if chunk.type == "delete")
    character_errors = sum(_length(chunk) for chunk in character_chunks if chunk.type != "equal")
    return UtteranceErrors(deletions, tuple(wrong), tuple(inserted), character_errors, len(said))


def _length(chunk: object) -> int:
    """Words or characters of a part of an alignment: only one side of it may have any."""
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def word_error_rate(errors: Sequence[UtteranceErrors], speakers: Sequence[str] | None) -> Interval:
    """Word errors by words said, which may be above 1.

    Args:
        speakers: of each utterance, who are drawn as a whole; None draws utterances.

    Raises:
        LowbitError: no word was said.
    """
    counts, sizes = [e.word_errors for e in errors], [e.words for e in errors]
    return rate_interval(counts, sizes, speakers)


def character_error_rate(
    errors: Sequence[UtteranceErrors], speakers: Sequence[str] | None
) -> Interval:
    """Character errors by characters said; otherwise as :func:`word_error_rate`."""
    counts, sizes = [e.character_errors for e in errors], [e.characters for e in errors]
    return rate_interval(counts, sizes, speakers)


def word_error_difference(
    first: Sequence[UtteranceErrors],
    second: Sequence[UtteranceErrors],
    speakers: Sequence[str] | None,
) -> Interval:
    """The word error rate of ``first`` less that of ``second``, on the same utterances; otherwise
    as :func:`word_error_rate`."""
    counts = ([e.word_errors for e in errors] for errors in (first, second))
    return difference_interval(*counts, [e.words for e in first], speakers)


def matched_pairs(
    first: Sequence[UtteranceErrors], second: Sequence[UtteranceErrors]
) -> MatchedPairs:
    """MAPSSWE of two systems on the same utterances.

    After L. Gillick and S. J. Cox, "Some statistical issues in the comparison of speech recognition
    algorithms", ICASSP 1989. The speech is cut wherever both systems get at least two words in a
    row right, and at the ends of utterances; the errors in one segment are then taken as
    independent of those in another. Of the differences z of n segments, W = mean(z) / (std(z) /
    sqrt(n)) is compared with the standard normal distribution. Fewer than two segments show
    nothing: p is 1.

    Raises:
        LowbitError: the systems were not measured on the same utterances.
    """
    if [e.words for e in first] != [e.words for e in second]:
        raise LowbitError("compare word errors on the same utterances")
    differences = []
    for one, other in zip(first, second, strict=True):
        differences += _segment_differences(one, other)
    count = len(differences)
    mean = float(np.mean(differences)) if count else 0.0
    if count < 2 or mean == 0:
        return MatchedPairs(count, mean, 1.0)
    error = float(np.std(differences, ddof=1)) / math.sqrt(count)
    return MatchedPairs(count, mean, math.erfc(abs(mean) / error / math.sqrt(2)) if error else 0.0)


def _segment_differences(first: UtteranceErrors, second: UtteranceErrors) -> list[int]:
    """Errors of the first system less those of the second, in each segment of an utterance."""
    differences, segment, right = [], [0, 0], 0  # right: words in a row, of both systems
    for word in range(first.words + 1):
        here = [_errors_at(errors, word) for errors in (first, second)]
        inserted = any(errors.inserted[word] for errors in (first, second))
        if any(here):
            if right >= _BUFFER and any(segment):
                differences.append(segment[0] - segment[1])
                segment = [0, 0]
            segment = [before + now for before, now in zip(segment, here, strict=True)]
        is_right = word < first.words and not (first.wrong[word] or second.wrong[word])
        right = (0 if inserted else right) + 1 if is_right else 0
    if any(segment):
        differences.append(segment[0] - segment[1])
    return differences


def _errors_at(errors: UtteranceErrors, word: int) -> int:
    """Those before a word, and of the word itself; behind the last word only the former."""
    return errors.inserted[word] + (word < errors.words and errors.wrong[word])
