"""How sure a measured rate is, and whether two models differ: bootstrap over utterances."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairseq_lowbit.errors import LowbitError

LEVEL = 0.95
_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds that hold ``level`` of its bootstrap distribution."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    @property
    def excludes_zero(self) -> bool:
        """Of a difference: whether it is beyond chance."""
        return self.low > 0 or self.high < 0


def rate_interval(
    counts: Sequence[float], sizes: Sequence[float], groups: Sequence[str] | None = None
) -> Interval:
    """A rate, ``sum(counts) / sum(sizes)``, such as a word error rate.

    Args:
        counts: of each utterance, for example its errors; [utterances].
        sizes: what they are counted among, for example its words; [utterances].
        groups: of each utterance what is drawn as a whole, for example its speaker: utterances of
            one speaker are alike, and to draw them one by one would make the interval too narrow.
            None draws utterances.

    Raises:
        LowbitError: nothing to count, or lists of different lengths.
    """
    counts, sizes = _by_group(counts, sizes, groups)
    drawn = _draws(len(sizes))
    return _interval(counts.sum() / sizes.sum(), (drawn @ counts) / (drawn @ sizes))


def difference_interval(
    first: Sequence[float],
    second: Sequence[float],
    sizes: Sequence[float],
    groups: Sequence[str] | None = None,
) -> Interval:
    """The rate of ``first`` less that of ``second``, of two models on the same utterances.

    The same utterances are drawn for both (a paired bootstrap), so that what makes an utterance
    hard for both does not widen the interval. Arguments and errors as of :func:`rate_interval`.
    """
    if len(first) != len(second):
        raise LowbitError(
            f"{len(first)} and {len(second)} utterances: measure both models on the same ones"
        )
    return rate_interval(np.subtract(first, second), sizes, groups)


def _by_group(
    counts: Sequence[float], sizes: Sequence[float], groups: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    counts, sizes = np.asarray(counts, float), np.asarray(sizes, float)
    if not len(counts) == len(sizes) == len(sizes if groups is None else groups):
        raise LowbitError("counts, sizes and groups are not of the same utterances")
    if groups is not None:
        names, index = np.unique(groups, return_inverse=True)
        counts, sizes = (np.bincount(index, values, len(names)) for values in (counts, sizes))
    if not sizes.sum() > 0:
        raise LowbitError("there is nothing to count errors among: no word, unit or utterance")
    return counts, sizes


def _draws(count: int) -> np.ndarray:
    """How often each of ``count`` is drawn, [resamples, count]. The seed is fixed, so that equal
    counts give equal intervals."""
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)


def _interval(value: float, resampled: np.ndarray) -> Interval:
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(resampled, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high))
