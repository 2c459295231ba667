"""What others need of a model: one that has these methods is distilled, measured and profiled like
HuBERT. None has to be derived from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fairseq_lowbit.nn.attention import AttentionMap
from fairseq_lowbit.nn.work import Steps
from fairseq_lowbit.precision import Plan, Precision


@dataclass(frozen=True)
class Frames:
    """A batch on its way from the front-end to the encoder.

    Attributes:
        x: [batch, frames, channels].
        padding_mask: [batch, frames], True at padding; None when every frame is valid.
    """

    x: Tensor
    padding_mask: Tensor | None

    def valid(self) -> Tensor:
        """[batch, frames], True at valid frames."""
        if self.padding_mask is None:
            return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        return ~self.padding_mask


class HiddenStates(Protocol):
    """A speech model that gives the output of every layer: agreement, timing."""

    def hidden_states(
        self, waveform: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Outputs of layers 1..L, [batch, frames, features] each, and the padding mask
        [batch, frames], None without ``lengths``.

        Args:
            waveform: [batch, samples].
            lengths: [batch] valid samples; None without padding.
            mask: [batch, frames], True where a frame is masked; None for no masking.
        """


class EncoderLayer(Protocol):
    """A layer that can give its attention."""

    def __call__(
        self, x: Tensor, padding_mask: Tensor | None = None, need: AttentionMap | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, frames, features] to the same, and the map that is needed or None,
        [batch, heads, frames, frames]."""


class LayeredEncoder(HiddenStates, Protocol):
    """A speech model that can be advanced layer by layer from outside: distillation and health.

    Attributes:
        feature_extractor: what :meth:`extract` runs.
        layers: to be called one by one, from what :meth:`begin` returns to what
            :meth:`project_final` takes.
    """

    feature_extractor: nn.Module
    layers: Sequence[EncoderLayer]

    def extract(self, waveform: Tensor, lengths: Tensor | None = None) -> Frames:
        """Front-end only; arguments as in :meth:`hidden_states`."""

    def begin(self, frames: Frames, mask: Tensor | None = None) -> Tensor:
        """Input of the first layer, [batch, frames, features]."""

    def project_final(self, x: Tensor) -> Tensor:
        """Output of the last layer to what the model ends in, [batch, frames, any]."""


@runtime_checkable
class HasOperatorSteps(Protocol):
    """A model whose work is counted without running it."""

    def operator_steps(self, samples: int) -> Mapping[str, Sequence[Steps]]:
        """Every call of every operator and attention on one utterance, by module name; a module
        that is not run is left out."""


class SpeechModel(LayeredEncoder, HasOperatorSteps, Protocol):
    """What is loaded from a checkpoint and compared with others.

    Attributes:
        plan: which of its operators are quantized, and how.
        features: values of a frame in every layer.
    """

    plan: Plan
    features: int

    def representations(
        self, waveform: Tensor, lengths: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """The input of layer 1 and the output of every layer, and the padding mask."""

    def frame_lengths(self, samples: Tensor) -> Tensor:
        """Valid frames of utterances of ``samples`` valid samples, integers of any shape."""

    def final_output(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """From the waveform to what the model ends in; reaches every operator."""

    def untrained(self, precision: Precision | None = None) -> "SpeechModel":
        """A model of this shape with random weights."""
