import numpy as np
import pytest
import soundfile

from fairseq_lowbit.data.audio import UnusableAudio, audio_info, convert_audio, read_audio
from fairseq_lowbit.errors import LowbitError


def tone(seconds=0.5, rate=16000, hertz=440.0):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write(path, samples, rate=16000, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def test_reads_what_was_written(tmp_path):
    path = write(tmp_path / "a.flac", tone())
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert samples.shape == (8000,)
    np.testing.assert_allclose(samples, tone(), atol=1e-4)
    assert audio_info(path).frames == 8000


@pytest.mark.parametrize(
    "samples, rate, reason",
    [
        (tone(rate=8000), 8000, "8000 Hz where 16000 Hz"),
        (np.stack([tone(), tone()], 1), 16000, "2 channels"),
        (np.zeros(8000), 16000, "silent"),
        (np.full(8000, 0.25), 16000, "silent"),
        (np.zeros(0), 16000, "empty"),
        (np.where(np.arange(8000) == 5, np.nan, tone()), 16000, "not finite"),
        (np.where(np.arange(8000) == 5, np.inf, tone()), 16000, "not finite"),
    ],
)
def test_strict_reading_names_file_and_reason(tmp_path, samples, rate, reason):
    path = write(tmp_path / "bad.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(UnusableAudio, match=f"bad.wav: .*{reason}"):
        read_audio(path)


@pytest.mark.parametrize("read", [read_audio, convert_audio, audio_info])
def test_a_file_that_is_no_audio(tmp_path, read):
    path = tmp_path / "bad.flac"
    with pytest.raises(LowbitError, match="bad.flac: no such file"):
        read(path)
    path.write_bytes(b"this is not a recording")
    with pytest.raises(LowbitError, match="bad.flac: unreadable"):
        read(path)


def test_quiet_audio_is_not_silent(tmp_path):
    assert read_audio(write(tmp_path / "a.wav", tone() * 1e-3)).any()


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_conversion_keeps_pitch_and_loudness(tmp_path, rate):
    path = write(tmp_path / "a.wav", np.stack([tone(rate=rate)] * 2, 1), rate)
    samples = convert_audio(path)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 8000) <= 1
    inner = slice(800, 7200)  # the filter rings at the ends
    np.testing.assert_allclose(samples[inner], tone()[inner], atol=5e-3)


def test_conversion_averages_channels(tmp_path):
    path = write(tmp_path / "a.wav", np.stack([tone(), np.zeros(8000)], 1))
    np.testing.assert_allclose(convert_audio(path), tone() / 2, atol=1e-4)


def test_channels_that_cancel_are_silent(tmp_path):
    path = write(tmp_path / "a.wav", np.stack([tone(), -tone()], 1), subtype="FLOAT")
    with pytest.raises(UnusableAudio, match="silent"):
        convert_audio(path)
