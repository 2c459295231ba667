"""What a probe has measured of one model, and whether two models differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.intervals import Interval, difference_interval, rate_interval


@dataclass(frozen=True)
class Difference:
    """An error rate less another one, on the same recordings.

    Attributes:
        interval: about the choice of recordings, by a paired bootstrap.
        by_seed: of each seed, which stands for what is random in training.
    """

    interval: Interval
    by_seed: tuple[float, ...]

    @property
    def is_beyond_chance(self) -> bool:
        """The interval excludes zero, and no seed says the opposite."""
        return self.interval.excludes_zero and len(set(np.sign(self.by_seed))) == 1


@dataclass(frozen=True)
class Probe:
    """An error rate on unseen recordings, with what it takes to compare it with another model's.

    Attributes:
        errors: of each recording, the mean over the seeds, [recordings].
        sizes: phones, letters or words of each recording; 1 where it has one label.
        groups: speaker of each recording, which the bootstrap draws as a whole; the recording
            itself where its speaker is not known.
        seed_rates: the error rate of each seed.
        layer_weights: learned share of the input of the first layer and of the output of every
            layer, mean over the seeds; they add up to 1.
    """

    errors: tuple[float, ...]
    sizes: tuple[int, ...]
    groups: tuple[str, ...]
    seed_rates: tuple[float, ...]
    layer_weights: tuple[float, ...]

    @property
    def rate(self) -> Interval:
        """All errors among all that can be wrong, a share; above 1 where a head inserts much."""
        return rate_interval(self.errors, self.sizes, self.groups)

    @property
    def seed_spread(self) -> float:
        """Standard deviation of the rate over the seeds: what the heads' start and order do."""
        return float(np.std(self.seed_rates))

    def less(self, other: "Probe") -> Difference:
        """This error rate less the other's, recording by recording and seed by seed.

        Raises:
            LowbitError: they were measured on other recordings, or by another number of heads.
        """
        if (self.sizes, self.groups) != (other.sizes, other.groups):
            raise LowbitError("two probes of different recordings cannot be compared")
        if len(self.seed_rates) != len(other.seed_rates):
            raise LowbitError("two probes with different numbers of seeds cannot be compared")
        interval = difference_interval(self.errors, other.errors, self.sizes, self.groups)
        by_seed = np.subtract(self.seed_rates, other.seed_rates)
        return Difference(interval, tuple(by_seed.tolist()))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Probe":
        """Reads a probe back from JSON, where tuples are lists.

        Raises:
            KeyError, TypeError: these are not the values of a probe.
        """
        return cls(**{key: tuple(value) for key, value in values.items()})
