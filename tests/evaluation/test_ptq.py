"""Post-training quantization: calibration and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fairseq_lowbit.data.calibration_audio import CalibrationAudio
from fairseq_lowbit.data.manifest import read_manifest, write_manifest
from fairseq_lowbit.data.recordings import AudioOptions, Recordings
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.agreement import agreement, valid_frames
from fairseq_lowbit.evaluation.ptq import post_training_quantized
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.nn import is_calibrated
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.quantization import Criterion
from tests.evaluation.conftest import RATE

W2A2 = Precision("bitla_w2a2")


@pytest.fixture
def recordings(data: Path) -> Recordings:
    return Recordings(read_manifest(data / "train.tsv"), AudioOptions())


def test_more_bits_are_closer(
    teacher: LoadedModel, recordings: Recordings, batches: list[Utterances]
) -> None:
    reference = valid_frames(teacher.model, batches)
    close = {}
    for name in ("float", "bitl_w8a16", "bitla_w8a8", "bitla_w4a4", "bitla_w1a1"):
        model = post_training_quantized(teacher, Precision(name), recordings).model
        assert model.plan.precision.name == name
        assert is_calibrated(model)
        assert not model.training
        close[name] = agreement(valid_frames(model, batches), reference).snr_db[-1]
    assert close["float"] > 100
    assert close["bitl_w8a16"] > 25
    assert list(close.values()) == sorted(close.values(), reverse=True)


def test_weights_stay_and_the_result_is_the_same_each_time(
    teacher: LoadedModel, recordings: Recordings
) -> None:
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    first = post_training_quantized(teacher, W2A2, recordings).model.state_dict()
    torch.manual_seed(99)
    second = post_training_quantized(teacher, W2A2, recordings).model.state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if name in before:
            assert torch.equal(value, before[name]), name
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())


def test_calibration_hears_nearly_all_of_what_it_draws(
    teacher: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, files = np.random.default_rng(0), []
    for index, samples in enumerate([100, *np.linspace(3000, 30_000, 60).astype(int)]):
        soundfile.write(tmp_path / f"{index}.flac", 0.1 * rng.standard_normal(samples), RATE)
        files.append((f"{index}.flac", samples))
    rng.shuffle(files)
    write_manifest(tmp_path / "train.tsv", tmp_path, files)
    heard, run = [], Hubert.final_output
    monkeypatch.setattr(Hubert, "final_output", lambda *a: heard.append(a[1].shape) or run(*a))
    manifest = read_manifest(tmp_path / "train.tsv")
    recordings = Recordings(manifest, AudioOptions(min_size=500, random_crop=False))
    audio = CalibrationAudio(batches=100, max_seconds=1.5)
    post_training_quantized(teacher, W2A2, recordings, Criterion("absmax"), audio)
    # All but the file that is too short; a part of two is more than the longest cut.
    samples = sum(rows * length for rows, length in heard)
    assert sum(rows for rows, _ in heard) == 60
    assert samples > 0.95 * np.minimum(manifest.sizes, 24_000).sum()
    assert max(length for _, length in heard) == 24_000
    heard.clear()
    post_training_quantized(teacher, W2A2, recordings, audio=CalibrationAudio(batches=2))
    assert [rows for rows, _ in heard] == [4, 4]


def test_less_audio_than_a_frame_is_refused(teacher: LoadedModel, recordings: Recordings) -> None:
    with pytest.raises(
        LowbitError, match="calibration.max_seconds 0.01: give a number from 0.025 up"
    ):
        post_training_quantized(teacher, W2A2, recordings, audio=CalibrationAudio(max_seconds=0.01))


def test_unusable_files_are_left_out(
    teacher: LoadedModel, recordings: Recordings, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = recordings.manifest.names[0]
    (recordings.manifest.root / damaged).write_bytes(b"no audio")
    assert is_calibrated(post_training_quantized(teacher, W2A2, recordings).model)
    assert damaged in caplog.text


def test_nothing_to_calibrate_on(teacher: LoadedModel, recordings: Recordings) -> None:
    for path in recordings.manifest.files():
        path.write_bytes(b"no audio")
    with pytest.raises(LowbitError, match=r"train\.tsv"):
        post_training_quantized(teacher, W2A2, recordings)
