"""The usable recordings of a manifest, as training and calibration read and cut them."""

from dataclasses import dataclass
from logging import getLogger
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio, read_audio
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.errors import LowbitError, require_number

logger = getLogger(__name__)

FIRST_EPOCH = 1
LABEL_RATE = 50.0
_MAX_SUBSTITUTES = 20


@dataclass
class AudioConfig:
    """The keys of a training configuration's ``task`` section that say how utterances are chosen,
    read and cut."""

    sample_rate: int = SAMPLE_RATE  # of the audio in Hz
    normalize: bool = False  # zero mean, unit variance per utterance
    pad_audio: bool = False  # pad a batch to its longest instead of cutting it
    random_crop: bool = True  # cut at a random place
    # In samples: shorter and longer utterances are left out, others are cut.
    min_sample_size: Optional[int] = None
    max_keep_size: Optional[int] = None
    max_sample_size: Optional[int] = 250_000


@dataclass(frozen=True)
class AudioOptions:
    """How utterances are chosen, read and cut; sizes in samples. Raises LowbitError for a rate that
    makes no sense."""

    sample_rate: int = SAMPLE_RATE
    normalize: bool = False
    pad_audio: bool = False
    random_crop: bool = True
    min_size: int = 400
    max_keep: int | None = None
    max_size: int | None = None
    seed: int = 1
    # Labels per second: a cut begins with a whole one, so that labels and frames stay aligned.
    label_rate: float = LABEL_RATE

    def __post_init__(self) -> None:
        require_number("task.sample_rate", self.sample_rate, 1)
        require_number("task.label_rate", self.label_rate, 0, excluded=True)

    @classmethod
    def from_config(cls, task: AudioConfig, frame: int, seed: int) -> "AudioOptions":
        """The reading that a training configuration asks for.

        Args:
            task: its ``task`` section, with ``label_rate`` where there are labels.
            frame: samples of the model's first frame, the least that a recording must have.

        Raises:
            LowbitError: limits between which no utterance or no frame can be.
        """
        shortest, longest = task.min_sample_size or 0, task.max_keep_size
        require_number("task.min_sample_size", shortest, 0)
        if longest is not None and longest < shortest:
            raise LowbitError(
                f"task.max_keep_size {longest} is less than task.min_sample_size {shortest} and "
                "leaves no utterance: raise the one or lower the other"
            )
        if task.max_sample_size is not None and task.max_sample_size < frame:
            raise LowbitError(
                f"task.max_sample_size {task.max_sample_size}: one frame of this model takes "
                f"{frame} samples; give at least that many, or null for no limit"
            )
        return cls(
            sample_rate=task.sample_rate,
            normalize=task.normalize,
            pad_audio=task.pad_audio,
            random_crop=task.random_crop,
            min_size=max(frame, shortest),
            max_keep=longest,
            max_size=task.max_sample_size,
            seed=seed,
            label_rate=getattr(task, "label_rate", LABEL_RATE),
        )


@dataclass(frozen=True)
class Recording:
    """One recording that was read."""

    index: int  # among the usable recordings
    line: int  # of the manifest
    name: str
    audio: Tensor  # [samples]
    unusable: tuple[tuple[str, str], ...] = ()  # (name, reason) of files it is read in place of


class Recordings:
    """The recordings of a manifest that have a usable size.

    Attributes:
        lines: their lines in the manifest, [recordings].
        sizes: [recordings] samples, at most ``options.max_size``.

    Raises:
        LowbitError: no file has a usable size.
    """

    def __init__(self, manifest: Manifest, options: AudioOptions) -> None:
        self.manifest, self.options = manifest, options
        self.lines = self._usable_lines()
        self.sizes = np.minimum(manifest.sizes[self.lines], options.max_size or np.inf).astype(int)
        self._by_size = np.argsort(self.sizes, kind="stable")
        self._place = np.argsort(self._by_size)

    def _usable_lines(self) -> np.ndarray:
        sizes = self.manifest.sizes
        long_enough = sizes >= self.options.min_size
        short_enough = sizes <= (self.options.max_keep or np.inf)
        lines = np.flatnonzero(long_enough & short_enough)
        if not len(lines):
            raise LowbitError(
                f"{self.manifest.path}: none of {len(sizes)} files has between "
                f"{self.options.min_size} and {self.options.max_keep or 'any number of'} samples; "
                "see task.min_sample_size and task.max_keep_size"
            )
        if len(lines) < len(sizes):
            short, long = np.flatnonzero(~long_enough), np.flatnonzero(~short_enough)
            first = self.manifest.names[(short if len(short) else long)[0]]
            logger.warning(
                f"{self.manifest.path}: left out {len(short)} files shorter than "
                f"{self.options.min_size} samples and {len(long)} too long, first {first}"
            )
        return lines

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> Recording:
        """A recording, or in place of an unusable one the next usable one of about its size.

        Raises:
            LowbitError: too many in a row are unusable.
        """
        unusable = []
        for step in range(min(_MAX_SUBSTITUTES, len(self))):
            candidate = int(self._by_size[(self._place[index] + step) % len(self)])
            line = int(self.lines[candidate])
            name = self.manifest.names[line]
            try:
                audio = read_audio(self.manifest.root / name, self.options.sample_rate)
                if len(audio) < self.options.min_size:
                    raise UnusableAudio(name, f"only {len(audio)} samples")
            except UnusableAudio as error:
                unusable.append((name, str(error)))
                continue
            waveform = torch.from_numpy(audio)
            if self.options.normalize:
                waveform = F.layer_norm(waveform, waveform.shape)
            return Recording(candidate, line, name, waveform, tuple(unusable))
        raise LowbitError(
            f"{self.manifest.path}: {len(unusable)} files in a row are unusable, first "
            f"{unusable[0][1]}"
        )

    def cut(
        self, batch: list[Recording], lengths: list[int], epoch: int = FIRST_EPOCH
    ) -> tuple[Tensor, list[int]]:
        """Cuts that depend on seed, epoch and recording only.

        Args:
            lengths: samples that each recording is cut to.

        Returns:
            [batch, longest length], zero behind each length, and the first sample of each cut.
        """
        starts = [self._start(r, length, epoch) for r, length in zip(batch, lengths, strict=True)]
        waveform = torch.zeros(len(batch), max(lengths))
        for row, recording, start, length in zip(waveform, batch, starts, lengths, strict=True):
            row[:length] = recording.audio[start : start + length]
        return waveform, starts

    def _start(self, recording: Recording, length: int, epoch: int) -> int:
        spare = len(recording.audio) - length
        if spare <= 0 or not self.options.random_crop:
            return 0
        generator = np.random.default_rng((self.options.seed, epoch, recording.index))
        step = round(self.options.sample_rate / self.options.label_rate)
        return int(generator.integers(spare // step + 1)) * step
