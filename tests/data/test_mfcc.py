import cmath
import math

import numpy as np
import pytest

from fairseq_lowbit.data.mfcc import deltas, mfcc


def speechlike(samples, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    voiced = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 30))
    return 0.1 * voiced * (1 + np.sin(9 * time)) + 0.01 * rng.standard_normal(samples) + 0.05


def slow_cepstra(samples, start):
    """The definition for one frame of 16 kHz audio, term by term."""
    frame = [float(x) for x in samples[start : start + 400]]
    mean = math.fsum(frame) / 400
    frame = [x - mean for x in frame]
    frame = [frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(400)]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * i / 399) for i in range(400)]
    frame = [x * w**0.85 for x, w in zip(frame, hann, strict=True)]
    power = []
    for k in range(256):
        terms = (x * cmath.exp(-2j * math.pi * k * i / 512) for i, x in enumerate(frame))
        power.append(abs(sum(terms)) ** 2)

    def mel(hertz):
        return 1127 * math.log(1 + hertz / 700)

    low, high = mel(20), mel(8000)
    width = (high - low) / 24
    logs = []
    for band in range(23):
        centre = low + (band + 1) * width
        weights = [max(0.0, 1 - abs(mel(k * 16000 / 512) - centre) / width) for k in range(256)]
        energy = math.fsum(w * p for w, p in zip(weights, power, strict=True))
        logs.append(math.log(max(energy, 2**-23)))
    cepstra = []
    for c in range(13):
        terms = (x * math.cos(math.pi * c * (b + 0.5) / 23) for b, x in enumerate(logs))
        value = math.fsum(terms) * math.sqrt((1 if c == 0 else 2) / 23)
        cepstra.append(value * (1 + 11 * math.sin(math.pi * c / 22)))
    return cepstra


def test_agrees_with_the_definition():
    samples = speechlike(1600)
    features = mfcc(samples)
    assert features.shape == (1 + (1600 - 400) // 160, 39)
    assert features.dtype == np.float32
    for i in (0, 3, 7):
        expected = slow_cepstra(samples, 160 * i)
        np.testing.assert_allclose(features[i, :13], expected, rtol=1e-4, atol=1e-3)


def test_deltas_of_a_ramp_are_its_slope():
    ramp = np.arange(10.0)[:, None] * [1.0, -2.0]
    np.testing.assert_allclose(deltas(ramp)[2:-2], np.tile([1.0, -2.0], (6, 1)))
    # The first frame sees 0 0 0 1 2: (1 * 1 + 2 * 2) / 10.
    np.testing.assert_allclose(deltas(ramp)[0], [0.5, -1.0])


def test_columns_are_cepstra_deltas_and_double_deltas():
    features = mfcc(speechlike(8000)).astype(np.float64)
    np.testing.assert_allclose(deltas(features[:, :13]), features[:, 13:26], atol=1e-4)
    np.testing.assert_allclose(deltas(features[:, 13:26]), features[:, 26:], atol=1e-4)


@pytest.mark.parametrize("samples, frames", [(1, 1), (400, 1), (559, 1), (560, 2), (16000, 98)])
def test_number_of_frames(samples, frames):
    assert mfcc(speechlike(samples)).shape == (frames, 39)


def test_silence_is_finite():
    assert np.isfinite(mfcc(np.zeros(1600))).all()


def test_a_constant_offset_does_not_matter():
    samples = speechlike(1600)
    np.testing.assert_allclose(mfcc(samples), mfcc(samples + 0.2), atol=1e-2)
