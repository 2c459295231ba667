"""HuBERT and wav2vec 2.0 of fairseq itself, against what is read of their checkpoints."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model, open_without_weights, read_source
from fairseq_lowbit.models import Hubert

SHAPE = {
    "conv_feature_layers": "[(12,10,5)] + [(12,3,2)] * 2 + [(16,2,2)]",
    "encoder_layers": 3,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": 4,
    "conv_pos": 6,
    "conv_pos_groups": 4,
    "final_dim": 8,
}
LARGE = {"extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True}
SHAPES = {"base": SHAPE, "large": {**SHAPE, **LARGE}}
LENGTHS = [3000, 2217, 1100]
# Of the layer's rms.
TOLERANCE = 1e-4


def hubert(shape: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    labels = Dictionary()
    for label in range(3):
        labels.add_symbol(str(label))
    # The published models were trained with untie_final_proj, of one set of labels.
    config = HubertConfig(_name="hubert", label_rate=50, untie_final_proj=True, **shape)
    task = HubertPretrainingConfig(_name="hubert_pretraining", normalize=True)
    sections = OmegaConf.create({"model": config, "task": task})
    return HubertModel(config, task, [labels]), OmegaConf.to_container(sections, enum_to_str=True)


def wav2vec2(shape: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    config = Wav2Vec2Config(
        _name="wav2vec2", quantize_targets=True, latent_vars=4, latent_groups=2, **shape
    )
    task = {"_name": "audio_pretraining", "normalize": True}
    sections = OmegaConf.create({"model": config, "task": task})
    return Wav2Vec2Model(config), OmegaConf.to_container(sections, enum_to_str=True)


def in_args(config: dict[str, Any]) -> dict[str, Any]:
    """fairseq's checkpoints of before its configurations."""
    model, task = dict(config["model"]), config["task"]
    settings = {"arch": model.pop("_name"), **model, "normalize": task["normalize"]}
    return {"args": argparse.Namespace(**settings), "cfg": None}


def in_cfg(config: dict[str, Any]) -> dict[str, Any]:
    return {"args": None, "cfg": config}


FAMILIES = {"hubert": hubert, "wav2vec2": wav2vec2}
LAYOUTS = {"cfg": in_cfg, "args": in_args}


def layer(model: nn.Module, index: int, waveform: Tensor, mask: Tensor | None) -> Tensor:
    """Output of one layer, from 0, [batch, frames, dim]."""
    if isinstance(model, HubertModel):
        return model.extract_features(waveform, mask, output_layer=index + 1)[0]
    return model.extract_features(waveform, mask, mask=False, layer=index)["x"]


def relative(own: Tensor, other: Tensor) -> float:
    return float((own - other).abs().max() / other.square().mean().sqrt())


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(state: dict[str, Any], **changes: Any) -> Path:
        history = [{"optimizer_name": "FairseqAdam", "num_updates": 20}]
        torch.save({"optimizer_history": history, **state, **changes}, tmp_path / "c.pt")
        return tmp_path / "c.pt"

    return write


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_is_the_sources(
    family: str, shape: str, layout: str, save: Callable[..., Path]
) -> None:
    torch.manual_seed(1)
    source, config = FAMILIES[family](SHAPES[shape])
    source.eval()
    path = save({**LAYOUTS[layout](config), "model": source.state_dict()})
    loaded = open_model(path)
    assert (loaded.updates, loaded.normalize, loaded.has_final_projection) == (20, True, True)
    assert bool(loaded.left_out) == (family == "wav2vec2")
    with torch.inference_mode():
        for length in LENGTHS:
            waveform = torch.randn(1, length)
            layers, mask = loaded.model.hidden_states(waveform)
            assert mask is None
            for index, own in enumerate(layers):
                assert relative(own, layer(source, index, waveform, None)) < TOLERANCE
        padded = torch.randn(3, LENGTHS[0])
        _check_padded(loaded.model, source, padded)
        _check_alone(loaded.model, padded)
    plan, meta = loaded.model.plan, open_without_weights(path)
    assert meta.plan == plan


def _check_padded(model: Hubert, source: nn.Module, waveform: Tensor) -> None:
    """Padded batches, as the source pads them."""
    lengths = torch.tensor(LENGTHS)
    padding = "fairseq_hubert" if isinstance(source, HubertModel) else "fairseq"
    labels = len(getattr(model, "label_embs_concat", ()))
    same = Hubert(replace(model.shape, padding=padding), labels)
    same.load_state_dict(model.state_dict())
    mask = torch.arange(LENGTHS[0]) >= lengths[:, None]
    waveform = waveform.masked_fill(mask, 0)
    layers, _ = same.eval().hidden_states(waveform, lengths)
    for index, own in enumerate(layers):
        other = layer(source, index, waveform, mask)
        for row, frames in enumerate(model.frame_lengths(lengths)):
            assert relative(own[row, :frames], other[row, :frames]) < TOLERANCE


def _check_alone(model: Hubert, waveform: Tensor) -> None:
    """By default an utterance in a batch is what it is alone."""
    lengths = torch.tensor(LENGTHS)
    together, _ = model.hidden_states(waveform, lengths)
    for row, length in enumerate(LENGTHS):
        alone, _ = model.hidden_states(waveform[row : row + 1, :length])
        for own, other in zip(together, alone, strict=True):
            assert relative(own[row : row + 1, : other.shape[1]], other) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "name"), [("hubert", "hubert_ctc"), ("wav2vec2", "wav2vec_ctc")]
)
def test_fine_tuned_models_are_read_without_their_head(
    family: str, name: str, layout: str, save: Callable[..., Path]
) -> None:
    source, config = FAMILIES[family](SHAPE)
    source.eval().remove_pretraining_modules()
    weights = {f"w2v_encoder.w2v_model.{k}": v for k, v in source.state_dict().items()}
    weights |= {
        "w2v_encoder.proj.weight": torch.zeros(32, 24),
        "w2v_encoder.proj.bias": torch.zeros(32),
    }
    inner = LAYOUTS[layout](config)
    tuned = {"_name": name, "w2v_args": inner["args"] or config, "final_dropout": 0.1}
    outer = LAYOUTS[layout]({"model": tuned, "task": {"normalize": True}})
    loaded = open_model(save({**outer, "model": weights}))
    assert loaded.left_out[0] == "head of the fine-tuned model"
    assert not loaded.has_final_projection
    waveform = torch.randn(1, 2000)
    with torch.inference_mode():
        own = loaded.model.hidden_states(waveform)[0][-1]
        assert relative(own, layer(source, 2, waveform, None)) < TOLERANCE


def test_the_other_spelling_of_a_weight_norm(save: Callable[..., Path]) -> None:
    source, config = hubert(SHAPE)
    weights = source.state_dict()
    place = "encoder.pos_conv.0."
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        weights[f"{place}parametrizations.weight.{new}"] = weights.pop(place + old)
    model = open_model(save({**in_cfg(config), "model": weights})).model
    assert torch.equal(model.encoder.pos_conv[0].weight_g, source.state_dict()[place + "weight_g"])


def test_numbers_of_numpy_are_plain_data(save: Callable[..., Path]) -> None:
    source, config = hubert(SHAPE)
    extra = {"best": np.float64(1.5), "epoch": np.int64(3), "rate": np.float32(0.1)}
    path = save({**in_cfg(config), "model": source.state_dict(), "extra_state": extra})
    assert open_model(path).updates == 20


def test_unknown_weights_are_named(save: Callable[..., Path]) -> None:
    source, config = hubert(SHAPE)
    weights = {**source.state_dict(), "adapter.weight": torch.zeros(2)}
    with pytest.raises(
        LowbitError, match=r"c\.pt holds tensors that have no place.*adapter\.weight"
    ):
        open_model(save({**in_cfg(config), "model": weights}))
    weights = {**source.state_dict(), "encoder.layers.0.adapter.weight": torch.zeros(2)}
    with pytest.raises(LowbitError, match=r"layers\.0\.adapter\.weight is unknown to the model"):
        open_model(save({**in_cfg(config), "model": weights}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_name": "data2vec_audio"}, "holds a data2vec_audio, not a HuBERT"),
        ({"layer_type": "conformer"}, "c.pt: model.layer_type 'conformer' is not supported"),
        ({"target_glu": True}, "model.target_glu True is not supported"),
        ({"pos_conv_depth": 5}, "c.pt: model.pos_conv_depth 5 is not supported"),
        ({"activation_fn": "relu"}, "c.pt: model.activation_fn 'relu' is not supported"),
    ],
)
def test_families_and_variants_that_are_not_supported(
    save: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    source, config = hubert(SHAPE)
    config["model"].update(change)
    with pytest.raises(LowbitError, match=message):
        read_source(save({**in_cfg(config), "model": source.state_dict()}))


def test_a_fine_tuned_model_that_forgot_what_it_was(save: Callable[..., Path]) -> None:
    state = {"model": {"w2v_encoder.proj.bias": torch.zeros(2)}}
    for kept in (None, {"task": {}}):
        config = {"model": {"_name": "hubert_ctc", "w2v_args": kept}, "task": {}}
        with pytest.raises(LowbitError, match="w2v_args"):
            open_model(save({**state, **in_cfg(config)}))
