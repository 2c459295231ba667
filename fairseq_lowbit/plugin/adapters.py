"""fairseq's own wav2vec 2.0 and HuBERT encoders: what their modules do, and their attention."""

from collections.abc import Iterator

from fairseq.models.wav2vec.wav2vec2 import TransformerSentenceEncoderLayer
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.nn.attention import SelfAttention
from fairseq_lowbit.nn.swap import Place, register_adapter, register_opaque
from fairseq_lowbit.precision import InputKind, Role

_ENCODER = "fairseq.models.wav2vec.wav2vec2.TransformerEncoder"
_MODELS = (
    "fairseq.models.wav2vec.wav2vec2.Wav2Vec2Model",
    "fairseq.models.hubert.hubert.HubertModel",
)
_ACTIVATIONS = {
    "gelu": InputKind.GELU,
    "gelu_accurate": InputKind.GELU,
    "relu": InputKind.RELU,
    "silu": InputKind.SILU,
}


def register() -> None:
    """Makes fairseq's encoders known to :func:`fairseq_lowbit.quantize`."""
    for name in _MODELS:
        register_adapter(name, _model)
    register_adapter(_ENCODER, _encoder)
    register_opaque("fairseq.modules.multihead_attention.MultiheadAttention")


class FairseqSelfAttention(SelfAttention):
    """fairseq's self-attention, whose own forward uses the weights of its projections without
    calling them."""

    @classmethod
    def obstacle(cls, module: MultiheadAttention) -> str:
        if not module.self_attention:
            return "it is no self-attention"
        if module.bias_k is not None or module.add_zero_attn or module.use_xformers:
            return "add_bias_kv, add_zero_attn and xformers have no quantized form"
        return super().obstacle(module)

    @classmethod
    def adopt(cls, module: MultiheadAttention, role: Role, input_kind: InputKind) -> None:
        super().adopt(module, role, input_kind)
        module.dropout = module.dropout_module.p

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in fairseq: [frames, batch, dim] to the same, and the probabilities when needed: their
        mean over the heads [batch, frames, frames], or all [heads, batch, frames, frames].

        Raises:
            LowbitError: another use than that of an encoder.
        """
        if incremental_state is not None or static_kv or attn_mask is not None or before_softmax:
            raise LowbitError(
                "a quantized attention of fairseq's speech encoders takes neither attn_mask nor "
                "incremental_state, static_kv or before_softmax"
            )
        mask = None if key_padding_mask is None else key_padding_mask.bool()
        need = "probabilities" if need_weights or need_head_weights else None
        values, probabilities = super().forward(query.transpose(0, 1), mask, need)
        if probabilities is not None:
            heads_first = probabilities.transpose(0, 1)
            probabilities = heads_first if need_head_weights else heads_first.mean(0)
        return values.transpose(0, 1), probabilities


def _model(model: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module, Place(Role.HEAD)
    input_kind = InputKind.ANY
    for block in model.feature_extractor.conv_layers:
        yield block[0], Place(Role.FRONT_END, input_kind)
        input_kind = InputKind.GELU
    if model.post_extract_proj is not None:
        yield model.post_extract_proj, Place(Role.PROJECTION)


def _encoder(encoder: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    for module in encoder.pos_conv.modules():
        if isinstance(module, nn.Conv1d):
            yield module, Place(Role.POSITIONAL_CONVOLUTION)
    for layer in encoder.layers:
        yield from _layer(layer)


def _layer(layer: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            yield module, Place(Role.ENCODER_LINEAR)
    if isinstance(layer, TransformerSentenceEncoderLayer):
        yield layer.self_attn, Place(Role.ATTENTION_OPERAND, operator=FairseqSelfAttention)
        function = layer.activation_fn
        name = getattr(function, "__name__", type(function).__name__).lower()
        yield layer.fc2, Place(Role.ENCODER_LINEAR, _ACTIVATIONS.get(name, InputKind.ANY))
