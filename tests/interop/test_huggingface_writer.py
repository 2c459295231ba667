"""Directories written for transformers, opened by transformers itself."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import huggingface_writer, open_model, write_model
from fairseq_lowbit.interop.exporting import FORMATS
from fairseq_lowbit.interop.huggingface_writer import export, obstacle
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel
from fairseq_lowbit.models.architecture import FASTCONV
from fairseq_lowbit.nn import SelfAttention, calibrate, quantizers
from fairseq_lowbit.nn.attention import OPERANDS
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.precision import Precision, Rule
from tests.shapes import TINY

transformers = pytest.importorskip("transformers")

LARGE = replace(
    TINY, extractor_mode="layer_norm", layer_norm_first=True, conv_bias=True, conv_pos=7
)
THIN_FASTCONV = FASTCONV.replace("512", "12").replace("256", "8").replace("128", "8")
SHAPES = {
    "base": TINY,
    "large": LARGE,
    "fastconv": replace(TINY, conv_feature_layers=THIN_FASTCONV.replace("64", "8")),
    "without a projection": replace(TINY, conv_feature_layers="[(8,10,5),(16,3,2)]"),
    "wavlm": replace(
        TINY, relative_position_embedding=True, gru_rel_pos=True, num_buckets=16, max_distance=30
    ),
}
PRECISIONS = {
    "everything in two bits": Precision("bitla_w2a2", [Rule("*", "elastic", 2, 2)]),
    "squashed": Precision("sqwq_w2", [Rule("encoder.pos_conv.0", "squashed", 2)]),
    "one bit": Precision("bitl_w1a1"),
}


def build(shape: Architecture = TINY, precision: Precision | None = None) -> Hubert:
    torch.manual_seed(0)
    model = Hubert(shape, classes=5, precision=precision)
    for name, parameter in model.named_parameters():
        if "_quantizer." not in name:
            nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    calibrate(model, [waveform()], model.final_output)
    return model.eval()


def loaded(model: Hubert, normalize: bool = False) -> LoadedModel:
    return LoadedModel(model, "runs/some/checkpoint.pt", 10, True, normalize)


def waveform() -> Tensor:
    return torch.randn(1, 1600, generator=torch.Generator().manual_seed(1))


def with_float_activations(model: Hubert) -> Hubert:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Operator | SelfAttention):
            module.input_quantizer = None
        if isinstance(module, SelfAttention):
            for operand in OPERANDS:
                setattr(module, f"{operand}_quantizer", None)
    assert all(name.endswith("weight_quantizer") for name, _ in quantizers(twin))
    return twin


@torch.no_grad()
def states(model: Hubert) -> list[Tensor]:
    return model.representations(waveform())[0]


def assert_same_in_transformers(model: Hubert, folder: Path) -> None:
    kind = "WavLMModel" if model.shape.relative_position_embedding else "HubertModel"
    theirs, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        result = theirs.eval()(waveform(), output_hidden_states=True)
    # Theirs keeps the last layer's output from before the final norm of a pre-norm model.
    found = [*result.hidden_states[:-1], result.last_hidden_state]
    for own, their in zip(states(model), found, strict=True):
        assert (their - own).abs().max() <= 5e-6 * own.square().mean().sqrt()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_float_model_opens_with_every_key_and_equal_outputs(
    shape: Architecture, tmp_path: Path
) -> None:
    model = build(shape)
    export(loaded(model), tmp_path / "out")
    assert_same_in_transformers(model, tmp_path / "out")


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("shape", [TINY, SHAPES["wavlm"]], ids=["hubert", "wavlm"])
def test_a_quantized_model_is_that_with_float_activations(
    shape: Architecture, precision: Precision, tmp_path: Path
) -> None:
    model = build(shape, precision)
    export(loaded(model), tmp_path)
    reference = with_float_activations(model)
    assert_same_in_transformers(reference, tmp_path)
    float_model = build(shape)
    assert not torch.allclose(states(float_model)[-1], states(reference)[-1], atol=1e-2)


def test_taps_of_the_positional_convolution_that_are_all_zero(tmp_path: Path) -> None:
    model = build(TINY, Precision("float", [Rule("encoder.pos_conv.0", "elastic", 2, 16)]))
    position = model.encoder.pos_conv[0]
    with torch.no_grad():
        position.weight_g[..., 2] = 1e-6
        position.weight_g[..., 3] = -1e-6
        assert not position.weight_quantizer(position.stored_weight())[..., 2:4].any()
    export(loaded(model), tmp_path)
    assert_same_in_transformers(model, tmp_path)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_round_trip_gives_the_same_hidden_states(shape: Architecture, tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", build(shape), loaded(build(shape), True), tmp_path)
    first = open_model(tmp_path / "model.safetensors")
    FORMATS["hf"].export(first, tmp_path / "out")
    second = open_model(tmp_path / "out")
    assert second.normalize
    assert torch.equal(second.model.mask_emb, first.model.mask_emb)
    for before, after in zip(states(first.model), states(second.model), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_preprocessor_prepares_as_training_did(normalize: bool, tmp_path: Path) -> None:
    export(loaded(build(), normalize), tmp_path)
    prepare = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    audio = 3 * waveform()[0] + 1
    found = prepare(audio.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    centered = (audio - audio.mean()) / audio.std(correction=0)
    torch.testing.assert_close(found, centered if normalize else audio, rtol=1e-4, atol=1e-4)


def test_the_card_tells_what_it_is(tmp_path: Path) -> None:
    export(loaded(build()), tmp_path / "float")
    export(loaded(build(LARGE, Precision("bitla_w2a2"))), tmp_path / "quantized")
    plain, quantized = (
        (tmp_path / name / "README.md").read_text() for name in ("float", "quantized")
    )
    assert "The float model" in plain
    assert "weight-quantized view" not in plain
    assert "weight-quantized view" in quantized
    assert "not the deployed model" in quantized
    assert "| precision | bitla_w2a2 |" in quantized
    assert "HubertModel.from_pretrained" in quantized


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(loaded(build()), out)
    (out / "stale").touch()
    export(loaded(build(LARGE)), out)
    assert_same_in_transformers(build(LARGE), out)
    assert not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    config = json.loads((out / "config.json").read_text())
    del config["exported_by"]
    (out / "config.json").write_text(json.dumps(config))
    for taken in (out, out / "config.json"):
        with pytest.raises(LowbitError, match=f"{taken} exists and is no earlier export"):
            export(loaded(build()), taken)
    assert json.loads((out / "config.json").read_text()) == config


def interrupted_at_the_last_step(rename: Callable) -> Callable:
    """When the old folder is out of the way, and the new one not yet in its place."""

    def rename_unless_new(path: Path, target: Path) -> Path:
        if path.suffix == ".new":
            raise KeyboardInterrupt
        return rename(path, target)

    return rename_unless_new


def test_an_interrupted_export_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(loaded(build()), out)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_writer, "_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(loaded(build(LARGE)), out)
    assert_same_in_transformers(build(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    monkeypatch.undo()
    monkeypatch.setattr(Path, "rename", interrupted_at_the_last_step(Path.rename))
    with pytest.raises(KeyboardInterrupt):
        export(loaded(build(LARGE)), out)
    assert_same_in_transformers(build(), out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LowbitError, match=f"cannot write {out}: No space left"):
        export(loaded(build(LARGE)), out)


def test_what_cannot_be_written() -> None:
    assert obstacle(build()) == ""
    assert "never calibrated" in obstacle(Hubert(TINY, precision=Precision("bitl_w1a1")))
    ungated = Hubert(replace(SHAPES["wavlm"], gru_rel_pos=False))
    assert "not gated" in obstacle(ungated)
    with pytest.raises(LowbitError, match="checkpoint.pt cannot be written .* not gated"):
        FORMATS["hf"].export(loaded(ungated), Path("out"))
