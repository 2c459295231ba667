"""The shape of a model and what regularises it. Field names are those of fairseq's HubertConfig."""

import ast
from dataclasses import dataclass, field, fields
from typing import Any

from fairseq_lowbit.errors import LowbitError

SAMPLE_RATE = 16_000  # of every model, in Hz

# WFE-C of SEW (arXiv 2109.06870) with c = 64, l = 1: total stride 320, that is 50 Hz.
FASTCONV = (
    "[(64,10,5)] + [(128,3,2),(128,1,1)]*2 + [(256,3,2),(256,1,1)]*2 + [(512,2,2),(512,1,1)]*2"
)

PADDING = ("valid", "fairseq", "fairseq_hubert")

# Options of fairseq's HubertConfig that change the model, and their one supported value.
_NOT_BUILT = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "conv_pos_batch_norm": False,
    "pos_conv_depth": 1,
    "target_glu": False,
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Architecture:
    """Shape and regularisation of a HuBERT; the defaults are HuBERT-FastConv at base size."""

    conv_feature_layers: str = _option(
        FASTCONV, "front-end as a list of (channels, kernel, stride), with + and *"
    )
    extractor_mode: str = _option(
        "default", "default: group norm after the first convolution; layer_norm: after each"
    )
    conv_bias: bool = _option(False, "bias in the front-end's convolutions")
    encoder_layers: int = _option(12, "transformer layers")
    encoder_embed_dim: int = _option(768, "features per frame")
    encoder_ffn_embed_dim: int = _option(3072, "inner features of the feed-forward network")
    encoder_attention_heads: int = _option(12, "attention heads")
    layer_norm_first: bool = _option(False, "pre-norm layers (HuBERT Large)")
    project_features: bool = _option(
        False, "project the front-end's features even where they are as many as encoder_embed_dim"
    )
    relative_position_embedding: bool = _option(
        False, "attention scores get a bias by distance (WavLM)"
    )
    num_buckets: int = _option(320, "rows of the table of that bias")
    max_distance: int = _option(800, "frames from which on all distances share a row of it")
    gru_rel_pos: bool = _option(False, "every frame gates that bias (WavLM)")
    conv_pos: int = _option(128, "kernel of the positional convolution")
    conv_pos_groups: int = _option(16, "groups of the positional convolution")
    final_dim: int = _option(256, "features of the final projection; 0: encoder_embed_dim")
    dropout: float = _option(0.1, "dropout in the transformer")
    attention_dropout: float = _option(0.1, "dropout on attention weights")
    activation_dropout: float = _option(0.0, "dropout after the feed-forward activation")
    dropout_input: float = _option(0.1, "dropout on the projected front-end features")
    encoder_layerdrop: float = _option(0.05, "probability of skipping a layer in training")
    feature_grad_mult: float = _option(0.1, "factor on the front-end's gradient; 0 freezes it")
    mask_prob: float = _option(0.8, "share of frames covered by masks in pre-training")
    mask_length: int = _option(10, "frames per mask")
    logit_temp: float = _option(0.1, "temperature of the label logits")
    padding: str = _option(
        "valid",
        "valid: no statistic sees padding; fairseq: group norm over padding as well, as in wav2vec "
        "2.0 and Hugging Face; fairseq_hubert: and padded frames are those of fairseq's HuBERT",
    )

    def check(self) -> None:
        """Raises LowbitError for a shape that cannot be built."""
        parse_conv_layers(self.conv_feature_layers)
        if self.extractor_mode not in ("default", "layer_norm"):
            raise LowbitError(
                f"model.extractor_mode {self.extractor_mode!r}; allowed are default, layer_norm"
            )
        if self.padding not in PADDING:
            raise LowbitError(f"model.padding {self.padding!r}; allowed are {', '.join(PADDING)}")
        for divisor in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, divisor):
                raise LowbitError(
                    f"model.encoder_embed_dim {self.encoder_embed_dim} is not divisible by "
                    f"model.{divisor} {getattr(self, divisor)}"
                )
        self._check_relative_positions()

    def _check_relative_positions(self) -> None:
        if not self.relative_position_embedding:
            if self.gru_rel_pos:
                raise LowbitError(
                    "model.gru_rel_pos gates the bias of model.relative_position_embedding, which "
                    "is false: set both or none"
                )
            return
        if self.num_buckets < 4:
            raise LowbitError(f"model.num_buckets {self.num_buckets}; at least 4 are needed")
        if self.max_distance <= self.num_buckets // 4:
            raise LowbitError(
                f"model.max_distance {self.max_distance} has to be more than a quarter of "
                f"model.num_buckets {self.num_buckets}: so many distances have a row of their own"
            )

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> "Architecture":
        """Takes the known fields of a configuration, for example a checkpoint's cfg["model"].

        Raises:
            LowbitError: the configuration asks for a variant of fairseq's that is not built here.
        """
        for key, only in _NOT_BUILT.items():
            if values.get(key, only) != only:
                raise LowbitError(f"model.{key} {values[key]!r} is not supported; only {only!r} is")
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def parse_conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Reads ``[(512,10,5)] + [(512,3,2)] * 4`` without evaluating code.

    Returns:
        (channels, kernel, stride) per layer.

    Raises:
        LowbitError: anything but lists, integer triples, + and *.
    """
    try:
        layers = _value(ast.parse(text, mode="eval").body)
        valid = [(c, k, s) for c, k, s in layers if min(c, k, s) >= 1]
    except (SyntaxError, TypeError, ValueError):
        layers, valid = None, []
    if not valid or len(valid) != len(layers):
        raise LowbitError(
            f"model.conv_feature_layers {text!r}: write a list of (channels, kernel, stride)"
        )
    return valid


def _value(node: ast.expr) -> Any:
    match node:
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
    raise ValueError(ast.dump(node))
