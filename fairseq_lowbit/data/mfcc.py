"""HuBERT's first features: 13 MFCC, their deltas and double deltas, 100 times a second.

The definition is Kaldi's with its default options (and no dither), on samples in -1..1.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.fft import dct

DIMENSIONS = 39
FRAME_RATE = 100
_CEPSTRA = 13
_MEL_BINS = 23
_LOWEST_HZ = 20.0
# Raises the higher cepstra, which are small, to about the scale of the lower.
_LIFTER = 1 + 22 / 2 * np.sin(np.pi * np.arange(_CEPSTRA) / 22)
_PREEMPHASIS = 0.97
_DELTA_REACH = 2
# Kaldi's floor below which an energy counts as none: the resolution of float32.
_FLOOR = np.finfo(np.float32).eps


def mfcc(samples: np.ndarray, sample_rate: int = 16000) -> np.ndarray:
    """MFCC with deltas: float32 [frames, 39] of float [samples].

    Frame i describes samples i * hop to i * hop + window (160 and 400 at 16 kHz); audio shorter
    than one window is padded with zeros to give one frame.
    """
    cepstra = _cepstra(np.asarray(samples, dtype=np.float64), sample_rate)
    first = deltas(cepstra)
    return np.concatenate([cepstra, first, deltas(first)], axis=1).astype(np.float32)


def deltas(features: np.ndarray) -> np.ndarray:
    """Slopes of a least-squares line over 2 * 2 + 1 frames, the ends repeated: [frames, n]."""
    frames = len(features)
    padded = np.pad(features, ((_DELTA_REACH, _DELTA_REACH), (0, 0)), mode="edge")
    reach = range(-_DELTA_REACH, _DELTA_REACH + 1)
    slopes = sum(k * padded[_DELTA_REACH + k : _DELTA_REACH + k + frames] for k in reach)
    return slopes / sum(k * k for k in reach)


def _cepstra(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    window, hop = sample_rate * 25 // 1000, sample_rate // FRAME_RATE
    if len(samples) < window:
        samples = np.pad(samples, (0, window - len(samples)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    frames = frames - frames.mean(axis=1, keepdims=True)
    # The first sample has no predecessor and stands in for it.
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    # Povey's window is one of Hann with steeper flanks.
    frames = (frames - _PREEMPHASIS * previous) * np.hanning(window) ** 0.85
    size = 1 << (window - 1).bit_length()
    power = np.abs(np.fft.rfft(frames, size)) ** 2
    energies = power[:, : size // 2] @ _mel_filters(size, sample_rate)
    cepstra = dct(np.log(np.maximum(energies, _FLOOR)), norm="ortho")[:, :_CEPSTRA]
    return cepstra * _LIFTER


@lru_cache(maxsize=4)
def _mel_filters(size: int, sample_rate: int) -> np.ndarray:
    """Triangles, equally spaced and straight-sided on the mel axis: [size / 2, 23].

    The Nyquist bin has no weight, as in Kaldi.
    """
    edges = np.linspace(_mel(_LOWEST_HZ), _mel(sample_rate / 2), _MEL_BINS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = _mel(np.arange(size // 2) * sample_rate / size)[:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling))


def _mel(hertz: float | np.ndarray) -> float | np.ndarray:
    return 1127 * np.log1p(np.asarray(hertz) / 700)
