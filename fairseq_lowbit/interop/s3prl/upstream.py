"""A model as s3prl wants an upstream: waveforms in, one tensor per layer out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fairseq_lowbit.interop import LoadedModel
from fairseq_lowbit.models.extractor import receptive_field


class LowbitUpstream(nn.Module):
    """A model of any shape and precision, frozen or fine-tuned by s3prl.

    The model stays in eval mode when s3prl calls ``train()``: dropped layers would change the
    number of hidden states, and its weighted sum needs every one. Gradients flow in either mode.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model.eval()
        self.normalize = loaded.normalize
        self.shortest = receptive_field(self.model.conv_layers)

    def train(self, mode: bool = True) -> "LowbitUpstream":
        super().train(mode)
        self.model.eval()
        return self

    def get_downsample_rates(self, key: str) -> int:
        """Samples per frame, the same for every ``key`` of what :meth:`forward` returns."""
        return self.model.samples_per_frame

    def forward(self, waveforms: Sequence[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """Hidden states of a batch; each utterance's are those it has alone.

        Args:
            waveforms: [samples] each, 16 kHz, -1 to 1; what is shorter than a frame is filled up
                with silence.

        Returns:
            ``hidden_states``: the input of the first layer and the output of every layer, each
            [batch, frames, dim]; frames behind the end of an utterance repeat its last one.
            ``last_hidden_state``: the last of them.
        """
        states, padding_mask = self.model.representations(*self._batch(waveforms))
        if padding_mask is not None:
            frames = (~padding_mask).sum(dim=1)
            states = [_repeat_last_frame(state, frames) for state in states]
        return {"hidden_states": states, "last_hidden_state": states[-1]}

    def _batch(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Waveforms [batch, samples] and their lengths [batch], on the model's device."""
        like = self.model.mask_emb
        waveforms = [waveform.to(like) for waveform in waveforms]
        if self.normalize:
            waveforms = [F.layer_norm(waveform, waveform.shape) for waveform in waveforms]
        lengths = [max(len(waveform), self.shortest) for waveform in waveforms]
        batch = pad_sequence(waveforms, batch_first=True)
        batch = F.pad(batch, (0, max(lengths) - batch.shape[1]))
        return batch, torch.tensor(lengths, device=like.device)


def _repeat_last_frame(state: Tensor, frames: Tensor) -> Tensor:
    """[batch, frames, dim] with frame ``frames`` - 1 of each utterance in place of all later ones.

    s3prl reads a frame or two more than an utterance has. It fills up the longest of a batch in
    this way, so that without it an utterance would end differently in another batch.
    """
    positions = torch.arange(state.shape[1], device=state.device)
    kept = torch.minimum(positions, frames[:, None] - 1)
    return state.gather(1, kept[..., None].expand_as(state))
