"""Our upstream in s3prl: what s3prl itself checks of one, and that the model stays what it is."""

import importlib
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import Architecture, Hubert
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from tests.shapes import TINY

pytest.importorskip("s3prl")

# Ours comes first: s3prl alone may not be importable.
from fairseq_lowbit.interop.s3prl import LowbitUpstream, compat, lowbit

# isort: split
from s3prl.nn import Featurizer, S3PRLUpstream
from s3prl.util.pseudo_data import get_pseudo_wavs

RATE = 16000
LAYERS = 3
# 50 frames a second; it would drop half of its layers, if it were trained.
FASTCONV = replace(
    TINY,
    conv_feature_layers="[(8,10,5),(8,3,2),(8,1,1),(8,3,2),(12,3,2),(12,1,1),(12,3,2)]+[(12,2,2)]*2",
    encoder_layers=LAYERS,
    encoder_layerdrop=0.5,
)
LARGE = replace(
    FASTCONV, extractor_mode="layer_norm", conv_bias=True, layer_norm_first=True, dropout=0.5
)
MODELS = {
    "float": (FASTCONV, "float", False),
    "bitla_w1a1": (FASTCONV, "bitla_w1a1", False),
    "large": (LARGE, "float", True),
}


def save(path: Path, shape: Architecture, precision: str, normalize: bool) -> Path:
    torch.manual_seed(0)
    model = Hubert(shape, precision=Precision(precision))
    calibrate(model, [torch.randn(2, RATE)], model.final_output)
    config = {**asdict(shape), "_name": "lowbit_hubert"}
    if precision != "float":
        config["precision"] = model.plan.precision.to_mapping()
    state = {
        "cfg": {"model": config, "task": {"normalize": normalize}},
        "model": model.state_dict(),
    }
    torch.save(state, path)
    return path


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoints") / f"{request.param}.pt"
    return str(save(path, *MODELS[request.param]))


@pytest.fixture
def upstream(checkpoint: str) -> S3PRLUpstream:
    return S3PRLUpstream("lowbit", path_or_url=checkpoint)


@pytest.fixture
def plain(tmp_path: Path) -> LowbitUpstream:
    return lowbit(str(save(tmp_path / "plain.pt", *MODELS["float"])))


def extract(upstream: S3PRLUpstream, **audio: float) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and their lengths, of s3prl's own test audio."""
    return upstream(*get_pseudo_wavs(padded=True, **audio))


def test_s3prl_knows_its_properties(upstream: S3PRLUpstream) -> None:
    assert "lowbit" in S3PRLUpstream.available_names()
    assert upstream.num_layers == LAYERS + 1
    assert upstream.hidden_sizes == [TINY.encoder_embed_dim] * (LAYERS + 1)
    assert upstream.downsample_rates == [320] * (LAYERS + 1)


def test_hidden_states_are_deterministic_in_eval_mode(upstream: S3PRLUpstream) -> None:
    upstream.eval()
    with torch.no_grad():
        first, again = extract(upstream)[0], extract(upstream)[0]
    assert [state.shape for state in first] == [first[0].shape] * (LAYERS + 1)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("training", [False, True])
def test_other_audio_and_modes_give_as_many_layers(upstream: S3PRLUpstream, training: bool) -> None:
    upstream.train(training)
    with torch.no_grad():
        for seed in range(1, 4):
            assert len(extract(upstream, seed=seed)[0]) == LAYERS + 1


def test_training_mode_changes_nothing(upstream: S3PRLUpstream) -> None:
    with torch.no_grad():
        evaluated = extract(upstream.eval())[0]
        trained = extract(upstream.train())[0]
    assert all(map(torch.equal, evaluated, trained))


@pytest.mark.parametrize(
    "audio",
    [
        {"n": 1, "min_secs": 0.05, "max_secs": 0.05},
        {"n": 2, "min_secs": 0.05, "max_secs": 0.05},
        {"n": 3, "min_secs": 0.05, "max_secs": 1},
    ],
    ids=["one short", "two short", "short to long"],
)
def test_gradients_flow_from_very_short_clips(checkpoint: str, audio: dict[str, float]) -> None:
    with torch.autograd.set_detect_anomaly(True):
        upstream = S3PRLUpstream("lowbit", path_or_url=checkpoint)
        # The sum of a layer-normalized state is the same whatever the model computes.
        sum(state.square().sum() for state in extract(upstream, **audio)[0]).backward()
    model = upstream.upstream.model
    reached = [*model.feature_extractor.parameters(), *model.encoder.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reached)
    assert model.encoder.layers[0].fc1.weight.grad.any()


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("normalize", [False, True])
def test_featurizer_sums_the_layers(
    upstream: S3PRLUpstream, layers: list[int] | None, normalize: bool
) -> None:
    featurizer = Featurizer(upstream, layer_selections=layers, normalize=normalize)
    waveforms, samples = get_pseudo_wavs(padded=True)
    summed, frames = featurizer(*upstream(waveforms, samples))
    assert torch.equal(frames, (samples - 1) // 320 + 1)
    assert summed.shape == (2, int(frames.max()), TINY.encoder_embed_dim)
    assert (featurizer.output_size, featurizer.downsample_rate) == (TINY.encoder_embed_dim, 320)


def test_the_batch_does_not_change_an_utterance(upstream: S3PRLUpstream) -> None:
    waveforms, samples = get_pseudo_wavs(n=3, padded=True)
    with torch.no_grad():
        together, lengths = upstream(waveforms, samples)
        for row, size in enumerate(samples):
            alone, (frames, *_) = upstream(waveforms[row : row + 1, :size], size[None])
            for batched, single in zip(together, alone, strict=True):
                assert lengths[0][row] == frames
                torch.testing.assert_close(batched[row, :frames], single[0], rtol=0, atol=1e-4)


def test_hidden_states_are_those_of_the_model(checkpoint: str) -> None:
    loaded = open_model(checkpoint)
    # Loud, and away from zero: the model has to see it normalized, if it was trained so.
    waveform = 5 + 3 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    seen = F.layer_norm(waveform, waveform.shape) if loaded.normalize else waveform
    with torch.no_grad():
        expected, _ = loaded.model.representations(seen[None])
        found = lowbit(checkpoint)([waveform])
    assert len(found["hidden_states"]) == len(expected)
    for state, wanted in zip(found["hidden_states"], expected, strict=True):
        torch.testing.assert_close(state, wanted, rtol=0, atol=1e-5)
    assert torch.equal(found["last_hidden_state"], found["hidden_states"][-1])


@pytest.mark.parametrize("samples", [1, 399])
def test_less_than_a_frame_is_filled_up(plain: LowbitUpstream, samples: int) -> None:
    """s3prl fills up a batch, not an utterance in it."""
    short, long = torch.randn(samples), torch.randn(RATE)
    filled = F.pad(short, (0, plain.shortest - samples))
    with torch.no_grad():
        (state, _) = plain([short, long])["hidden_states"][-1]
        expected = plain([filled])["hidden_states"][-1][0]
    assert expected.shape[0] == 1
    torch.testing.assert_close(state, expected.expand_as(state), rtol=0, atol=1e-5)


def test_the_waveforms_come_to_the_model(plain: LowbitUpstream) -> None:
    plain.to(dtype=torch.float64)
    states = plain([torch.randn(RATE)])["hidden_states"]
    assert {state.dtype for state in states} == {torch.float64}


def test_a_checkpoint_is_needed(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"needs a checkpoint: -k CKPT"):
        S3PRLUpstream("lowbit")
    with pytest.raises(LowbitError, match=r"nowhere\.pt"):
        S3PRLUpstream("lowbit", path_or_url=str(tmp_path / "nowhere.pt"))
    with pytest.raises(LowbitError, match=r"takes no configuration \(-g model\.yaml\)"):
        lowbit("checkpoint.pt", model_config="model.yaml")


def test_an_import_leaves_no_stand_in_behind() -> None:
    """Neither among the modules nor in what transformers remembers of them."""
    program = (
        "import sys\n"
        "import fairseq_lowbit.interop.s3prl as ours\n"
        "from importlib.util import find_spec\n"
        "from transformers.utils import is_torchaudio_available\n"
        "assert not [m for m in sys.modules.values() if isinstance(m, ours.compat.StandIn)]\n"
        "assert is_torchaudio_available() == (find_spec('torchaudio') is not None)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_installed_torchaudio_that_reads_audio_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ModuleType("torchaudio")
    installed.sox_effects = ModuleType("torchaudio.sox_effects")
    monkeypatch.setitem(sys.modules, "torchaudio", installed)
    with compat.stand_ins():
        import torchaudio

        assert torchaudio is installed


def test_what_an_installed_torchaudio_lost_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from version 2.9 on."""
    installed = ModuleType("torchaudio")
    installed.transforms = ModuleType("torchaudio.transforms")
    monkeypatch.setitem(sys.modules, "torchaudio", installed)
    with compat.stand_ins():
        import torchaudio
        from torchaudio.sox_effects import apply_effects_file

        assert torchaudio.transforms is installed.transforms
        assert torchaudio.load is compat.load
        assert apply_effects_file is compat.apply_effects_file
    assert sys.modules["torchaudio"] is installed
    assert not hasattr(installed, "load")


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_what_a_missing_torchaudio_had_is_refused_when_it_is_called(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OSError: as of its CUDA build beside a CPU torch."""
    (tmp_path / "torchaudio.py").write_text(f"raise {error}('libtorch_cuda.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    with compat.stand_ins():
        from torchaudio.compliance import kaldi
        from torchaudio.transforms import Resample

        waveform = torch.zeros(1, 400)
        assert Resample(RATE, RATE)(waveform) is waveform
        with pytest.raises(LowbitError, match="44100 Hz to 16000 Hz, which needs torchaudio"):
            Resample(44100, RATE)
        with pytest.raises(
            LowbitError, match=r"torchaudio\.compliance\.kaldi\.fbank, which is not"
        ):
            kaldi.fbank(waveform)


def test_every_loader_of_the_task_ctc_has_the_workers_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one takes the number out of the configuration, and s3prl's default is 12."""
    from fairseq_lowbit.interop.s3prl.downstream import keep_workers

    with compat.stand_ins():
        data = importlib.import_module("s3prl.downstream.ctc.data")
    monkeypatch.setattr(data, "create_dataset", lambda *args, **corpus: ([0], 1))
    monkeypatch.setattr(data, "load_dataset", data.load_dataset)
    keep_workers()
    corpus = {"num_workers": 2}
    assert [data.load_dataset("dev", None, corpus).num_workers for _ in "ab"] == [2, 2]


def test_a_missing_module_of_a_task_is_named() -> None:
    with (
        pytest.raises(LowbitError, match="s3prl needs the module editdistance, which"),
        compat.missing_modules_named(),
    ):
        raise ModuleNotFoundError("No module named 'editdistance'", name="editdistance")


def test_audio_is_read_as_torchaudio_did(tmp_path: Path) -> None:
    stereo = 0.1 * torch.randn(100, 2)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, stereo.numpy(), RATE, subtype="FLOAT")
    waveform, rate = compat.load(path)
    assert rate == RATE
    torch.testing.assert_close(waveform, stereo.T)
    effects = [["channels", "1"], ["rate", "16000"], ["gain", "-20"]]
    waveform, rate = compat.apply_effects_file(path, effects)
    assert rate == RATE
    torch.testing.assert_close(waveform, 0.1 * stereo.mean(dim=1)[None])


@pytest.mark.parametrize(
    "effect, message",
    [
        (["rate", "8000"], r"a\.wav has 16000 Hz where 8000 Hz are needed"),
        (["silence", "1", "0.1"], r"the effect of SoX silence 1 0\.1, which needs torchaudio"),
        (["channels", "2"], r"the effect of SoX channels 2"),
    ],
)
def test_effects_that_need_torchaudio_are_refused(
    effect: list[str], message: str, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "a.wav", torch.zeros(100).numpy(), RATE)
    with pytest.raises(LowbitError, match=message):
        compat.apply_effects_file(tmp_path / "a.wav", [effect])
