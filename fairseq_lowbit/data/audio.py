"""Reading audio: strictly (what training expects) and leniently (what users have)."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
from scipy.signal import resample_poly

from fairseq_lowbit.errors import LowbitError

SAMPLE_RATE = 16000
Content = TypeVar("Content")


class UnusableAudio(LowbitError):
    """A file that no model can learn from; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def audio_info(path: str | Path) -> soundfile._SoundFileInfo:
    """Header facts (samplerate, channels, frames); raises UnusableAudio when there is no header."""
    return _open(path, soundfile.info)


def read_audio(path: str | Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Reads a file that must already be mono at `sample_rate`: float32 [samples] in -1..1.

    Raises UnusableAudio when it is unreadable, empty, constant, non-finite, or in another format.
    """
    samples, rate = _open(path, _read)
    if rate != sample_rate:
        raise UnusableAudio(path, f"{rate} Hz where {sample_rate} Hz is needed")
    if samples.shape[1] != 1:
        raise UnusableAudio(path, f"{samples.shape[1]} channels where one is needed")
    return _checked(path, samples[:, 0])


def convert_audio(path: str | Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Reads any rate and number of channels: float32 [samples] at `sample_rate`, channels averaged.

    Raises UnusableAudio only when nothing can be made of the file.
    """
    samples, rate = _open(path, _read)
    mono = _checked(path, samples.mean(axis=1))
    if rate == sample_rate:
        return mono
    common = gcd(rate, sample_rate)
    return resample_poly(mono, sample_rate // common, rate // common).astype(np.float32)


def _read(path: str) -> tuple[np.ndarray, int]:
    """Samples, float32 [samples, channels], and the rate in Hz."""
    return soundfile.read(path, dtype="float32", always_2d=True)


def _open(path: str | Path, read: Callable[[str], Content]) -> Content:
    if not Path(path).is_file():
        raise UnusableAudio(path, "no such file")
    try:
        return read(str(path))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise UnusableAudio(path, f"unreadable ({error})") from error


def _checked(path: str | Path, samples: np.ndarray) -> np.ndarray:
    if samples.size == 0:
        raise UnusableAudio(path, "empty")
    if not np.isfinite(samples).all():
        raise UnusableAudio(path, "holds values that are not finite")
    # A constant is silence, with or without an offset; a quiet recording is still a recording.
    if samples.min() == samples.max():
        raise UnusableAudio(path, "silent (every sample is the same)")
    return samples
