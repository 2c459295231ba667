"""The convolutional front-end: waveform to 50 Hz features, blind to padding."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lowbit.nn import Conv1d
from fairseq_lowbit.precision import InputKind, Role

ConvLayers = Sequence[tuple[int, int, int]]


def output_lengths(samples: Tensor, layers: ConvLayers) -> Tensor:
    """Valid frames of utterances of ``samples`` valid samples, integer tensor of any shape."""
    for _, kernel, stride in layers:
        samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
    return samples.clamp_min(0)


def receptive_field(layers: ConvLayers) -> int:
    """Samples needed for one frame."""
    samples = 1
    for _, kernel, stride in reversed(layers):
        samples = (samples - 1) * stride + kernel
    return samples


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """[batch] valid lengths -> [batch, size], True at padding."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


class TimeGroupNorm(nn.GroupNorm):
    """Group norm with one group per channel whose statistics see valid samples only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[batch, channels, time]; ``lengths`` [batch], None when all of it is valid."""
        if lengths is None:
            return F.group_norm(x.float(), self.num_groups, *self._affine(), self.eps).type_as(x)
        valid = ~padding_mask(lengths, x.shape[-1])[:, None]
        count = lengths[:, None, None].clamp_min(1)
        values = x.float()
        mean = (values * valid).sum(-1, keepdim=True) / count
        variance = ((values - mean).square() * valid).sum(-1, keepdim=True) / count
        weight, bias = self._affine()
        normalized = (values - mean) * torch.rsqrt(variance + self.eps)
        return (normalized * weight[:, None] + bias[:, None]).type_as(x)

    def _affine(self) -> tuple[Tensor, Tensor]:
        return self.weight.float(), self.bias.float()


class ChannelLayerNorm(nn.Module):
    """Layer norm over channels of [batch, channels, time]; keys as in fairseq (``1.weight``)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_module("1", nn.LayerNorm(channels))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        norm = self.get_submodule("1")
        normalized = F.layer_norm(
            x.transpose(1, 2).float(),
            norm.normalized_shape,
            norm.weight.float(),
            norm.bias.float(),
            norm.eps,
        )
        return normalized.transpose(1, 2).type_as(x)


class ConvBlock(nn.ModuleDict):
    """Convolution ("0"), optional norm ("2"), GELU; the keys are fairseq's."""

    def __init__(self, conv: Conv1d, norm: nn.Module | None) -> None:
        super().__init__({"0": conv} if norm is None else {"0": conv, "2": norm})
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = self["0"](x)
        if "2" in self:
            x = self["2"](x, lengths)
        return F.gelu(x)


class FeatureExtractor(nn.Module):
    """Stack of convolution blocks.

    Args:
        layers: (channels, kernel, stride) each.
        mode: ``default`` (group norm after the first) or ``layer_norm`` (after every one).
        see_padding: group norm over padded samples too, as fairseq does it.
    """

    def __init__(
        self, layers: ConvLayers, mode: str, bias: bool = False, see_padding: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.see_padding = list(layers), see_padding
        self.conv_layers = nn.ModuleList()
        channels_in = 1
        for index, (channels, kernel, stride) in enumerate(layers):
            conv = Conv1d(
                channels_in,
                channels,
                kernel,
                stride,
                bias=bias,
                role=Role.FRONT_END,
                input_kind=InputKind.GELU if index else InputKind.ANY,
            )
            nn.init.kaiming_normal_(conv.weight)
            norm = None
            if mode == "layer_norm":
                norm = ChannelLayerNorm(channels)
            elif index == 0:
                norm = TimeGroupNorm(channels)
            self.conv_layers.append(ConvBlock(conv, norm))
            channels_in = channels

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waveforms to features.

        Args:
            waveform: [batch, samples].
            lengths: [batch] valid samples; None when all are valid.

        Returns:
            [batch, frames, channels].
        """
        if lengths is not None and self.conv_layers[0]["0"].input_quantizer is not None:
            # Its range may be that of the whole utterance, which zeros do not widen.
            waveform = waveform.masked_fill(padding_mask(lengths, waveform.shape[1]), 0)
        x = waveform[:, None]
        for block, layer in zip(self.conv_layers, self.layers, strict=True):
            if lengths is not None:
                lengths = output_lengths(lengths, [layer])
            x = block(x, None if self.see_padding else lengths)
        return x.transpose(1, 2)
