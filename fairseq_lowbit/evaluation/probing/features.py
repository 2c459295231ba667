"""The frozen features of every recording, computed once for all tasks and seeds."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models import device_of

# A feature that hardly varies, such as a dead one, is not blown up.
_LEAST_DEVIATION = 1e-5
# Neighbouring frames are averaged: heads learn sequences of half the length faster and as well.
_POOLED_FRAMES = 2


class Upstream(Protocol):
    """A model that gives the input of its first layer and the output of every layer."""

    def representations(
        self, waveform: Tensor, lengths: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """L + 1 of [batch, frames, dim], and the padding mask [batch, frames]."""

    def parameters(self) -> Iterator[Tensor]:
        """Tensors, by which the device is known."""


Features = dict[int, Tensor]


@torch.no_grad()
def frozen_features(model: Upstream, batches: Iterable[Utterances]) -> Features:
    """The valid frames of each recording by its number, the mean of every two: fp32
    [layers, dim, frames], on the device of the model.

    They stay in memory: 100 bytes x layers x dim for a second of speech at 50 frames a second,
    which is 0.1 MB with 4 layers of 192 and 1 MB with a model of base size.
    """
    features = {}
    device = device_of(model)
    for batch in batches:
        batch = batch.to(device)
        states, padding = model.representations(batch.waveform, batch.lengths)
        stacked = torch.stack(list(states), 1).transpose(2, 3).float()
        frames = (~padding).sum(1).tolist()
        for line, row, count in zip(batch.lines, stacked, frames, strict=True):
            features[line] = F.avg_pool1d(row[..., :count], _POOLED_FRAMES, ceil_mode=True)
    return features


@dataclass(frozen=True)
class Standard:
    """Takes every feature to mean 0 and deviation 1 over what is trained on, so that a head sees
    features of any scale alike.

    Attributes:
        mean, scale: [layers, dim, 1].
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Standard":
        """Of the features that are trained on, [layers, dim, any]."""
        scale = values.std(-1, keepdim=True).clamp_min(_LEAST_DEVIATION)
        return cls(values.mean(-1, keepdim=True), scale)

    def __call__(self, values: Tensor) -> Tensor:
        """[layers, dim, any]."""
        return (values - self.mean) / self.scale


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Features [layers, dim, frames] behind each other, with a frame of zeros behind each: as a
    batch of one, [1, layers, dim, all frames]. No time is spent on padding."""
    return torch.cat([F.pad(row, (0, 1)) for row in rows], -1)[None]
