"""The layer that labels are made of, and labels made of it."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data.audio import read_audio
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.layer_features import LayerFeatures, layer_output
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import Hubert
from tests.evaluation.conftest import SHAPE, build_teacher, calibrated

LAYERS = SHAPE.encoder_layers


@pytest.fixture
def checkpoint(save: Callable, model: Hubert) -> str:
    return str(save("teacher", model))


def noise(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_a_layer_is_what_the_model_calls_it(layer: int, norm_first: bool) -> None:
    model = build_teacher(replace(SHAPE, layer_norm_first=norm_first))
    waveform = noise(9000)
    states, _ = model.representations(waveform[None])
    torch.testing.assert_close(layer_output(model, waveform, layer), states[layer][0])


@pytest.mark.parametrize("samples", [0, 100, 400, 719, 720, 4000, 16000, 16399, 16400])
def test_pieces_give_as_many_frames_as_the_whole(model: Hubert, samples: int) -> None:
    frames = int(model.frame_lengths(torch.tensor(samples)))
    for longest in (60, 0.25, 0.02):
        output = layer_output(model, noise(samples), 1, longest)
        assert output.shape == (frames, SHAPE.encoder_embed_dim)


def test_a_piece_is_the_output_of_its_own_samples(model: Hubert) -> None:
    """Frames 10 to 19 see samples 3200 to 3200 + 9 * 320 + 400 and nothing else."""
    waveform = noise(16000)
    pieces = layer_output(model, waveform, 2, longest_seconds=0.2)
    alone = layer_output(model, waveform[3200 : 3200 + 9 * 320 + 400], 2)
    torch.testing.assert_close(pieces[10:20], alone)


def test_utterances_are_normalized_as_in_training(
    checkpoint: str, tmp_path: Path, model: Hubert
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["task"]["normalize"] = True
    torch.save(state, tmp_path / "normalized.pt")
    waveform = noise(8000)
    found = LayerFeatures(str(tmp_path / "normalized.pt"), 1, open_model)(waveform.numpy())
    scaled = torch.nn.functional.layer_norm(waveform, waveform.shape)
    expected = layer_output(model, scaled, 1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    plain = LayerFeatures(checkpoint, 1, open_model)
    assert abs(plain(waveform.numpy()) - expected).max() > 1e-3
    assert plain.digest() != LayerFeatures(str(tmp_path / "normalized.pt"), 1, open_model).digest()


def test_the_digest_tells_weights_and_layers_apart(save: Callable, checkpoint: str) -> None:
    features = LayerFeatures(checkpoint, 1, open_model)
    assert pickle.loads(pickle.dumps(features)).digest() == features.digest()
    other = build_teacher()
    other.encoder.layers[0].fc1.bias.data[0] += 1
    digests = {
        features.digest(),
        replace(features, layer=2).digest(),
        LayerFeatures(str(save("other", other)), 1, open_model).digest(),
    }
    assert len(digests) == 3


def test_a_quantized_model_gives_features_too() -> None:
    low = calibrated("bitla_w2a2")
    states, _ = low.representations(noise(8000)[None])
    torch.testing.assert_close(layer_output(low, noise(8000), LAYERS), states[-1][0])


@pytest.mark.parametrize("layer", [-1, LAYERS + 1])
def test_a_layer_that_the_model_lacks(checkpoint: str, layer: int) -> None:
    with pytest.raises(LowbitError, match=rf"--layer {layer}: .*teacher\.pt has layers 1 to 2"):
        LayerFeatures(checkpoint, layer, open_model).digest()


def test_a_model_without_a_whole_number_of_frames_in_a_second(save: Callable) -> None:
    shape = replace(SHAPE, conv_feature_layers="[(8,10,5)]+[(8,3,2)]*4+[(12,2,2)]+[(12,3,3)]")
    features = LayerFeatures(str(save("odd", build_teacher(shape))), 1, open_model)
    with pytest.raises(LowbitError, match="a frame every 480 samples"):
        _ = features.rate


def labels_command(data: Path, checkpoint: str, *options: str) -> int:
    arguments = ["labels", str(data), "--model", checkpoint, "--splits", "train", "test"]
    return main([*arguments, "--clusters", "7", "--name", "km7", *options])


def test_labels_of_a_layer(data: Path, checkpoint: str, model: Hubert) -> None:
    """As many as the model has frames, each the cluster of its own output; sharded or not."""
    assert labels_command(data, checkpoint, "--layer", "2") == 0
    lines = (data / "test.km7").read_bytes()
    manifest = read_manifest(data / "test.tsv")
    with np.load(data / "kmeans.km7.npz") as arrays:
        centers = arrays["centers"]
    for path, line in zip(manifest.files(), lines.decode().splitlines(), strict=True):
        states, _ = model.representations(torch.from_numpy(read_audio(path))[None])
        distances = torch.cdist(states[2][0], torch.from_numpy(centers))
        assert list(map(int, line.split())) == distances.argmin(1).tolist()
    assert labels_command(data, checkpoint, "--layer", "2", "--shards", "3") == 0
    assert (data / "test.km7").read_bytes() == lines


@pytest.mark.full
def test_processes_load_the_model_of_their_own(data: Path, checkpoint: str) -> None:
    assert labels_command(data, checkpoint, "--layer", "2") == 0
    lines = (data / "test.km7").read_bytes()
    assert labels_command(data, checkpoint, "--layer", "2", "--shards", "2", "--workers", "2") == 0
    assert (data / "test.km7").read_bytes() == lines


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layer", "3"], "has layers 1 to 2"),
        ([], "--model and --layer belong together"),
        (["--layer", "1", "--clusters", "1000"], "too few for 1000 clusters"),
        (["--layer", "1", "--label-rate", "100"], "a rate that divides 50 Hz"),
    ],
)
def test_impossible_labels(
    data: Path,
    checkpoint: str,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert labels_command(data, checkpoint, *options) == 2
    assert message in capsys.readouterr().err
    assert not (data / "km7.shards").exists()
