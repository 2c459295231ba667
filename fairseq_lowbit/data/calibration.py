"""Which utterances are calibrated on: seeded batches of which little is cut."""

import math
from dataclasses import dataclass

import numpy as np

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.errors import LowbitError


@dataclass(frozen=True)
class CalibrationAudio:
    """How much audio is calibrated on, before training and without any.

    Attributes:
        batches: at most; fewer where there are not as many utterances.
        batch_size: utterances per batch.
        max_seconds: longest cut of an utterance.
        seed: which utterances.

    Raises:
        LowbitError: a value that makes no sense.
    """

    batches: int = 8
    batch_size: int = 4
    max_seconds: float = 10.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("batches", "batch_size"):
            if getattr(self, name) < 1:
                raise LowbitError(f"calibration {name} {getattr(self, name)}; want 1 or more")
        if not 0 < self.max_seconds < math.inf:
            raise LowbitError(f"calibration max_seconds {self.max_seconds}; want above 0")
        if self.seed < 0:
            raise LowbitError(f"calibration seed {self.seed}; want 0 or more")

    def samples(self, rate: int = SAMPLE_RATE) -> int:
        """Longest cut in samples."""
        return int(self.max_seconds * rate)

    def draw(self, sizes: np.ndarray, rate: int = SAMPLE_RATE) -> list[list[int]]:
        """Batches of indices into ``sizes``, no utterance twice.

        A batch is cut to its shortest utterance, so those of a batch are neighbours by size: drawn
        at random, most of the audio would be cut away.

        Args:
            sizes: [utterances] samples.
            rate: samples per second.
        """
        if not len(sizes):
            return []
        random = np.random.default_rng(self.seed)
        # Equal sizes, as of all that are cut to max_seconds, in random order: neighbours in a
        # manifest have one speaker.
        shuffled = random.permutation(len(sizes))
        kept = np.minimum(sizes, self.samples(rate))
        by_size = shuffled[np.argsort(kept[shuffled], kind="stable")]
        batches = np.array_split(by_size, -(-len(sizes) // self.batch_size))
        chosen = random.permutation(len(batches))[: self.batches]
        return [batches[index].tolist() for index in chosen]
