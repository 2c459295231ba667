"""Hugging Face's names for a HuBERT, wav2vec 2.0 or WavLM: of its settings and of its weights.

Each table is read in both directions, by the reader and by the writer of directories.
"""

import re
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop.source import LeaveOut, Move
from fairseq_lowbit.models import Architecture, parse_conv_layers

MODEL_TYPES = ("hubert", "wav2vec2", "wavlm")

# Their setting, ours, and their default, which a config.json may leave out.
_FIELDS = (
    ("hidden_size", "encoder_embed_dim", 768),
    ("num_hidden_layers", "encoder_layers", 12),
    ("num_attention_heads", "encoder_attention_heads", 12),
    ("intermediate_size", "encoder_ffn_embed_dim", 3072),
    ("do_stable_layer_norm", "layer_norm_first", False),
    ("conv_bias", "conv_bias", False),
    ("num_conv_pos_embeddings", "conv_pos", 128),
    ("num_conv_pos_embedding_groups", "conv_pos_groups", 16),
    ("hidden_dropout", "dropout", 0.1),
    ("attention_dropout", "attention_dropout", 0.1),
    ("activation_dropout", "activation_dropout", 0.1),
    ("feat_proj_dropout", "dropout_input", 0.0),
    ("layerdrop", "encoder_layerdrop", 0.1),
)
_WAVLM_FIELDS = (("num_buckets", "num_buckets", 320), ("max_bucket_distance", "max_distance", 800))
_CONV_FIELDS = {
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
}
_NORMS = {"group": "default", "layer": "layer_norm"}
# Settings that change the model, and their one value that is built here.
_NOT_BUILT = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "add_adapter": False,
    "adapter_attn_dim": None,
    "quantization_config": None,
}
_WRITTEN = ("hidden_act", "feat_extract_activation", "layer_norm_eps")

# Their name and ours; * is a number, and what follows (.weight, .bias) stays.
_POSITION, _OUR_POSITION = "encoder.pos_conv_embed.conv", "encoder.pos_conv.0"
_LAYER = "encoder.layers.*"
_NAMES = (
    ("masked_spec_embed", "mask_emb"),
    ("feature_extractor.conv_layers.*.conv", "feature_extractor.conv_layers.*.0"),
    ("feature_projection.layer_norm", "layer_norm"),
    ("feature_projection.projection", "post_extract_proj"),
    (f"{_POSITION}.parametrizations.weight.original0", f"{_OUR_POSITION}.weight_g"),
    (f"{_POSITION}.parametrizations.weight.original1", f"{_OUR_POSITION}.weight_v"),
    (f"{_POSITION}.bias", f"{_OUR_POSITION}.bias"),
    ("encoder.layer_norm", "encoder.layer_norm"),
    *((f"{_LAYER}.attention.{p}_proj", f"{_LAYER}.self_attn.{p}_proj") for p in "kvq"),
    (f"{_LAYER}.attention.out_proj", f"{_LAYER}.self_attn.out_proj"),
    (f"{_LAYER}.attention.gru_rel_pos_linear", f"{_LAYER}.self_attn.grep_linear"),
    (f"{_LAYER}.attention.gru_rel_pos_const", f"{_LAYER}.self_attn.grep_a"),
    (f"{_LAYER}.attention.rel_attn_embed", f"{_LAYER}.self_attn.relative_attention_bias"),
    (f"{_LAYER}.layer_norm", f"{_LAYER}.self_attn_layer_norm"),
    (f"{_LAYER}.feed_forward.intermediate_dense", f"{_LAYER}.fc1"),
    (f"{_LAYER}.feed_forward.output_dense", f"{_LAYER}.fc2"),
    (f"{_LAYER}.final_layer_norm", f"{_LAYER}.final_layer_norm"),
)
_CONV_NORM = "feature_extractor.conv_layers.*.layer_norm"
_OUR_CONV_NORM = {
    "default": "feature_extractor.conv_layers.*.2",
    "layer_norm": "feature_extractor.conv_layers.*.2.1",
}
# The older of torch's two spellings of weight normalization.
_OLD_NAMES = (
    (f"{_POSITION}.weight_g", f"{_OUR_POSITION}.weight_g"),
    (f"{_POSITION}.weight_v", f"{_OUR_POSITION}.weight_v"),
)
_HEADS = (
    LeaveOut(r"lm_head\..+", "lm_head (CTC head)"),
    LeaveOut(r"(projector|classifier)\..+", "projector and classifier (classification head)"),
    LeaveOut(r"(quantizer|project_hid|project_q)\..+", "quantizer (of pre-training)"),
    LeaveOut(r"tdnn\.\d+\.kernel\.(weight|bias)", "tdnn (x-vector head)"),
    LeaveOut(r"(feature_extractor|objective)\.(weight|bias)", "objective (x-vector head)"),
    LeaveOut(r"layer_weights", "layer_weights (of a sum of layers)"),
)


def architecture(config: dict[str, Any], path: Path) -> Architecture:
    """The shape that a config.json describes.

    Raises:
        LowbitError: another type of model, or a setting that is not built here.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise LowbitError(
            f"{path} is of model_type {model_type!r}; supported are {', '.join(MODEL_TYPES)}"
        )
    for key, only in _NOT_BUILT.items():
        if config.get(key, only) != only:
            raise LowbitError(f"{path}: {key} {config[key]!r} is not supported; only {only!r} is")
    fields = (*_FIELDS, *(_WAVLM_FIELDS if model_type == "wavlm" else ()))
    values = {ours: _value(config, theirs, default, path) for theirs, ours, default in fields}
    layers = _conv_layers(config, path)
    return Architecture(
        **values,
        conv_feature_layers=str(layers),
        extractor_mode=_extractor_mode(config, path),
        project_features=layers[-1][0] == values["encoder_embed_dim"],
        relative_position_embedding=model_type == "wavlm",
        gru_rel_pos=model_type == "wavlm",
    )


def _value(config: dict[str, Any], key: str, default: Any, path: Path) -> Any:
    value = config.get(key, default)
    allowed = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, allowed):
        raise LowbitError(f"{path}: {key} {value!r} is no value like {default!r}")
    return value


def _conv_layers(config: dict[str, Any], path: Path) -> list[tuple[int, int, int]]:
    columns = [_value(config, key, default, path) for key, default in _CONV_FIELDS.items()]
    if len({len(column) for column in columns}) > 1 or not columns[0]:
        raise LowbitError(f"{path}: {', '.join(_CONV_FIELDS)} need one value per layer each")
    return list(zip(*columns, strict=True))


def _extractor_mode(config: dict[str, Any], path: Path) -> str:
    norm = config.get("feat_extract_norm", "group")
    if norm not in _NORMS:
        raise LowbitError(f"{path}: feat_extract_norm {norm!r}; supported are {', '.join(_NORMS)}")
    return _NORMS[norm]


def configuration(shape: Architecture) -> dict[str, Any]:
    """The config.json of a model of ``shape``, in which :func:`architecture` finds it again."""
    is_wavlm = shape.relative_position_embedding
    fields = (*_FIELDS, *(_WAVLM_FIELDS if is_wavlm else ()))
    columns = zip(*parse_conv_layers(shape.conv_feature_layers), strict=True)
    norms = {ours: theirs for theirs, ours in _NORMS.items()}
    return {
        "model_type": "wavlm" if is_wavlm else "hubert",
        "architectures": ["WavLMModel" if is_wavlm else "HubertModel"],
        **{theirs: getattr(shape, ours) for theirs, ours, _ in fields},
        **{key: list(column) for key, column in zip(_CONV_FIELDS, columns, strict=True)},
        "feat_extract_norm": norms[shape.extractor_mode],
        **{key: _NOT_BUILT[key] for key in _WRITTEN},
        # Only where this is not 0 does their model have the mask embedding.
        "mask_time_prob": 0.05,
        "mask_time_length": shape.mask_length,
    }


def to_ours(model_type: str, mode: str) -> list[Move | LeaveOut]:
    """The key map for reading.

    Args:
        model_type: their base model stands below this name in a model for a task.
        mode: the shape's ``extractor_mode``.
    """
    names = (*_NAMES, (_CONV_NORM, _OUR_CONV_NORM[mode]), *_OLD_NAMES)
    moves = [_move(theirs, ours, rf"(?:{model_type}\.)?") for theirs, ours in names]
    return [*moves, *_HEADS]


def to_theirs(mode: str) -> list[Move]:
    """The key map for writing; arguments as in :func:`to_ours`."""
    return [_move(ours, theirs) for theirs, ours in (*_NAMES, (_CONV_NORM, _OUR_CONV_NORM[mode]))]


def _move(source: str, target: str, prefix: str = "") -> Move:
    pattern = prefix + re.escape(source).replace(r"\*", r"(?P<number>\d+)")
    template = target.replace("*", r"\g<number>")
    return Move(rf"{pattern}(?P<leaf>(\.(weight|bias))?)", rf"{template}\g<leaf>")
