"""Hugging Face directories with random weights, read and compared with transformers' own models."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model, open_without_weights
from fairseq_lowbit.interop.huggingface_directory import (
    download,
    find,
    is_model_directory,
    read,
)
from fairseq_lowbit.interop.huggingface_format import architecture
from fairseq_lowbit.models import Hubert

transformers = pytest.importorskip("transformers")

MODELS = ("Hubert", "Wav2Vec2", "WavLM")
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 12),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 7,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "num_codevectors_per_group": 4,
}
WAVLM = {"num_buckets": 16, "max_bucket_distance": 30}
KINDS = {
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
EVERY_MODEL = pytest.mark.parametrize(
    "name, kind", [(name, kind) for name in MODELS for kind in KINDS]
)
LENGTHS = (1500, 941, 333)

pytestmark = pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask.*:UserWarning")


def build(name: str, kind: str = "base", suffix: str = "Model", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    known = {**SHAPE, **KINDS[kind], **(WAVLM if name == "WavLM" else {}), **settings}
    config = getattr(transformers, f"{name}Config")(**known)
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_safetensors(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


def write_shards(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").is_file()


def write_pickled(model: nn.Module, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def old_names(model: nn.Module) -> dict[str, Tensor]:
    spelling = {"parametrizations.weight.original0": "weight_g"}
    spelling["parametrizations.weight.original1"] = "weight_v"
    weights = {}
    for name, tensor in model.state_dict().items():
        for new, old in spelling.items():
            name = name.replace(new, old)
        weights[name] = tensor.contiguous()
    assert any(name.endswith("weight_g") for name in weights)
    return weights


def write_old_names(model: nn.Module, folder: Path) -> None:
    model.config.save_pretrained(folder)
    save_file(old_names(model), folder / "model.safetensors")


def write_old_pickled_shards(model: nn.Module, folder: Path) -> None:
    """As of years ago: the old names, in parts, in a file format that cannot be mapped."""
    model.config.save_pretrained(folder)
    weights, parts = old_names(model), {}
    for part in range(2):
        file = f"pytorch_model-{part}.bin"
        chosen = dict(list(weights.items())[part::2])
        torch.save(chosen, folder / file, _use_new_zipfile_serialization=False)
        parts |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": parts}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WRITERS = (
    write_safetensors,
    write_shards,
    write_pickled,
    write_old_names,
    write_old_pickled_shards,
)


def opened(folder: Path, padding: str = "valid") -> Hubert:
    model = open_model(folder).model
    if padding == "valid":
        return model
    twin = Hubert(replace(model.shape, padding=padding)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def waveform() -> Tensor:
    return torch.randn(len(LENGTHS), LENGTHS[0], generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_states(
    model: Hubert, audio: Tensor, lengths: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    frames = model.extract(audio, lengths)
    final, outputs = model.encode(frames)
    return [model.begin(frames), *outputs, final], frames.padding_mask


@torch.no_grad()
def their_states(model: nn.Module, audio: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The input of the first layer, the outputs of all, and what the model ends in."""
    result = model(audio, attention_mask=mask, output_hidden_states=True)
    return [*result.hidden_states, result.last_hidden_state]


def assert_equal_states(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for own, their in zip(ours, theirs, strict=True):
        assert own.shape == their.shape
        assert (own - their).abs().max() <= tolerance * their.square().mean().sqrt()


@EVERY_MODEL
@pytest.mark.parametrize("write", WRITERS)
def test_every_layer_is_that_of_transformers(
    name: str, kind: str, write: Callable, tmp_path: Path
) -> None:
    theirs = build(name, kind)
    write(theirs, tmp_path)
    ours = opened(tmp_path)
    for samples in LENGTHS:
        audio = waveform()[:1, :samples]
        states, mask = our_states(ours, audio)
        assert mask is None
        assert_equal_states(states, their_states(theirs, audio))


@EVERY_MODEL
def test_a_padded_batch(name: str, kind: str, tmp_path: Path) -> None:
    theirs, lengths = build(name, kind), torch.tensor(LENGTHS)
    theirs.save_pretrained(tmp_path)
    mask = torch.arange(LENGTHS[0]) < lengths[:, None]
    expected = their_states(theirs, waveform() * mask, mask.long())
    states, padding = our_states(opened(tmp_path, "fairseq"), waveform() * mask, lengths)
    valid = ~padding
    assert_equal_states([x[valid] for x in states], [x[valid] for x in expected])

    states, padding = our_states(opened(tmp_path), waveform(), lengths)
    for row, samples in enumerate(LENGTHS):
        alone = their_states(theirs, waveform()[row : row + 1, :samples])
        assert_equal_states([x[row][~padding[row]] for x in states], [x[0] for x in alone])


def test_wavlms_original_checkpoints(tmp_path: Path) -> None:
    """Their form: fairseq's, with one flat table of settings."""
    theirs = build("WavLM")
    theirs.save_pretrained(tmp_path)
    source = read(tmp_path)
    path = tmp_path / "WavLM-Base.pt"
    torch.save({"cfg": {**vars(source.shape), "normalize": True}, "model": source.weights}, path)
    loaded = open_model(path)
    assert loaded.normalize
    audio = waveform()[:1]
    assert_equal_states(our_states(loaded.model, audio)[0], their_states(theirs, audio))


def test_far_distances_are_in_the_buckets_of_wavlm(tmp_path: Path) -> None:
    """At the published numbers, where a row is cut off from a rounded logarithm."""
    theirs = build("WavLM", num_buckets=320, max_bucket_distance=800)
    theirs.save_pretrained(tmp_path)
    attention = opened(tmp_path).encoder.layers[0].self_attn
    distances = torch.arange(-1000, 1001)
    expected = theirs.encoder.layers[0].attention._relative_positions_bucket(distances)
    assert torch.equal(attention.positions.rows(distances), expected)


@pytest.mark.full
@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("Hubert", "base", {}),
        ("WavLM", "base", {}),
        ("Wav2Vec2", "large", {"hidden_size": 1024, "num_attention_heads": 16}),
        ("WavLM", "large", {"hidden_size": 1024, "num_attention_heads": 16}),
    ],
)
def test_at_full_width(name: str, kind: str, settings: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**KINDS[kind], **settings)
    theirs = getattr(transformers, f"{name}Model")(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = opened(tmp_path)
    for samples in (16_000, 23_457):
        audio = torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))
        assert_equal_states(our_states(ours, audio)[0], their_states(theirs, audio))


@pytest.mark.parametrize(
    "name, suffix, settings, left_out",
    [
        ("Hubert", "ForCTC", {}, ["lm_head (CTC head)"]),
        ("WavLM", "ForCTC", {}, ["lm_head (CTC head)"]),
        ("Wav2Vec2", "ForPreTraining", {}, ["quantizer (of pre-training)"]),
        (
            "Hubert",
            "ForSequenceClassification",
            {"use_weighted_layer_sum": True},
            [
                "layer_weights (of a sum of layers)",
                "projector and classifier (classification head)",
            ],
        ),
        (
            "WavLM",
            "ForXVector",
            {},
            [
                "objective (x-vector head)",
                "projector and classifier (classification head)",
                "tdnn (x-vector head)",
            ],
        ),
    ],
)
def test_heads_are_left_out_and_named(
    name: str, suffix: str, settings: dict, left_out: list[str], tmp_path: Path
) -> None:
    theirs = build(name, suffix=suffix, **settings)
    theirs.save_pretrained(tmp_path)
    assert sorted(read(tmp_path).left_out) == left_out
    audio = waveform()[:1]
    states = their_states(getattr(theirs, name.lower()), audio)
    assert_equal_states(our_states(opened(tmp_path), audio)[0], states)


def test_settings(tmp_path: Path) -> None:
    config = build("WavLM", "large", hidden_dropout=0.3, layerdrop=0.2).config.to_dict()
    shape = architecture(config, tmp_path)
    assert (shape.dropout, shape.encoder_layerdrop) == (0.3, 0.2)
    assert (shape.num_buckets, shape.max_distance, shape.gru_rel_pos) == (16, 30, True)
    assert (shape.layer_norm_first, shape.extractor_mode) == (True, "layer_norm")


def test_what_a_short_config_leaves_out_is_hugging_faces_default(tmp_path: Path) -> None:
    for name in MODELS:
        full = getattr(transformers, f"{name}Config")().to_dict()
        full = json.loads(json.dumps(full))
        short = {"model_type": full["model_type"]}
        assert architecture(short, tmp_path) == architecture(full, tmp_path)


@pytest.mark.parametrize("kind, expected", [("base", False), ("large", True)])
def test_normalization_is_the_preprocessors(kind: str, expected: bool, tmp_path: Path) -> None:
    build("Hubert", kind).save_pretrained(tmp_path)
    assert read(tmp_path).normalize is expected  # what the published ones of this kind do
    for normalize in (True, False):
        transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(tmp_path)
        assert read(tmp_path).normalize is normalize
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    settings = {"feature_extractor": {**settings, "do_normalize": not expected}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    assert read(tmp_path).normalize is not expected


def test_without_a_mask_embedding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = build("Hubert", mask_time_prob=0.0)
    theirs.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        model = opened(tmp_path)
    assert "masked_spec_embed" in caplog.text
    assert not model.mask_emb.any()


def test_half_precision_weights_become_float(tmp_path: Path) -> None:
    build("Hubert").half().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read(tmp_path).weights.values()} == {torch.float32}


def test_a_projection_of_the_same_width_is_kept(tmp_path: Path) -> None:
    theirs = build("Hubert", conv_dim=(8, 8, 16))
    theirs.save_pretrained(tmp_path)
    audio = waveform()[:1]
    assert_equal_states(our_states(opened(tmp_path), audio)[0], their_states(theirs, audio))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "data2vec-audio"}, "'data2vec-audio'; supported are hubert, wav2vec2"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; only 'gelu' is"),
        ({"feat_extract_activation": "gelu_new"}, "feat_extract_activation 'gelu_new'"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm True"),
        ({"feat_proj_layer_norm": False}, "feat_proj_layer_norm False"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
        ({"add_adapter": True}, "add_adapter True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim 16"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm 'batch'; supported are group, layer"),
        ({"hidden_size": "16"}, "hidden_size '16' is no value like 768"),
        ({"conv_kernel": [10, 3]}, "conv_dim, conv_kernel, conv_stride need one value per layer"),
    ],
)
def test_what_is_not_built_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    build("Hubert").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", settings)
    with pytest.raises(LowbitError, match=message) as raised:
        read(tmp_path)
    assert "config.json" in str(raised.value)


def change_json(path: Path, changes: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("content, message", [("{", "as JSON"), ("[]", "a JSON list")])
def test_settings_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LowbitError, match=f"config.json.*{message}"):
        read(tmp_path)


def test_another_sampling_rate_is_refused(tmp_path: Path) -> None:
    build("Hubert").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 8000}))
    with pytest.raises(LowbitError, match="8000 Hz; only 16000"):
        read(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: {**w, "encoder.surprise": torch.zeros(2)}, r"no place.*encoder\.surprise"),
        (
            lambda w: {k: v for k, v in w.items() if "2.attention.k_proj" not in k},
            r"lacks weights.*encoder\.layers\.2\.attention\.k_proj\.(weight|bias)",
        ),
        (
            lambda w: {**w, "encoder.layers.0.attention.rel_attn_embed.weight": torch.zeros(2, 2)},
            r"relative_attention_bias\.weight is unknown",
        ),
        (
            lambda w: {**w, "masked_spec_embed": torch.zeros(16, dtype=torch.int8)},
            "masked_spec_embed is of type torch.int8",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable[[dict], dict], message: str, tmp_path: Path
) -> None:
    model = build("Hubert")
    model.config.save_pretrained(tmp_path)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(change(weights), tmp_path / "model.safetensors")
    with pytest.raises(LowbitError, match=message):
        opened(tmp_path)


def test_weights_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    write_shards(build("Hubert"), tmp_path)
    assert is_model_directory(tmp_path)
    part = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(LowbitError, match=f"{part.name} is truncated"):
        read(tmp_path)
    part.unlink()
    with pytest.raises(LowbitError, match=f"{part.name}.*does not exist"):
        read(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(LowbitError, match="holds no weights: wanted is model.safetensors"):
        read(tmp_path)
    (tmp_path / "config.json").unlink()
    assert not is_model_directory(tmp_path)


def test_a_pickle_that_is_more_than_data_is_refused(tmp_path: Path) -> None:
    model = build("Hubert")
    model.config.save_pretrained(tmp_path)
    torch.save({**model.state_dict(), "hook": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LowbitError, match="pytorch_model.bin cannot be read safely.*print"):
        read(tmp_path)
    torch.save(list(model.state_dict()), tmp_path / "pytorch_model.bin")
    with pytest.raises(LowbitError, match="pytorch_model.bin holds no table of weights"):
        read(tmp_path)


class TestDownload:
    """What the hub's client is asked for, and what its refusals become."""

    hub = pytest.importorskip("huggingface_hub")

    @pytest.fixture
    def fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Patterns of the files that were asked for; the hub's model is what is in ``tmp_path``."""
        patterns: list[str] = []

        def fetch(name: str, allow_patterns: list[str]) -> str:
            patterns.extend(allow_patterns)
            return str(tmp_path)

        monkeypatch.setattr(self.hub, "snapshot_download", fetch)
        return patterns

    def test_of_the_weights_one_format_is_fetched(self, fetched: list[str], tmp_path: Path) -> None:
        build("WavLM").save_pretrained(tmp_path)
        assert open_without_weights("someone/model").shape.gru_rel_pos
        assert any("safetensors" in pattern for pattern in fetched)
        assert not any(".bin" in pattern for pattern in fetched)
        fetched.clear()
        (tmp_path / "model.safetensors").unlink()
        assert download("someone/model") == tmp_path
        assert any(".bin" in pattern for pattern in fetched)

    def test_another_family_is_refused_before_its_weights_are_fetched(
        self, fetched: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"}))
        with pytest.raises(LowbitError, match="model_type 'whisper'; supported are hubert"):
            open_model("someone/model")
        assert not any("model" in pattern for pattern in fetched)

    def test_paths_are_no_ids(self, fetched: list[str], tmp_path: Path) -> None:
        for path in ("runs/a.pt", "a/b.bin", "a.safetensors", "../b", "a/b/c", "hubert", tmp_path):
            assert find(path) is None
        build("Hubert").config.save_pretrained(tmp_path)
        assert find(tmp_path) == tmp_path
        assert not fetched

    def test_why_an_id_cannot_be_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        def fetch(name: str, allow_patterns: list[str]) -> str:
            raise LocalEntryNotFoundError("\nno connection\nmore")

        monkeypatch.setattr(self.hub, "snapshot_download", fetch)
        with pytest.raises(LowbitError, match=r"someone/model.*cannot be fetched.*no connection\)"):
            download("someone/model")

    def test_a_name_that_is_no_id(self) -> None:
        with pytest.raises(LowbitError, match=r"a//b is no file or folder.*Give a path that exis"):
            download("a//b")

    def test_without_the_hubs_client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(LowbitError, match="install huggingface_hub"):
            download("someone/model")
