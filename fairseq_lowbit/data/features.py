"""Features of frames, which labels are clusters of, and reading them from many files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio, read_audio
from fairseq_lowbit.data.mfcc import FRAME_RATE, mfcc

# Files in flight: a large corpus does not fit into memory.
_WINDOW = 64


class FrameFeatures(Protocol):
    """What a frame is clustered by. It travels to other processes, so it has to be picklable, and
    small: what is large is loaded when first needed.

    Attributes:
        standardize: whether dimensions differ in scale and are to be given mean 0 and variance 1
            before they are clustered.
        is_threaded: whether several threads may compute at once; others use threads of their own.
    """

    standardize: bool
    is_threaded: bool

    @property
    def rate(self) -> int:
        """Frames per second."""

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Float32 [frames, dimensions] of one recording at 16 kHz, float32 [samples]; frame t
        begins at second t / rate."""

    def digest(self) -> str:
        """Equal for equal features of equal audio."""

    def limit_threads(self, threads: int) -> None:
        """Called first in a process that shares the cores with others."""


class Mfcc:
    """The features of HuBERT's first iteration."""

    rate = FRAME_RATE
    # The deltas are an order of magnitude smaller than the cepstra and would not count otherwise.
    standardize = True
    is_threaded = True

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        return mfcc(samples, SAMPLE_RATE)

    def digest(self) -> str:
        return "mfcc"

    def limit_threads(self, threads: int) -> None:
        threadpool_limits(threads)


def read_features(
    paths: Sequence[Path], features: FrameFeatures, threads: int
) -> Iterator[np.ndarray | UnusableAudio]:
    """Features of each file in order, or why it has none."""
    # Where only the main thread computes, the others read ahead.
    work = features if features.is_threaded else _as_it_is
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), _WINDOW):
            window = paths[start : start + _WINDOW]
            for found in pool.map(lambda path: _of_file(path, work), window):
                is_done = features.is_threaded or isinstance(found, UnusableAudio)
                yield found if is_done else features(found)


def _of_file(path: Path, work: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | UnusableAudio:
    try:
        return work(read_audio(path, SAMPLE_RATE))
    except UnusableAudio as error:
        return error


def _as_it_is(samples: np.ndarray) -> np.ndarray:
    return samples
