"""The transformer encoder; its layers can be advanced one by one from outside."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lowbit.models.architecture import Architecture
from fairseq_lowbit.nn import Linear, PositionalConv1d, SelfAttention
from fairseq_lowbit.nn.attention import AttentionMap
from fairseq_lowbit.nn.relative_attention import RelativeAttention, RelativePositions
from fairseq_lowbit.precision import InputKind


class LayerOutput(NamedTuple):
    """``x`` [batch, frames, dim]; ``attention`` [batch, heads, frames, frames] or None."""

    x: Tensor
    attention: Tensor | None


class EncoderLayer(nn.Module):
    """Attention and feed-forward network, post-norm or pre-norm."""

    def __init__(self, shape: Architecture, self_attn: SelfAttention) -> None:
        super().__init__()
        dim, inner = shape.encoder_embed_dim, shape.encoder_ffn_embed_dim
        self.self_attn = self_attn
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, inner)
        self.fc2 = Linear(inner, dim, input_kind=InputKind.GELU)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.norm_first = shape.layer_norm_first
        self.dropout = nn.Dropout(shape.dropout)
        self.activation_dropout = nn.Dropout(shape.activation_dropout)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, need: AttentionMap | None = None
    ) -> LayerOutput:
        """[batch, frames, dim] to the same; arguments as in :class:`SelfAttention`."""
        if self.norm_first:
            values, attention = self.self_attn(self.self_attn_layer_norm(x), padding_mask, need)
            x = x + self.dropout(values)
            return LayerOutput(x + self._feed_forward(self.final_layer_norm(x)), attention)
        values, attention = self.self_attn(x, padding_mask, need)
        x = self.self_attn_layer_norm(x + self.dropout(values))
        return LayerOutput(self.final_layer_norm(x + self._feed_forward(x)), attention)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.activation_dropout(F.gelu(self.fc1(x)))))


class PositionalEmbedding(nn.Sequential):
    """Positional convolution and GELU; key ``0.*`` as in fairseq."""

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """[batch, frames, dim] -> same."""
        return F.gelu(self[0](x.transpose(1, 2), padding_mask)).transpose(1, 2)


class Encoder(nn.Module):
    """Positional convolution, then the layers.

    :meth:`begin`, the ``layers`` and :meth:`end` are public steps: distillation advances two
    encoders together so that one layer's attention maps are alive at a time.
    """

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        dim = shape.encoder_embed_dim
        self.pos_conv = PositionalEmbedding(
            PositionalConv1d(dim, shape.conv_pos, shape.conv_pos_groups)
        )
        self.layers = nn.ModuleList(
            EncoderLayer(shape, self_attn) for self_attn in _attentions(shape)
        )
        self.layer_norm = nn.LayerNorm(dim)
        self.norm_first = shape.layer_norm_first
        self.dropout = nn.Dropout(shape.dropout)
        self.layerdrop = shape.encoder_layerdrop
        self.apply(_init_weight)

    def begin(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Input of layer 0 from projected features, both [batch, frames, dim]."""
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[..., None], 0)
        x = x + self.pos_conv(x, padding_mask)
        return self.dropout(x if self.norm_first else self.layer_norm(x))

    def end(self, x: Tensor) -> Tensor:
        """Output of the encoder from the output of the last layer."""
        return self.layer_norm(x) if self.norm_first else x

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encoder output and the output of every layer that ran, each [batch, frames, dim]."""
        x = self.begin(x, padding_mask)
        outputs = []
        for layer in self.layers:
            if self.training and self.layerdrop > 0 and torch.rand(()) < self.layerdrop:
                continue
            x = layer(x, padding_mask).x
            outputs.append(x)
        return self.end(x), outputs


def _attentions(shape: Architecture) -> Iterator[SelfAttention]:
    """One for each layer."""
    sizes = shape.encoder_embed_dim, shape.encoder_attention_heads, shape.attention_dropout
    if not shape.relative_position_embedding:
        for _ in range(shape.encoder_layers):
            yield SelfAttention(*sizes)
        return
    positions = RelativePositions(shape.num_buckets, shape.max_distance, shape.gru_rel_pos)
    first = None
    for _ in range(shape.encoder_layers):
        attention = RelativeAttention(*sizes, positions, first)
        first = first or attention
        yield attention


def _init_weight(module: nn.Module) -> None:
    """HuBERT's own initialisation: N(0, 0.02), which keeps tiny teachers healthy as well."""
    if isinstance(module, Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, Linear):
        nn.init.zeros_(module.bias)
