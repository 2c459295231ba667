"""Hugging Face's HuBERT, wav2vec 2.0 and WavLM: what their modules do, and their attention."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.nn.attention import SelfAttention
from fairseq_lowbit.nn.relative_attention import relative_position_gate
from fairseq_lowbit.nn.swap import Place, register_adapter, register_opaque
from fairseq_lowbit.precision import InputKind, Role

_ACTIVATIONS = {
    "gelu": InputKind.GELU,
    "gelu_new": InputKind.GELU,
    "gelu_python": InputKind.GELU,
    "gelu_fast": InputKind.GELU,
    "gelu_pytorch_tanh": InputKind.GELU,
    "relu": InputKind.RELU,
    "silu": InputKind.SILU,
    "swish": InputKind.SILU,
}


def register() -> None:
    """Makes the three models known to :func:`fairseq_lowbit.quantize`, heads and all."""
    for name in ("Hubert", "Wav2Vec2", "WavLM"):
        module = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
        register_adapter(f"{module}.{name}PreTrainedModel", _heads)
        register_adapter(f"{module}.{name}Model", _places)
    register_opaque("transformers.models.wavlm.modeling_wavlm.WavLMAttention")


class SpeechAttention(SelfAttention):
    """The attention of HuBERT and wav2vec 2.0."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As in transformers: [batch, frames, dim] to the same, and the attention probabilities
        where the float model returns them.

        Raises:
            LowbitError: cross-attention, or a mask of an unknown type.
        """
        if key_value_states is not None:
            raise LowbitError("a quantized attention reads one sequence: drop key_value_states")
        is_eager = self.config._attn_implementation == "eager"
        return super().forward(
            hidden_states,
            padding_mask(attention_mask),
            "probabilities" if output_attentions or is_eager else None,
        )


class WavLMAttention(SelfAttention):
    """The attention of WavLM, with a relative position bias gated by the input."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
        **_: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in transformers: output, probabilities averaged over the heads, and the position bias
        [batch * heads, frames, frames], which the first layer makes for all of them."""
        batch, frames, _dim = hidden_states.shape
        if position_bias is None:
            position_bias = self.compute_bias(frames, frames).repeat(batch, 1, 1)
        gate = relative_position_gate(
            self._heads(hidden_states), self.gru_rel_pos_linear, self.gru_rel_pos_const
        )
        bias = gate * position_bias.view(batch, self.heads, frames, frames)
        values, probabilities = super().forward(
            hidden_states, padding_mask(attention_mask), "probabilities", bias
        )
        return values, probabilities.mean(1, keepdim=True).expand_as(probabilities), position_bias


_ATTENTION = {
    "HubertAttention": SpeechAttention,
    "Wav2Vec2Attention": SpeechAttention,
    "WavLMAttention": WavLMAttention,
}


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[batch, frames], True at padding, of any mask over the keys that transformers hands on:
    [batch, frames] with 1 at valid frames; [batch, 1, frames, frames] which is True or 0 there.

    These encoders mask padding alone, so that all queries see the same keys. The first query speaks
    for all: to compare them would wait for the device in every layer.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask == 0
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        keys = attention_mask[:, 0, 0]
        return ~keys if keys.dtype == torch.bool else keys < 0
    raise LowbitError(
        f"a quantized attention cannot read a mask of type {type(attention_mask).__name__}: load "
        "the model with attn_implementation='sdpa' or 'eager'"
    )


def _heads(model: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    """Whatever is not said to be something else."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module, Place(Role.HEAD)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    input_kind = InputKind.ANY
    for block in model.feature_extractor.conv_layers:
        yield block.conv, Place(Role.FRONT_END, input_kind)
        input_kind = _activation(model.config.feat_extract_activation)
    yield model.feature_projection.projection, Place(Role.PROJECTION)
    for module in model.encoder.pos_conv_embed.modules():
        if isinstance(module, nn.Conv1d):
            yield module, Place(Role.POSITIONAL_CONVOLUTION)
    for layer in model.encoder.layers:
        yield from _layer(layer, _activation(model.config.hidden_act))


def _layer(layer: nn.Module, activation: InputKind) -> Iterator[tuple[nn.Module, Place]]:
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            yield module, Place(Role.ENCODER_LINEAR)
    attention = layer.attention
    # A subclass may compute something else.
    operator = _ATTENTION.get(type(attention).__name__)
    if operator is not None:
        yield attention, Place(Role.ATTENTION_OPERAND, operator=operator)
    if hasattr(attention, "gru_rel_pos_linear"):
        yield attention.gru_rel_pos_linear, Place(Role.GATE)
    yield layer.feed_forward.output_dense, Place(Role.ENCODER_LINEAR, activation)


def _activation(name: object) -> InputKind:
    return _ACTIVATIONS.get(name, InputKind.ANY) if isinstance(name, str) else InputKind.ANY
