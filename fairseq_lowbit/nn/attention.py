"""Multi-head self-attention as a module of its own, with a named quantizer for every operand."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lowbit.nn.operators import Linear
from fairseq_lowbit.nn.work import Steps, Work
from fairseq_lowbit.precision import InputKind, Role
from fairseq_lowbit.quantization import Quantizer, product

OPERANDS = ("query", "key", "value", "probabilities")
AttentionMap = Literal["probabilities", "scores"]


class AttentionOutput(NamedTuple):
    """``values`` [batch, frames, dim]; ``map`` [batch, heads, frames, frames] or None."""

    values: Tensor
    map: Tensor | None


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with quantizers on the shared input, q, k, v and probabilities.

    Weights are named as in fairseq's MultiheadAttention, whose forward passes them to a fused
    function and so never calls the projections. q is quantized before the 1/sqrt(d) scaling.

    Attributes:
        input_quantizer: one for q, k and v projections together when their bits agree.
        query_quantizer, key_quantizer, value_quantizer, probabilities_quantizer: None for float.
        reference_frames: length for which the probability scale is stored; None turns the
            1/length scaling off.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} features are not divisible by {heads} attention heads")
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self._add_slots()

    def _add_slots(self) -> None:
        self.reference_frames: int | None = None
        self.input_quantizer: Quantizer | None = None
        for operand in OPERANDS:
            setattr(self, f"{operand}_quantizer", None)

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Why the float attention ``module`` cannot become this one; empty when it can."""
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            projection = getattr(module, name)
            if type(projection) is not nn.Linear and not isinstance(projection, Linear):
                return f"its {name} is a {type(projection).__name__}, not a Linear"
        return ""

    @classmethod
    def adopt(cls, module: nn.Module, role: Role, input_kind: InputKind) -> None:
        """Turns a float attention into this class, which derives from the one it has; see
        :meth:`fairseq_lowbit.nn.operators.Operator.adopt`."""
        module.__class__ = cls
        module.dim, module.heads = module.embed_dim, module.num_heads
        module._add_slots()

    @property
    def input_projections(self) -> tuple[Linear, Linear, Linear]:
        """The projections that read the attention's input."""
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def input_features(self) -> int:
        return self.dim

    @property
    def output_features(self) -> int:
        return self.dim

    def work(self, steps: Steps) -> tuple[Work, Work, Work]:
        """The two products on a single utterance, and the softmax between them, which reads and
        writes one map of each head. The projections state their own."""
        features, maps = self.dim * steps.read, self.heads * steps.read**2
        return (
            Work(features * steps.read, 2 * features + maps, "scores", ("query", "key")),
            Work(0, 2 * maps, "softmax"),
            Work(features * steps.read, maps + 2 * features, "context", ("probabilities", "value")),
        )

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        need: AttentionMap | None = None,
        bias: Tensor | None = None,
    ) -> AttentionOutput:
        """Attends over the valid frames.

        Args:
            x: [batch, frames, dim].
            padding_mask: [batch, frames], True at padding; None when there is none.
            need: also return the softmax output before its quantizer, or the scores before the
                softmax (0 at padded keys).
            bias: added to the scores, broadcastable to [batch, heads, frames, frames].
        """
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        query, key, value = (
            product.through(self._operand(name, projection(x)), self._heads)
            for name, projection in zip(OPERANDS[:3], self.input_projections, strict=True)
        )
        if need is None and self.probabilities_quantizer is None:
            attended, attention_map = self._fused(query, key, value, padding_mask, bias), None
        else:
            attended, attention_map = self._explicit(query, key, value, padding_mask, need, bias)
        attended = attended.transpose(1, 2).flatten(2)
        return AttentionOutput(self.out_proj(attended), attention_map)

    def _operand(self, name: str, x: Tensor) -> Tensor:
        quantizer = getattr(self, f"{name}_quantizer")
        return x if quantizer is None else quantizer(x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _fused(self, query, key, value, padding_mask, bias) -> Tensor:
        mask = None if padding_mask is None else ~padding_mask[:, None, None]
        if bias is not None:
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
            mask = mask.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)

    def _explicit(
        self, query, key, value, padding_mask, need, bias
    ) -> tuple[Tensor, Tensor | None]:
        # Scaled before the product: there are fewer queries than scores.
        query = product.through(query, lambda q: q * (self.dim // self.heads) ** -0.5)
        scores = product.matmul(query, product.through(key, lambda k: k.transpose(-1, -2)))
        scores = scores if bias is None else scores + bias
        padded = None if padding_mask is None else padding_mask[:, None, None]
        logits = scores if padded is None else scores.masked_fill(padded, float("-inf"))
        probabilities = torch.softmax(logits.float(), -1)
        attention_map = probabilities
        if need == "scores":
            attention_map = scores if padded is None else scores.masked_fill(padded, 0.0)
        weights = probabilities
        if self.probabilities_quantizer is not None:
            ratio = self._length_ratio(scores, padded)
            weights = self.probabilities_quantizer(probabilities, ratio)
            if padding_mask is not None:
                # A learned shift below zero gives padded keys a non-zero code: their values go.
                padding = padding_mask[:, None, :, None]
                value = product.through(value, lambda v: v.masked_fill(padding, 0.0))
        weights = product.cast(weights, value.dtype)
        if self.dropout and self.training:
            weights = F.dropout(weights, self.dropout)
        return product.matmul(weights, value), attention_map if need else None

    def _length_ratio(self, scores: Tensor, padded: Tensor | None) -> Tensor | None:
        """Reference length over valid frames, [batch or 1, 1, 1, 1]; None without such scaling."""
        if self.reference_frames is None:
            return None
        frames = scores.new_full((1, 1, 1, 1), scores.shape[-1], dtype=torch.float32)
        if padded is not None:
            frames = (~padded).sum(-1, keepdim=True).float()
        return self.reference_frames / frames
