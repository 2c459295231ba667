"""WavLM's attention (arXiv 2110.13900): scores get a bias by distance, which every frame gates."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_lowbit.nn.attention import AttentionMap, AttentionOutput, SelfAttention
from fairseq_lowbit.nn.operators import Embedding, Linear
from fairseq_lowbit.precision import InputKind, Role

# The gate's linear gives two groups of values, which are summed: of one gate each.
_GATES, _VALUES_PER_GATE = 2, 4


@dataclass(frozen=True)
class RelativePositions:
    """How distances between frames become rows of a table.

    Attributes:
        buckets: rows of the table; the second half of them for keys later than the query. Of each
            half, the first half has a row for every distance, and the others cover ever more.
        max_distance: distances from here on, in frames, share the last row.
        gated: whether every query frame scales its bias by what it reads.
    """

    buckets: int
    max_distance: int
    gated: bool

    def rows(self, distances: Tensor) -> Tensor:
        """The table's row for each of ``distances``, key minus query in frames, of any shape."""
        half = self.buckets // 2
        exact = half // 2
        size = distances.abs()
        # In fp32 and in this order, as WavLM was trained: a row is cut off from a logarithm.
        share = torch.log(size.clamp_min(1).float() / exact) / math.log(self.max_distance / exact)
        shared = (exact + share * (half - exact)).long().clamp_max(half - 1)
        return torch.where(size < exact, size, shared) + half * (distances > 0)


def relative_position_gate(per_head: Tensor, linear: nn.Module, constant: Tensor) -> Tensor:
    """What scales the bias of a query frame.

    Args:
        per_head: [batch, heads, frames, dim / heads], the attention's input.
        linear: from dim / heads values to 8.
        constant: [1, heads, 1, 1].

    Returns:
        [batch, heads, frames, 1].
    """
    logits = linear(per_head).unflatten(-1, (_GATES, _VALUES_PER_GATE)).sum(-1)
    reset, update = torch.sigmoid(logits).chunk(_GATES, dim=-1)
    return reset * (update * constant - 1) + 2


class RelativeAttention(SelfAttention):
    """:class:`SelfAttention` with a relative position bias. Keys are those of WavLM's checkpoints.

    Args:
        first: the attention of the first layer, whose table this one uses too; None in the first
            layer itself. The table is registered there only, so that it is stored, counted and
            trained once.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float,
        positions: RelativePositions,
        first: "RelativeAttention | None" = None,
    ) -> None:
        super().__init__(dim, heads, dropout)
        self.positions = positions
        if first is None:
            self.relative_attention_bias = nn.Embedding(positions.buckets, heads)
            Embedding.adopt(self.relative_attention_bias, Role.EMBEDDING, InputKind.ANY)
        # A module that stands in a tuple is not registered; a deep copy of the model still copies
        # it and the reference together.
        self._first = () if first is None else (first,)
        if positions.gated:
            self.grep_linear = Linear(dim // heads, _GATES * _VALUES_PER_GATE, role=Role.GATE)
            self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    @property
    def table(self) -> Embedding:
        """[buckets, heads], of the first layer."""
        owner = self._first[0] if self._first else self
        return owner.relative_attention_bias

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, need: AttentionMap | None = None
    ) -> AttentionOutput:
        """As in :class:`SelfAttention`; the scores are those with the bias."""
        bias = self.bias_by_distance(x.shape[1]).to(x.dtype)
        if self.positions.gated:
            bias = bias * relative_position_gate(self._heads(x), self.grep_linear, self.grep_a)
        return super().forward(x, padding_mask, need, bias)

    def bias_by_distance(self, frames: int) -> Tensor:
        """[heads, frames, frames], queries first; made anew in each layer, of 2 frames - 1 rows."""
        frame = torch.arange(frames, device=self.table.weight.device)
        distances = torch.arange(1 - frames, frames, device=frame.device)
        by_distance = self.table(self.positions.rows(distances))
        # No window (unfold), which shares memory but has no form in ONNX with a free length.
        return by_distance.T[:, frame - frame[:, None] + frames - 1]
