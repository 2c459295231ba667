"""What is calibrated on, before training and without any: seeded batches of which little is cut."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.data.recordings import Recordings
from fairseq_lowbit.errors import require_number


@dataclass(frozen=True)
class CalibrationAudio:
    """How much audio is calibrated on; raises LowbitError for a value that makes no sense."""

    batches: int = 8  # at most; fewer where there are not as many utterances
    batch_size: int = 4  # utterances per batch
    max_seconds: float = 10.0  # longest cut of an utterance
    seed: int = 1  # which utterances

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("batch_size", 1), ("seed", 0)):
            require_number(f"calibration.{name}", getattr(self, name), least)
        require_number("calibration.max_seconds", self.max_seconds, 0, excluded=True)

    @classmethod
    def from_config(cls, calibration: "CalibrationConfig") -> "CalibrationAudio":
        return cls(**{entry.name: getattr(calibration, entry.name) for entry in fields(cls)})

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


@dataclass
class CalibrationConfig:
    """The ``task.calibration`` section of a training configuration."""

    batches: int = CalibrationAudio.batches
    batch_size: int = CalibrationAudio.batch_size
    max_seconds: float = CalibrationAudio.max_seconds
    seed: int = CalibrationAudio.seed
    criterion: str = "mse"  # what a scale fits: mse, absmax or percentile
    percentile: float = 99.9  # percentage of magnitudes that are not clipped


class CalibrationBatch(NamedTuple):
    waveform: Tensor  # [batch, samples], all of it valid
    unusable: list[tuple[str, str]]  # (name, reason) of files that others were read in place of


def calibration_batches(
    recordings: Recordings, audio: CalibrationAudio, frame: int
) -> Iterator[CalibrationBatch]:
    """The batches that training starts from; the same in every process and at every start.

    Args:
        frame: samples of the model's first frame.

    Raises:
        LowbitError: utterances are cut to less than a frame; too many files are unusable.
    """
    rate = recordings.options.sample_rate
    require_number("calibration.max_seconds", audio.max_seconds, frame / rate)
    drawn = audio.draw(recordings.sizes, rate)
    return (_unpadded(recordings, indices, audio.samples(rate)) for indices in drawn)


def _unpadded(recordings: Recordings, indices: list[int], longest: int) -> CalibrationBatch:
    """Recordings cut to their common length, at most ``longest`` samples."""
    batch = [recordings.read(index) for index in indices]
    length = min(longest, *(len(recording.audio) for recording in batch))
    waveform, _ = recordings.cut(batch, [length] * len(batch))
    return CalibrationBatch(waveform, [entry for r in batch for entry in r.unusable])
